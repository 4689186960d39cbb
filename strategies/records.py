"""Vectors as Flower records, and back.

A model crosses the wire as one float32 vector ``x`` and, where it has BatchNorm, one of statistics
``stats``: Flower's cost is per array, not per byte.
"""

import hashlib
import warnings
from collections.abc import Mapping
from functools import cache, lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from torch import Tensor

# The records of a message; Flower's strategies use these names.
ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
X, STATS = "x", "stats"  # the arrays of a model
# What a peer offers to all neighbours, or to one; what came from one.
OFFER, TO, FROM = "offer", "to-", "from-"
_COUNTED = "_archipelago_bytes"  # where a message keeps its size


def pack(vectors: Mapping[str, Tensor]) -> ArrayRecord:
    """Vectors as a record; empty ones (``stats`` of a network without BatchNorm) are left out."""
    return ArrayRecord({name: _array(vector) for name, vector in vectors.items() if vector.numel()})


def _array(vector: Tensor) -> Array:
    """What ``Array(ndarray)`` makes, with one copy of the data where that makes three."""
    return _written(np.ascontiguousarray(vector.detach().cpu().numpy()))


def _written(values: "np.ndarray[Any, Any]") -> Array:
    data = b"".join((header(values.dtype, values.shape), values.data))
    return Array(str(values.dtype), values.shape, "numpy.ndarray", data)


@lru_cache(maxsize=256)
def header(dtype: "np.dtype[Any]", shape: tuple[int, ...]) -> bytes:
    """What numpy's format writes before the elements of a plain array in C order."""
    stream = BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": dtype.str, "fortran_order": False, "shape": shape}
    )
    return stream.getvalue()


def pack_bytes(data: bytes) -> Array:
    """Bytes as an array."""
    return _written(np.frombuffer(data, np.uint8))


def unpack_bytes(array: Array) -> bytes:
    """The bytes of :func:`pack_bytes`."""
    return unpack(array).numpy().tobytes()


def unpack(array: Array) -> Tensor:
    """The array as a tensor that shares the message's memory: read it, never write into it.

    ``Array.numpy`` would copy, which is most of the time of averaging a large model.

    Raises:
        ValueError: the array is none of numpy's, or not a plain one in C order.
    """
    length = 10 + int.from_bytes(array.data[8:10], "little") if array.data[6:7] == b"\x01" else 4096
    shape, dtype, offset = _layout(array.data[:length])
    flat = np.frombuffer(array.data, dtype, offset=offset)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(flat).reshape(shape)


@lru_cache(maxsize=64)
def _layout(header: bytes) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape, type and where the data begin.

    Cached: numpy compiles each header as Python, which takes a quarter of a millisecond.
    """
    stream = BytesIO(header)
    version = np.lib.format.read_magic(stream)
    read_header = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = read_header(stream)
    if (fortran and len(shape) > 1) or dtype.hasobject:
        raise ValueError("only plain arrays in C order")
    return shape, dtype, stream.tell()


# Not by ``content.array_records`` and its like: these make dictionaries in a cycle with the whole
# content, which would keep a model in memory until Python looks for cycles.
def arrays_of(message: Message) -> ArrayRecord:
    """The arrays of a message; none where there are none."""
    record = message.content.get(ARRAYS)
    return record if isinstance(record, ArrayRecord) else ArrayRecord()


def config_of(message: Message) -> ConfigRecord:
    """The configuration in a message; empty where there is none."""
    record = message.content.get(CONFIG)
    return record if isinstance(record, ConfigRecord) else ConfigRecord()


def metrics_of(message: Message) -> MetricRecord:
    """The metrics of a message; none where there are none."""
    record = message.content.get(METRICS)
    return record if isinstance(record, MetricRecord) else MetricRecord()


def num_bytes(message: Message) -> int:
    """Bytes of a message's content as it is sent: arrays, metrics and configuration.

    Without Flower's envelope. Counted once a message, by encoding what is no array.
    """
    if not message.has_content():
        return 0
    total: int | None = message.__dict__.get(_COUNTED)
    if total is not None:
        return total
    total = 0
    for record in message.content.values():
        if isinstance(record, ArrayRecord):
            total += sum(len(array.data) for array in record.values())
        elif isinstance(record, MetricRecord | ConfigRecord):
            total += len(record.deflate())
    message.__dict__[_COUNTED] = total
    return total


@cache
def code_version() -> str:
    """A hash of the code that sites run.

    Ray's workers look for packages in the directory in which the SuperLink was started before they
    look in the app: a hash that a site sends tells whether it runs this code or something else of
    the same name.
    """
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for folder in ("client_app", "configuration", "datasets", "models", "strategies"):
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(
                file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0"
            )
    return digest.hexdigest()[:16]
