"""A value of one's own by ``package.module:NAME``: a method, a topology, a codec."""

import importlib
from collections.abc import Iterable
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")


def imported(path: object, kind: type[T], known: Iterable[str], example: str) -> T:
    """A value of one's own by ``package.module:NAME``.

    Raises:
        ValueError: there is none, or it is of another kind.
    """
    module, colon, name = str(path).partition(":")
    if not colon:
        small = {name.lower(): name for name in reversed(list(known))}
        guess = [small[each] for each in get_close_matches(str(path).lower(), small, n=1)]
        hint = f"; did you mean {guess[0]!r}?" if guess else ""
        raise ValueError(f"allowed: {', '.join(known)}, package.module:{example}{hint}")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ValueError(f"it cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(found, kind):
        raise ValueError(f"a {kind.__name__} is expected, it is a {type(found).__name__}")
    return found
