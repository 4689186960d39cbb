"""Examples that stay where they are until a batch needs them: data larger than memory."""

from collections.abc import Sized
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

Values = Any  # a tensor [n, ...], or a Lazy in its place
CPU = torch.device("cpu")


class Reader(Sized, Protocol):
    """What reads examples: x [b, ...] of some ``rows`` [b], and their y [b, ...] unless that is in memory."""

    def __getitem__(self, rows: Tensor, /) -> tuple[Tensor, Tensor | None]: ...


@dataclass(frozen=True)
class Lazy:
    """Stands in the place of a tensor [n, ...] that would be too large: it has its length and its shape.

    ``lazy[chosen]`` is the same of some rows, none of which is read yet. Of examples whose x and y are both read, x and y are
    two of these with one reader.

    Args:
        reader: reads several at once.
        rows: [n], those of the reader that are meant.
        example: the shape of one.
        device: where what is read goes.
    """

    reader: Reader
    rows: Tensor
    example: tuple[int, ...]
    device: torch.device = CPU

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """As of a tensor."""
        return len(self), *self.example

    def __getitem__(self, chosen: Tensor) -> "Lazy":
        return replace(self, rows=self.rows[chosen])

    def to(self, device: torch.device) -> "Lazy":
        """The same, read to there."""
        return replace(self, device=device)


def whole(reader: Reader, *examples: tuple[int, ...]) -> tuple[Lazy, ...]:
    """All that a reader reads; x and y, for the shapes of both."""
    rows = torch.arange(len(reader))
    return tuple(Lazy(reader, rows, example) for example in examples)


def read(x: Values, y: Values, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The ``chosen`` examples, on the device of ``x``."""
    if isinstance(x, Tensor):
        chosen = chosen.to(x.device)
        return x[chosen], y[chosen]
    return delivered(x, y, chosen, x.reader[x.rows[chosen]])


def delivered(x: Lazy, y: Values, chosen: Tensor, found: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
    """What was read of the ``chosen`` examples, with the labels that are in memory, on the device of ``x``."""
    inputs, labels = found
    if isinstance(y, Tensor):
        labels = y[chosen.to(y.device)]
    assert labels is not None
    return inputs.to(x.device, non_blocking=True), labels.to(x.device, non_blocking=True)
