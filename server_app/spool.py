"""Replies that wait on disk: many of them need no more memory than one."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import cached_property
from io import FileIO
from tempfile import TemporaryFile
from typing import NamedTuple
from weakref import finalize

from flwr.app import Array, ArrayRecord, Message

from strategies.records import ARRAYS, arrays_of, num_bytes


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
        self._free = defaultdict[int, list[int]](list)  # where arrays were that are gone, by size

    def put(self, arrays: ArrayRecord) -> Mapping[str, _Extent] | ArrayRecord:
        """Write arrays; return what :meth:`get` reads them by."""
        extents, size = {}, sum(len(array.data) for array in arrays.values())
        start = self._free[size].pop() if self._free[size] else self._end
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
        self._end = max(self._end, start)
        return extents

    def get(self, extents: Mapping[str, _Extent] | ArrayRecord) -> ArrayRecord:
        """The arrays that :meth:`put` wrote."""
        return (
            extents
            if isinstance(extents, ArrayRecord)
            else ArrayRecord({name: self._read(at) for name, at in extents.items()})
        )

    def take(self, extents: Mapping[str, _Extent] | ArrayRecord) -> ArrayRecord:
        """The arrays that :meth:`put` wrote, for the last time."""
        if extents and not isinstance(extents, ArrayRecord):
            places = extents.values()
            self._free[sum(each.length for each in places)].append(
                min(each.start for each in places)
            )
        return self.get(extents)

    def _read(self, extent: _Extent) -> Array:
        with open(
            self._file.fileno(), "rb", closefd=False
        ) as reader:  # which reads on until all is there
            reader.seek(extent.start)
            return Array(extent.dtype, extent.shape, extent.stype, reader.read(extent.length))


class Waiting:
    """Replies that wait: so many bytes in memory, the others on disk, where TMPDIR says.

    Args:
        in_memory: the bytes.
    """

    def __init__(self, in_memory: int) -> None:
        self._room = in_memory

    @cached_property
    def _spool(self) -> Spool:
        file = TemporaryFile(buffering=0)  # noqa: SIM115 - closed with this object
        finalize(self, file.close)
        return Spool(file)

    def put(self, reply: Message) -> Callable[[], Message]:
        """Keep a reply until what is returned is called, once."""
        size = num_bytes(reply)
        if size > self._room and arrays_of(reply):
            extents = self._spool.put(arrays_of(reply))
            reply.content.pop(ARRAYS)
            return lambda: self._from_disk(reply, extents)
        self._room -= size
        return lambda: self._from_memory(reply, size)

    def _from_memory(self, reply: Message, size: int) -> Message:
        self._room += size
        return reply

    def _from_disk(self, reply: Message, extents: Mapping[str, _Extent] | ArrayRecord) -> Message:
        reply.content[ARRAYS] = self._spool.take(extents)
        return reply
