"""Arrays that wait on disk."""

from io import FileIO
from tempfile import TemporaryFile

import pytest
import torch
from flwr.app import ArrayRecord

from server_app.spool import Spool
from strategies.records import pack

PARTS = ("dtype", "shape", "stype", "data")


def record(value: float, size: int = 100_000) -> ArrayRecord:
    return pack({"x": torch.full((size,), value), "stats": torch.arange(3.0) + value})


def same(one: ArrayRecord, other: ArrayRecord) -> bool:
    return [(name, *map(vars(one[name]).get, PARTS)) for name in one] == [
        (name, *map(vars(other[name]).get, PARTS)) for name in other
    ]


def test_what_is_put_down_is_taken_back_in_any_order() -> None:
    with TemporaryFile(buffering=0) as file:
        spool = Spool(file)
        extents = [spool.put(record(value)) for value in (1.0, 2.0, 3.0)]
        assert file.tell() > 3 * 400_000
        for at in (1, 0, 2, 1):
            assert same(spool.get(extents[at]), record(at + 1.0))


def test_on_a_full_disk_they_stay_in_memory() -> None:
    with FileIO("/dev/full", "r+") as file:
        spool = Spool(file)
        with pytest.raises(OSError, match="No space left"):
            file.write(b"1")
        assert same(spool.get(spool.put(record(1.0))), record(1.0))
