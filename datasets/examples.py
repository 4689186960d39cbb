"""A data set, in memory or read when it is needed, and what must hold of one."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from datasets.errors import SourceError
from datasets.lazy import IGNORED, Lazy, Values
from datasets.names import LONGEST_COLUMN, fault, listed, shown, too_many
from datasets.partitions import FEWEST

# In the place of classes, where examples are windows of language: nothing to count.
TOKEN = ("token",)
TARGETS = {
    "class": "y [n] int64, a class each",
    "labels": "y [n, labels] of 0 and 1",
    "numbers": "y [n, numbers], floats within ±2^63",
    "tokens": "tokens",
    "map": "pictures and y [n, height, width] int64, a class for each pixel",
}
LARGEST = 2.0**63  # of a table's values: a float32 holds its square, and so every variance


class Examples(NamedTuple):
    """A data set. A function of one's own returns it; only the first three are needed.

    Attributes:
        x: a tensor, or a map-style torch ``Dataset`` of x or (x, y), read when a batch needs it
            (random transforms: of torch's generator), or an ``IterableDataset`` of (x, y) with a
            length, read from its beginning in each epoch, in the same order each time; beside that
            y is None and test a map-style ``Dataset``. Of all examples:
            [n, channels, height, width] pictures, uint8 from 0 to 255 or float; or [n, features],
            float; or [n, context] tokens, int64. Floats lie within ±2^63.
        y: by the task (``training.task``), see ``TARGETS``: [n] int64, indices into ``classes``; of
            tokens [n, context] int64, each the one after. None: the items of x hold it.
        classes: names of the classes, labels or numbers, at most 100, each of at most 64 printable
            characters: they leave the site. ``("token",)`` of tokens.
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


def check(examples: Examples, source: str, target: str = "class") -> Examples:
    """Refuse a data set that training would stumble over, or whose names must not leave a site.

    Args:
        examples: what was read.
        source: from where.
        target: what y must be, a key of ``TARGETS``.

    Raises:
        SourceError: what does not fit together.
    """
    key = f"data.source = {shown(source)}"
    if not isinstance(examples, Examples):
        raise SourceError(
            f"{key} must return datasets.sources.Examples, it returned {type(examples).__name__}"
        )
    x, y = examples.x, examples.y
    if not (isinstance(x, Tensor | Lazy) and isinstance(y, Tensor | Lazy)):
        raise SourceError(
            f"{key}: x and y must be tensors, they are {type(x).__name__}, {type(y).__name__}"
        )
    n = len(y)
    if len(x) != n or len(x.shape) < 2:
        raise SourceError(
            f"{key}: x [n, ...] and y [n, ...] must hold the same number of examples; "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if n < FEWEST:
        raise SourceError(
            f"{key}: {n} examples are too few: at least {FEWEST}, to train on and to test on"
        )
    if wrong := too_many(len(examples.classes)) or fault(examples.classes):
        raise SourceError(f"{key}, classes: {wrong}")
    if wrong := fault(examples.groups):
        raise SourceError(f"{key}, groups: {wrong}")
    if wrong := fault(examples.columns, LONGEST_COLUMN):
        raise SourceError(f"{key}, columns: {wrong}")
    _check_target(key, examples, target)
    if examples.group is not None:
        if examples.group.shape != (n,) or examples.group.dtype != torch.int64:
            raise SourceError(f"{key}: group must be [{n}] int64")
        _check_indices(key, "group", examples.group, len(examples.groups))
    if examples.test is not None and (
        examples.test.shape != (n,) or examples.test.dtype != torch.bool
    ):
        raise SourceError(f"{key}: test must be [{n}] bool")
    if examples.columns and tuple(x.shape) != (n, len(examples.columns)):
        raise SourceError(
            f"{key}: x must be [n, {len(examples.columns)}] like columns, it is {tuple(x.shape)}"
        )
    _check_values(key, examples)
    return examples


def _check_target(key: str, examples: Examples, target: str) -> None:
    """Check that y is what the task of the run needs."""
    x, y, size = examples.x, examples.y, len(examples.classes)
    if (examples.classes == TOKEN) != (target == "tokens"):
        there = (
            "tokens; allowed: training.task = 'language'"
            if examples.classes == TOKEN
            else f"classes {listed(examples.classes)}"
        )
        raise SourceError(
            f"{key}: training.task needs {TARGETS[target]}, the examples have {there}"
        )
    if not isinstance(y, Tensor):  # looked at when it is read
        if target == "numbers":  # whose mean and deviation are needed before
            raise SourceError(f"{key}: numbers to predict come as a tensor y, not with each item")
        return
    match target:
        case "class":
            fits = y.dim() == 1 and y.dtype == torch.int64
        case "labels":
            fits = tuple(y.shape) == (len(x), size) and bool(((y == 0) | (y == 1)).all())
        case "numbers":
            # Written so that NaN does not fit.
            fits = (
                tuple(y.shape) == (len(x), size)
                and y.is_floating_point()
                and bool((y.abs() <= LARGEST).all())
            )
        case "tokens":
            fits = y.shape == x.shape and y.dtype == torch.int64
        case "map":
            fits = (
                tuple(y.shape) == (len(x), *x.shape[2:])
                and len(x.shape) == 4
                and y.dtype == torch.int64
            )
    if not fits:
        raise SourceError(
            f"{key}: training.task needs {TARGETS[target]}; got y {tuple(y.shape)} of {y.dtype}"
        )
    if target == "class":
        _check_indices(key, "y", y, size)
    elif target == "map":
        _check_indices(key, "y", y[y != IGNORED], size)


def _check_indices(key: str, what: str, indices: Tensor, size: int) -> None:
    if not indices.numel():
        return
    low, high = (int(each) for each in indices.aminmax())
    if not 0 <= low <= high < size:
        raise SourceError(
            f"{key}: {what} must lie between 0 and {size - 1}, it goes from {low} to {high}"
        )


def _check_values(key: str, examples: Examples) -> None:
    x = examples.x
    if isinstance(x, Lazy) or x.dtype == torch.uint8 or not x.numel():
        return
    if examples.classes == TOKEN:
        if (
            x.dtype != torch.int64
            or not isinstance(examples.y, Tensor)
            or examples.y.dtype != torch.int64
        ):
            raise SourceError(f"{key}: x and y of tokens must be int64")
        return
    if not x.is_floating_point():
        raise SourceError(f"{key}: x must be uint8 or float, it is {x.dtype}")
    if examples.columns:
        large = (x.abs() > LARGEST).any(0)  # NaN, a missing value, is not
        if large.any():
            column = examples.columns[int(large.int().argmax())]
            raise SourceError(
                f"{key}: column {shown(column)} holds values that are not within ±2^63"
            )
    elif not all(abs(float(end)) <= LARGEST for end in x.aminmax()):
        raise SourceError(f"{key}: x holds values that are not within ±2^63")
