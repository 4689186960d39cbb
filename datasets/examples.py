"""A data set, in memory or read when it is needed, and what must hold of one."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from datasets.errors import SourceError
from datasets.lazy import Lazy, Values
from datasets.names import LONGEST_COLUMN, fault, shown, too_many
from datasets.partitions import FEWEST

TOKEN = ("token",)  # in the place of classes, where examples are windows of language: nothing to count
LARGEST = 2.0**63  # of a table's values: a float32 holds its square, and so every variance


class Examples(NamedTuple):
    """A data set. A function of one's own returns it; only the first three are needed.

    Attributes:
        x: a tensor, or a map-style torch ``Dataset`` of x or (x, y), read when a batch needs it (random transforms: of torch's
            generator), or an ``IterableDataset`` of (x, y) with a length, read from its beginning in each epoch, in the same
            order each time; beside that y is None and test a map-style ``Dataset``. Of all examples:
            [n, channels, height, width] pictures, uint8 from 0 to 255 or float; or [n, features],
            float; or [n, context] tokens, int64. Floats lie within ±2^63.
        y: [n] int64, indices into ``classes``; of tokens [n, context] int64, each the one after. None:
            the items of x hold it.
        classes: names of the classes, at most 100, each of at most 64 printable characters: they
            leave the site. ``("token",)`` of tokens.
        group: [n] int64, the natural site of each example, or None.
        groups: names of the natural sites, of at most 64 printable characters.
        test: [n] bool, the official test part, or None where the data set has none.
        columns: names of the features of a table, which is standardised before use and may hold
            NaN; else empty.
    """

    x: Values
    y: Values
    classes: tuple[str, ...]
    group: Tensor | None = None
    groups: tuple[str, ...] = ()
    test: Any = None
    columns: tuple[str, ...] = ()


def check(examples: Examples, source: str) -> Examples:
    """Refuse a data set that training would stumble over, or whose names must not leave a site.

    Raises:
        SourceError: what does not fit together.
    """
    said = f"data.source = {shown(source)}"
    if not isinstance(examples, Examples):
        raise SourceError(f"{said} must return datasets.sources.Examples, it returned {type(examples).__name__}")
    x, y = examples.x, examples.y
    if not (isinstance(x, Tensor | Lazy) and isinstance(y, Tensor | Lazy)):
        raise SourceError(f"{said}: x and y must be tensors, they are {type(x).__name__}, {type(y).__name__}")
    n, labels = len(y), examples.classes != TOKEN
    if len(x) != n or len(x.shape) < 2 or (labels and isinstance(y, Tensor) and (y.dim() != 1 or y.dtype != torch.int64)):
        raise SourceError(
            f"{said}: x [n, ...] and y [n] must hold the same number of examples, and "
            f"y must be int64; got {tuple(x.shape)} and {tuple(y.shape)} of {getattr(y, 'dtype', None)}"
        )
    if n < FEWEST:
        raise SourceError(f"{said}: {n} examples are too few: at least {FEWEST}, to train on and to test on")
    if wrong := too_many(len(examples.classes)) or fault(examples.classes):
        raise SourceError(f"{said}, classes: {wrong}")
    if wrong := fault(examples.groups):
        raise SourceError(f"{said}, groups: {wrong}")
    if wrong := fault(examples.columns, LONGEST_COLUMN):
        raise SourceError(f"{said}, columns: {wrong}")
    if labels and isinstance(y, Tensor):
        _check_indices(said, "y", y, len(examples.classes))
    if examples.group is not None:
        if examples.group.shape != (n,) or examples.group.dtype != torch.int64:
            raise SourceError(f"{said}: group must be [{n}] int64")
        _check_indices(said, "group", examples.group, len(examples.groups))
    if examples.test is not None and (examples.test.shape != (n,) or examples.test.dtype != torch.bool):
        raise SourceError(f"{said}: test must be [{n}] bool")
    if examples.columns and tuple(x.shape) != (n, len(examples.columns)):
        raise SourceError(f"{said}: x must be [n, {len(examples.columns)}] like columns, it is {tuple(x.shape)}")
    _check_values(said, examples)
    return examples


def _check_indices(said: str, what: str, indices: Tensor, size: int) -> None:
    low, high = (int(each) for each in indices.aminmax())
    if not 0 <= low <= high < size:
        raise SourceError(f"{said}: {what} must lie between 0 and {size - 1}, it goes from {low} to {high}")


def _check_values(said: str, examples: Examples) -> None:
    x = examples.x
    if isinstance(x, Lazy) or x.dtype == torch.uint8 or not x.numel():
        return
    if examples.classes == TOKEN:
        if x.dtype != torch.int64 or not isinstance(examples.y, Tensor) or examples.y.dtype != torch.int64:
            raise SourceError(f"{said}: x and y of tokens must be int64")
        return
    if not x.is_floating_point():
        raise SourceError(f"{said}: x must be uint8 or float, it is {x.dtype}")
    if examples.columns:
        large = (x.abs() > LARGEST).any(0)  # NaN, a missing value, is not
        if large.any():
            column = examples.columns[int(large.int().argmax())]
            raise SourceError(f"{said}: column {shown(column)} holds values that are not within ±2^63")
    elif not all(abs(float(end)) <= LARGEST for end in x.aminmax()):
        raise SourceError(f"{said}: x holds values that are not within ±2^63")
