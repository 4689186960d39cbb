"""Names that leave a site, and values that a run's author wrote: short, printable, found."""

import importlib
from collections.abc import Sequence
from typing import Any

MOST_CLASSES = 100
LONGEST_NAME = 64  # characters of a class, a natural site, a site
LONGEST_COLUMN = 200


def fault(names: Sequence[object], longest: int = LONGEST_NAME) -> str:
    """Why ``names`` cannot leave a site, without repeating any of them; empty where they can.

    Names go to the server and stand in logs, tables and pictures there: a long one or one with
    control characters does harm, and many long ones are a site's data.
    """
    for number, name in enumerate(names, 1):
        what = f"name {number} of {len(names)}"
        if not isinstance(name, str):
            return f"{what} is no text but {type(name).__name__}"
        if not 0 < len(name) <= longest:
            return f"{what} has {len(name)} characters; allowed: 1 to {longest}"
        if not name.isprintable():
            return f"{what} holds characters that cannot be printed"
    return "" if len(set(names)) == len(names) else "two names are alike"


def too_many(num_classes: int) -> str:
    """Why so many classes cannot leave a site; empty where they can."""
    if num_classes <= MOST_CLASSES:
        return ""
    return f"{num_classes} different classes, at most {MOST_CLASSES} may leave a site"


def shown(value: str) -> str:
    """``value`` in quotes for an error message, its middle left out where it is long."""
    quoted = repr(value)
    if len(quoted) <= 200:
        return quoted
    return f"{quoted[:100]} ... {quoted[-80:]} ({len(value)} characters)"


def listed(names: Sequence[str]) -> str:
    """The first of ``names`` for an error message."""
    printable = (
        name if name.isprintable() and len(name) <= LONGEST_NAME else shown(name)
        for name in names[:20]
    )
    return ", ".join(printable) + (", ..." if len(names) > 20 else "")


def call_imported(key: str, value: str, error: type[ValueError], *arguments: object) -> Any:
    """What the function returns that the run names by ``key = "package.module:function"``.

    Raises:
        ``error``: there is none, or it raises something.
    """
    module, _, name = value.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
        if not callable(found):
            raise error(f"{key} = {shown(value)} is no function but {type(found).__name__}")
        return found(*arguments)
    except error:
        raise
    except Exception as problem:
        reason = f"{type(problem).__name__}: {str(problem)[:200]}".strip(" :")
        raise error(f"{key} = {shown(value)}: {reason}") from problem
