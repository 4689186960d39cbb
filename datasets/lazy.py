"""Examples that stay where they are until a batch needs them: data larger than memory.

Which examples make a batch is drawn where the network is; other processes only read them (a torch
``DataLoader``), so that their number changes no result. They are started by Python's forkserver:
such a process has neither keys nor sockets of this one.
"""

import atexit
import os
import sys
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain
from multiprocessing import get_context, parent_process
from threading import Thread
from types import ModuleType
from typing import Any, Protocol
from weakref import WeakSet
from zlib import crc32

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from datasets.errors import SourceError

Values = Any  # a tensor [n, ...], or a Lazy in its place
Found = tuple[Tensor, Tensor | None]
CPU = torch.device("cpu")
IGNORED = -100  # a pixel of a map that does not count


class Reader(Sized, Hashable, Protocol):
    """Reads examples: x [b, ...] of some ``rows`` [b], and their y [b, ...].

    Their y is None where it is in memory.
    """

    def __getitem__(self, rows: Tensor, /) -> Found: ...


@dataclass(frozen=True)
class Lazy:
    """Stands in the place of a tensor [n, ...] that would be too large.

    It has the tensor's length and shape. ``lazy[chosen]`` is the same of some rows, none of which
    is read yet. Of examples whose x and y are both read, x and y are two of these with one reader.

    Args:
        reader: reads several at once.
        rows: [n], those of the reader that are meant.
        example: the shape of one.
        device: where what is read goes.
        workers: processes that read ahead; 0: this one reads when asked.
    """

    reader: Reader
    rows: Tensor
    example: tuple[int, ...]
    device: torch.device = CPU
    workers: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, as of a tensor."""
        return len(self), *self.example

    @property
    def in_order(self) -> bool:
        """Whether these can only be read from the first to the last."""
        return isinstance(self.reader, Streamed)

    def __getitem__(self, chosen: Tensor) -> "Lazy":
        return replace(self, rows=self.rows[chosen])


def all_examples(reader: Reader, example: tuple[int, ...]) -> Lazy:
    """All examples of a reader, each of the shape ``example``; none is read yet."""
    return Lazy(reader, torch.arange(len(reader)), example)


def read(x: Values, y: Values, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The ``chosen`` examples, on the device of ``x``.

    Raises:
        SourceError: they cannot be read.
    """
    if isinstance(x, Tensor):
        chosen = chosen.to(x.device)
        return x[chosen], y[chosen]
    return _delivered(x, y, chosen, _try(x.reader, x.rows[chosen]))


def stream(x: Values, y: Values, lists: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The examples of one list of indices after the other; lazy ones with workers are read ahead.

    Raises:
        SourceError: they cannot be read.
    """
    if isinstance(x, Tensor) or not x.workers:
        for chosen in lists:
            yield read(x, y, chosen)
        return
    # What can be read in its order only, one process reads.
    pool = _pool(x.reader, 1 if x.in_order else x.workers, x.device.type)
    lists, asked, mine = iter(lists), deque[Tensor](), object()

    def asking() -> Iterator[Tensor]:
        for chosen in lists:
            asked.append(chosen)
            yield x.rows[chosen]

    while True:
        try:
            # Another stream began meanwhile, and had what was read for this one thrown away.
            if pool.user is not mine:
                lists = chain(list(asked), lists)
                asked.clear()
                pool.begin(mine, asking())
            found = next(pool.batches, None)
        except BaseException:  # a deadline, Ctrl-C: nobody knows in which state its queues are
            close()
            raise
        if found is None:
            return
        yield _delivered(x, y, asked.popleft(), found)


def close() -> None:
    """End the processes that read.

    Whoever still holds a stream may go on with it, and has others started.
    """
    for pool in list(_pools):
        pool.end()
    _pool.cache_clear()


def _delivered(x: Lazy, y: Values, chosen: Tensor, found: Found | str) -> tuple[Tensor, Tensor]:
    """The batch that was read, with the labels that are in memory."""
    if isinstance(found, str):
        raise SourceError(found)
    inputs, labels = found
    if isinstance(y, Tensor):
        labels = y[chosen.to(y.device)]
    assert labels is not None
    return inputs.to(x.device, non_blocking=True), labels.to(x.device, non_blocking=True)


def _try(reader: Reader, rows: Tensor) -> Found | str:
    """What is read, or why it is not, in the same words whoever reads."""
    try:
        return reader[rows]
    except SourceError as error:
        return str(error)


class _RowSampler(Sampler[Tensor]):
    """A sampler: the lists of rows that are to be read."""

    rows: Iterator[Tensor]

    def __iter__(self) -> Iterator[Tensor]:
        return self.rows


class _Read(Dataset[Found | str]):
    """A reader as a data set for ``DataLoader``: an item is a batch."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def __getitem__(self, rows: Tensor) -> Found | str:
        return _try(self._reader, rows)


class _Pool:
    """Processes that read for one user at a time.

    Attributes:
        user: whoever began last.
        batches: what is read for it.
    """

    def __init__(self, reader: Reader, workers: int, pinned: bool) -> None:
        context = get_context("forkserver")
        # Imported once, not in each process.
        context.set_forkserver_preload(["torch", "torchvision.transforms.functional", "pandas"])
        self._asked, self.user = _RowSampler(), object()
        self.batches: Iterator[Found | str] = iter(())
        self._load = partial(
            DataLoader[Any],
            _Read(reader),
            batch_size=None,
            sampler=self._asked,
            num_workers=workers,
            pin_memory=pinned,
            worker_init_fn=_end_with_parent,
            multiprocessing_context=context,
            generator=torch.Generator(),  # not the global one, of which dropout draws
            persistent_workers=True,
        )
        self._loader = self._load()
        _pools.add(self)

    def end(self) -> None:
        """End the processes."""
        self.user, self.batches, self._loader = object(), iter(()), self._load()

    def begin(self, user: object, rows: Iterator[Tensor]) -> None:
        """Begin to read these rows."""
        self.user, self._asked.rows = user, rows
        with _no_main():
            self.batches = iter(self._loader)


_pools: WeakSet[_Pool] = WeakSet()


@contextmanager
def _no_main() -> Iterator[None]:
    """A context in which new processes do not import this program's main module.

    Readers need nothing of it, and it may be slow.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@lru_cache(maxsize=1)
def _pool(reader: Reader, workers: int, device: str) -> _Pool:
    return _Pool(reader, workers, device != "cpu")


def _end_with_parent(_: int) -> None:
    """End this process when the one that uses what it reads ends.

    Torch's own watch looks at the parent that started this process, which is the forkserver and
    lives as long as this one.
    """

    def watch() -> None:
        if parent := parent_process():
            parent.join()
            os._exit(1)

    Thread(target=watch, daemon=True).start()


atexit.register(close)


# Data sets of somebody's own.


class Items:
    """Reads a map-style torch ``Dataset``, whose items are x, or x and y.

    Args:
        dataset: whatever one of its items raises ends the reading.
        labelled: whether y is taken from the items.
        classes: whole numbers in y lie below; 0: nobody looks.
    """

    def __init__(self, dataset: Any, labelled: bool, classes: int = 0) -> None:
        self._dataset, self._labelled, self._classes = dataset, labelled, classes

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, rows: Tensor) -> Found:
        with torch.random.fork_rng(devices=[]):
            # Random transforms follow from the batch, whoever reads it.
            torch.default_generator.manual_seed(crc32(rows.numpy().tobytes()))
            items = [_item(partial(self._dataset.__getitem__, row), row) for row in rows.tolist()]
            return _stacked(items, self._labelled, self._classes)


class Streamed:
    """Reads an ``IterableDataset`` of pairs x and y in its order.

    After it, it reads a map-style one, the test part, at random. Who asks for an example before the
    last one has the first data set read from its beginning.
    """

    def __init__(self, train: Any, test: Any, classes: int) -> None:
        self._train, self._tests, self._classes = (
            train,
            Items(test, labelled=True, classes=classes),
            classes,
        )
        self._length, self._next = len(train), 0
        self._running: Iterator[Any] | None = None

    def __len__(self) -> int:
        return self._length + len(self._tests)

    def __getitem__(self, rows: Tensor) -> Found:
        if int(rows[0]) >= self._length:
            return self._tests[rows - self._length]
        return _stacked(
            [self._at(row) for row in rows.tolist()], labelled=True, classes=self._classes
        )

    def _at(self, row: int) -> Any:
        if self._running is None or row < self._next:
            self._next, self._running = 0, iter(self._train)
        while True:
            found = _item(self._running.__next__, self._next)
            self._next += 1
            if self._next > row:
                return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_next": 0, "_running": None}


def _item(get: Callable[[], Any], row: int) -> Any:
    try:
        return get()
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}".strip(" :")
        raise SourceError(f"example {row} of the data set cannot be read: {reason}") from error


def _stacked(items: list[Any], labelled: bool, classes: int) -> Found:
    pairs = [item if isinstance(item, tuple | list) else (item,) for item in items]
    try:
        x, *y = (
            torch.stack([torch.as_tensor(each) for each in side])
            for side in zip(*pairs, strict=True)
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise SourceError(
            f"items of the data set are no tensors of one shape: {str(error)[:200]}"
        ) from error
    if labelled and len(y) != 1:
        raise SourceError("items of the data set are not (x, y), and y is None")
    if labelled and classes:  # on a GPU a class that there is not would end the process
        beyond = y[0][(y[0] != IGNORED) & ((y[0] < 0) | (y[0] >= classes))]
        if beyond.numel():
            raise SourceError(
                f"items of the data set hold y = {beyond[0].item():g}; allowed: 0 to {classes - 1}"
            )
    return x, y[0] if labelled else None


def adopted(x: Any, y: Any, test: Any, classes: int = 0) -> dict[str, Any]:
    """x, y and test of somebody's own :class:`datasets.examples.Examples`.

    Torch data sets among them become lazy examples. ``classes``: whole numbers in y lie below; 0:
    nobody looks.

    Raises:
        SourceError: an IterableDataset without a length or without a test part, or an item that is
            not as it should be.
    """
    if not isinstance(x, Dataset):
        return {"x": x, "y": y, "test": test}
    try:
        length = len(x)  # type: ignore[arg-type]
    except TypeError:
        raise SourceError(
            f"{type(x).__name__}: a torch Dataset needs a length, an IterableDataset too"
        ) from None
    reader: Reader
    if isinstance(x, IterableDataset):
        if y is not None or not isinstance(test, Dataset) or isinstance(test, IterableDataset):
            raise SourceError(
                f"{type(x).__name__}: beside an IterableDataset of (x, y), y is None and test a "
                "map-style Dataset"
            )
        reader = Streamed(x, test, classes)
        test = torch.arange(len(reader)) >= length
    else:
        reader = Items(x, y is None, classes)
    first, label = reader[torch.tensor([0])]
    xs = all_examples(reader, tuple(first.shape[1:]))
    return {
        "x": xs,
        "y": y if label is None else replace(xs, example=tuple(label.shape[1:])),
        "test": test,
    }
