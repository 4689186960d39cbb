"""A state as flat tensors and numbers by name, and back: whatever is remembered is saved by these two functions.

A state is a NamedTuple of tensors, numbers, further NamedTuples, tuples of these, and mappings from numbers to these. Its parts are
named by their path, such as ``hats.3.step``.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

T = TypeVar("T")


def flatten(state: Any) -> tuple[dict[str, Tensor], dict[str, float | int]]:
    """The tensors and the numbers of a state; empty tensors and None are left out."""
    tensors, numbers = dict[str, Tensor](), dict[str, float | int]()
    for path, value in _leaves(state, ""):
        if isinstance(value, Tensor):
            tensors[path] = value
        else:
            numbers[path] = value
    return tensors, numbers


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel()):
        yield path, value
    elif isinstance(value, Mapping | tuple):
        parts = value.items() if isinstance(value, Mapping) else zip(_names(value), value, strict=True)
        for name, part in parts:
            yield from _leaves(part, f"{path}.{name}" if path else f"{name}")


def _names(value: tuple[Any, ...]) -> Any:
    return getattr(value, "_fields", range(len(value)))


def restore(kind: type[T], parts: Mapping[str, Any], **kinds: type) -> T:
    """A state from what :func:`flatten` made of it.

    Args:
        kind: its type, a NamedTuple.
        parts: tensors and numbers by their paths.
        kinds: of fields whose type the NamedTuple does not tell.

    Raises:
        KeyError: a number is missing.
    """
    fields: Any = kind
    return kind(*(_read(kinds.get(name, hint), name, parts) for name, hint in _hints(fields).items()))


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _read(kind: Any, path: str, parts: Mapping[str, Any]) -> Any:
    if kind in (int, bool, float):
        return kind(parts[path])
    if kind is Tensor:
        return parts.get(path, torch.empty(0))
    names = dict.fromkeys(name[len(path) + 1 :].split(".")[0] for name in parts if name.startswith(f"{path}."))
    arguments = get_args(kind)
    match get_origin(kind):
        case None:
            return kind(*(_read(hint, f"{path}.{name}", parts) for name, hint in _hints(kind).items()))
        case origin if origin in (Union, UnionType):  # X | None
            return _read(arguments[0], path, parts) if names else None
        case origin if origin is tuple:
            return tuple(_read(arguments[0], f"{path}.{name}", parts) for name in sorted(names, key=int))
    return {int(name): _read(arguments[1], f"{path}.{name}", parts) for name in names}
