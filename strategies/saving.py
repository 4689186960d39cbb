"""A state as flat tensors and numbers by name, and back.

Whatever is remembered is saved by these two functions. A state is a NamedTuple of tensors, numbers,
further NamedTuples, tuples of these, and dictionaries of these by number. Its parts are named by
their path, such as ``hats.3.step``.
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
    elif isinstance(value, dict | tuple):
        names = value if isinstance(value, dict) else getattr(value, "_fields", range(len(value)))
        parts = value.values() if isinstance(value, dict) else value
        for name, part in zip(names, parts, strict=True):
            yield from _leaves(part, f"{path}.{name}" if path else name)


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
    return kind(
        *(_read(kinds.get(name, hint), name, parts) for name, hint in _hints(fields).items())
    )


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


@cache
def _arguments(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    return get_origin(kind), get_args(kind)


def _read(kind: Any, path: str, parts: Mapping[str, Any]) -> Any:
    if kind is Tensor:
        found = parts.get(path)
        return torch.empty(0) if found is None else found
    if kind in (int, bool, float):
        return kind(parts[path])
    origin, arguments = _arguments(kind)
    if origin is None:
        return kind(*(_read(hint, f"{path}.{name}", parts) for name, hint in _hints(kind).items()))
    names = {
        name[len(path) + 1 :].split(".", 1)[0] for name in parts if name.startswith(f"{path}.")
    }
    if origin in (Union, UnionType):  # X | None
        return _read(arguments[0], path, parts) if names else None
    if origin is tuple:
        return tuple(
            _read(arguments[0], f"{path}.{name}", parts) for name in sorted(names, key=int)
        )
    return {int(name): _read(arguments[1], f"{path}.{name}", parts) for name in names}
