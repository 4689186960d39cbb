"""Replies that wait on disk: many of them need no more memory than one."""

from collections.abc import Mapping
from io import FileIO
from typing import NamedTuple

from flwr.app import Array, ArrayRecord


class _Extent(NamedTuple):
    """The bytes of an array in the file, and its type."""

    start: int
    length: int
    dtype: str
    shape: tuple[int, ...]
    stype: str


class Spool:
    """Arrays in a temporary file.

    Args:
        file: empty, without a buffer.
    """

    def __init__(self, file: FileIO) -> None:
        self._file, self._end = file, 0

    def put(self, arrays: ArrayRecord) -> Mapping[str, _Extent] | ArrayRecord:
        """Write arrays; return what :meth:`get` reads them by."""
        extents, start = {}, self._end
        try:
            self._file.seek(start)
            for name, array in arrays.items():
                extents[name] = _Extent(
                    start, len(array.data), array.dtype, array.shape, array.stype
                )
                rest = memoryview(array.data)
                while rest:
                    rest = rest[self._file.write(rest) :]
                start += len(array.data)
        except OSError:  # the disk is full: they stay in memory
            return arrays
        self._end = start
        return extents

    def get(self, extents: Mapping[str, _Extent] | ArrayRecord) -> ArrayRecord:
        """The arrays that :meth:`put` wrote."""
        return (
            extents
            if isinstance(extents, ArrayRecord)
            else ArrayRecord({name: self._read(at) for name, at in extents.items()})
        )

    def _read(self, extent: _Extent) -> Array:
        with open(
            self._file.fileno(), "rb", closefd=False
        ) as reader:  # which reads on until all is there
            reader.seek(extent.start)
            return Array(extent.dtype, extent.shape, extent.stype, reader.read(extent.length))
