"""Files that somebody else made: regular ones, and what is wrong with them is said with names."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from datasets.errors import SourceError
from datasets.names import shown

# Folders and files named so are official parts; whether that is the test part.
PARTS = {
    "train": False,
    "training": False,
    "test": True,
    "val": True,
    "valid": True,
    "validation": True,
}


def existing(path: str | Path) -> Path:
    """The file or folder that ``data.path`` names.

    Raises:
        SourceError: there is none.
    """
    if not str(path):
        raise SourceError("data.path = '': this source needs a file or folder")
    try:
        found = Path(path).expanduser()
        if found.exists():
            return found
    except (OSError, RuntimeError, ValueError):  # too long, an unknown user, a NUL
        pass
    raise SourceError(f"data.path = {shown(str(path))}: there is no such file or folder")


@contextmanager
def reading_as(file: Path, what: str) -> Iterator[None]:
    """A context in which errors name ``file`` and say that it is read as ``what``.

    Raises:
        SourceError: whatever the reader raises, with the name of the file; or the file is a pipe or
            device, which would be read without end.
    """
    try:
        if not file.is_file():
            raise SourceError(f"{shown(str(file))} is no regular file")
        yield
    except SourceError:
        raise
    except Exception as error:
        # Decoders raise what they like: struct.error, EOFError, SyntaxError, MemoryError.
        reason = f"{type(error).__name__}: {str(error)[:200].strip()}".strip(" :")
        raise SourceError(f"{shown(str(file))} is not {what} that can be read: {reason}") from error


def split_off(places: Sequence[Sequence[str]]) -> tuple[Tensor | None, list[list[str]]]:
    """Which of the ``places`` are the official test part, if they tell; and the rest of each.

    A place is a sequence of names from the top down.
    """
    tops = {place[0] for place in places if place}
    if not (all(places) and tops <= PARTS.keys() and {PARTS[top] for top in tops} == {False, True}):
        return None, [list(place) for place in places]
    return torch.tensor([PARTS[place[0]] for place in places]), [
        list(place[1:]) for place in places
    ]
