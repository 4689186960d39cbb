"""Language: texts as bytes, and the files that somebody's tokenizer wrote.

Both in windows of a context and the token after it.
"""

from collections.abc import Sequence
from functools import lru_cache
from mmap import MADV_RANDOM, mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datasets.errors import SourceError
from datasets.examples import TOKEN, Examples
from datasets.files import existing, reading_as, split_off
from datasets.folders import natural_sites
from datasets.lazy import all_examples
from datasets.names import shown
from datasets.partitions import FEWEST
from datasets.tables import texts

BYTES = 256
KINDS = {"uint8", "uint16", "uint32"}  # of .npy files


class Stream(NamedTuple):
    """Tokens one after the other, in memory or in a file that is mapped.

    Attributes:
        tokens: [length], or the file.
        name: of the file, or what else it is.
        length: in tokens.
        changed: when the file was, in ns.
    """

    tokens: Tensor | Path
    name: str
    length: int
    changed: int = 0

    def values(self) -> NDArray[np.generic]:
        """The tokens, [length]."""
        return (
            mapped(self.tokens, self.changed)
            if isinstance(self.tokens, Path)
            else self.tokens.numpy()
        )


@lru_cache(maxsize=256)
def mapped(file: Path, changed: int) -> NDArray[np.generic]:
    """The tokens of a file that was ``changed`` then, mapped into memory.

    Pages are read when they are touched.

    Raises:
        SourceError: it is no file of tokens.
    """
    with reading_as(file, "a file of tokens"):
        if file.suffix == ".bin":
            found: NDArray[np.generic] = np.memmap(file, np.dtype("<u2"), "r")
        else:
            found = np.load(file, mmap_mode="r", allow_pickle=False)
        if isinstance(found.base, mmap):
            # Else the pages around each window would be read and held with it.
            found.base.madvise(MADV_RANDOM)
        if found.ndim != 1 or found.dtype.name not in KINDS:
            raise ValueError(
                f"{found.dtype} {list(found.shape)}; allowed: one row of {', '.join(sorted(KINDS))}"
            )
    return found


class Windows:
    """Reads windows: x [b, context] and y [b, context], the tokens after those of x; both int64.

    Neighbours share one token, so that each but a stream's first is predicted once.

    Args:
        streams: cut into windows one after the other; what is left at the end of each goes.
        context: tokens of x.
        vocabulary: tokens are below.
    """

    def __init__(self, streams: Sequence[Stream], context: int, vocabulary: int) -> None:
        self._streams, self._context, self._vocabulary = streams, context, vocabulary
        self.counts = np.array(
            [max(stream.length - 1, 0) // context for stream in streams], dtype=np.int64
        )
        self._ends = self.counts.cumsum()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        found = np.empty((len(rows), self._context + 1), np.int64)
        of_stream = self._ends.searchsorted(rows.numpy(), side="right")
        starts = (rows.numpy() - (self._ends - self.counts)[of_stream]) * self._context
        for window, stream, start in zip(found, of_stream, starts, strict=True):
            window[:] = self._streams[stream].values()[start : start + self._context + 1]
        if len(wrong := np.argwhere(found >= self._vocabulary)):
            row, place = wrong[0]
            problem = (
                f"{shown(self._streams[of_stream[row]].name)} holds the token {found[row, place]}"
            )
            raise SourceError(
                f"{problem}: data.vocabulary = {self._vocabulary}; allowed: above all tokens"
            )
        windows = torch.from_numpy(found)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def text_bytes(path: str | Path, group: str, context: int) -> Examples:
    """Texts as UTF-8 bytes, in windows (:class:`Windows`) of their natural site's stream.

    There is a 0 between two documents. Documents are the rows of CSV files with a column ``text``
    (:func:`datasets.tables.texts`), or ``.txt`` files, whose natural sites are as in
    :func:`tokens`.

    Raises:
        SourceError: no texts, or none that fills a window.
    """
    root = existing(path)
    if (root.is_dir() and any(root.glob("*.csv"))) or root.suffix == ".csv":
        documents, of_group, groups, test = texts(root, group)
    else:
        files, of_group, groups, test = _files(root, group, (".txt",))
        documents = []
        for file in files:
            with reading_as(file, "a text in UTF-8"):
                documents.append(file.read_text("utf-8"))
    unknown = torch.zeros(len(documents), dtype=torch.int64)
    # Documents of the same site and part make one stream.
    kinds = torch.stack([unknown if each is None else each.long() for each in (of_group, test)])
    streams, different = [], kinds.unique(dim=1)
    for kind in different.T:
        ours = (kinds == kind[:, None]).all(0).nonzero().flatten().tolist()
        joined = "\0".join(documents[number] for number in ours).encode("utf-8", "replace")
        streams.append(
            Stream(
                torch.frombuffer(bytearray(joined or b"\0"), dtype=torch.uint8),
                str(root),
                len(joined),
            )
        )
    sites, tests = different[0] if groups else None, different[1] == 1 if test is not None else None
    return _examples(root, streams, sites, groups, tests, context, BYTES)


def tokens(path: str | Path, group: str, context: int, vocabulary: int) -> Examples:
    """What a tokenizer wrote, mapped into memory.

    That is ``.bin`` files of little-endian uint16, or ``.npy`` files of uint8, 16 or 32. The
    natural site of a file is its top folder below ``path`` or, where files lie in none, its name;
    or what the first bracket of the regular expression ``group`` finds in its path. Files or
    folders named ``train`` and ``test`` (or ``val``) are the official parts. Windows
    (:class:`Windows`) reach over no file's end.

    Raises:
        SourceError: no files, one that holds no tokens, or none that fills a window; a token that
            is not below ``vocabulary`` when it is read.
    """
    root = existing(path)
    files, of_group, groups, test = _files(root, group, (".bin", ".npy"))
    times = [file.stat().st_mtime_ns for file in files]
    streams = [
        Stream(file, str(file), len(mapped(file, time)), time)
        for file, time in zip(files, times, strict=True)
    ]
    return _examples(root, streams, of_group, groups, test, context, vocabulary)


def _files(
    root: Path, group: str, endings: Sequence[str]
) -> tuple[list[Path], Tensor | None, tuple[str, ...], Tensor | None]:
    """Files, their natural sites, the names of these, and which are the official test part."""
    files = (
        sorted(file for file in root.rglob("*") if file.suffix.lower() in endings)
        if root.is_dir()
        else [root]
    )
    if not files or files[0].suffix.lower() not in endings:
        raise SourceError(f"{shown(str(root))}: no file ends in {', '.join(endings)}")
    if files == [root]:
        return files, None, (), None
    paths = [file.relative_to(root) for file in files]
    test, places = split_off([path.with_suffix("").parts for path in paths])
    names = [place[0] if place else "" for place in places]
    of_group, groups = natural_sites(
        root, group, [path.as_posix() for path in paths], names if all(names) else None
    )
    return files, of_group, groups, test


def _examples(
    root: Path,
    streams: Sequence[Stream],
    of_group: Tensor | None,
    groups: tuple[str, ...],
    test: Tensor | None,
    context: int,
    vocabulary: int,
) -> Examples:
    windows = Windows(streams, context, vocabulary)
    if len(windows) < FEWEST:
        length = sum(stream.length for stream in streams)
        found = f"{len(windows)} windows of data.context + 1 = {context + 1} tokens in {length}"
        raise SourceError(
            f"{shown(str(root))}: {found}; at least {FEWEST} are needed, to train on and to test on"
        )
    counts = torch.from_numpy(windows.counts)
    each = [
        None if values is None else values.repeat_interleave(counts) for values in (of_group, test)
    ]
    x = all_examples(windows, (context,))
    return Examples(x, x, TOKEN, each[0], groups, each[1])
