"""Arrays that wait on disk."""

from io import FileIO
from tempfile import TemporaryFile

import pytest
import torch
from flwr.app import ArrayRecord, Error, Message, RecordDict

from configuration.flower import TaskIdentity
from server_app.spool import Spool, Waiting
from strategies.records import ARRAYS, arrays_of, num_bytes, pack

PARTS = ("dtype", "shape", "stype", "data")


def record(value: float, size: int = 100_000) -> ArrayRecord:
    return pack({"x": torch.full((size,), value), "stats": torch.arange(3.0) + value})


@pytest.fixture(autouse=True)
def identity() -> None:
    """Messages ask for it."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


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


def test_places_of_what_was_taken_are_used_again() -> None:
    with TemporaryFile(buffering=0) as file:
        spool = Spool(file)
        extents = [spool.put(record(value)) for value in (1.0, 2.0)]
        size = file.tell()
        for value in (3.0, 4.0, 5.0):
            assert same(spool.take(extents.pop(0)), record(value - 2))
            extents.append(spool.put(record(value)))
        assert file.seek(0, 2) == size
        assert [same(spool.take(extents[at]), record(4.0 + at)) for at in (0, 1)] == [True, True]


def test_replies_beyond_so_many_bytes_wait_on_disk() -> None:
    replies = [
        Message(RecordDict({ARRAYS: record(value)}), reply_to=Message(RecordDict(), 1, "train"))
        for value in range(4)
    ]
    waiting, sizes = Waiting(2 * num_bytes(replies[0])), [num_bytes(reply) for reply in replies]
    taken = [waiting.put(reply) for reply in replies]
    assert [len(arrays_of(reply)) for reply in replies] == [2, 2, 0, 0]
    for at in (3, 0, 2, 1):
        reply = taken[at]()
        assert same(arrays_of(reply), record(at))
        assert num_bytes(reply) == sizes[at]
    waiting.put(replies[0])
    assert arrays_of(replies[0])  # there is room again


def test_a_reply_without_arrays_stays_as_it_is() -> None:
    error = Message(Error(1, "no"), reply_to=Message(RecordDict(), 1, "train"))
    assert Waiting(0).put(error)() is error
