"""Replies that wait on disk: many of them need no more memory than one."""

from collections.abc import Mapping
from io import FileIO
from typing import NamedTuple

from flwr.app import Array, ArrayRecord


class _Place(NamedTuple):
    """Where an array is, and what it is."""

    start: int
    length: int
    dtype: str
    shape: tuple[int, ...]
    stype: str


class Shelf:
    """Arrays in a file.

    Args:
        file: empty, without a buffer.
    """

    def __init__(self, file: FileIO) -> None:
        self._file, self._end = file, 0

    def put(self, arrays: ArrayRecord) -> Mapping[str, _Place] | ArrayRecord:
        """Put arrays down; what :meth:`take` takes them back by."""
        places, start = {}, self._end
        try:
            self._file.seek(start)
            for name, array in arrays.items():
                places[name] = _Place(start, len(array.data), array.dtype, array.shape, array.stype)
                rest = memoryview(array.data)
                while rest:
                    rest = rest[self._file.write(rest) :]
                start += len(array.data)
        except OSError:  # the disk is full: they stay in memory
            return arrays
        self._end = start
        return places

    def take(self, places: Mapping[str, _Place] | ArrayRecord) -> ArrayRecord:
        """The arrays again."""
        return (
            places
            if isinstance(places, ArrayRecord)
            else ArrayRecord({name: self._read(at) for name, at in places.items()})
        )

    def _read(self, place: _Place) -> Array:
        with open(
            self._file.fileno(), "rb", closefd=False
        ) as reader:  # which reads on until all is there
            reader.seek(place.start)
            return Array(place.dtype, place.shape, place.stype, reader.read(place.length))
