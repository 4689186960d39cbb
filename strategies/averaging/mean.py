"""Weighted mean of vectors that arrive one by one, bit for bit the same in whatever order.

    mean = sum_k s_k x_k / sum_k s_k

Sums of floating-point numbers depend on their order; sums of integers do not. Each ``s_k x_k`` is
therefore cut to a multiple of 2^-40 (9e-13) and added to a 64-bit integer. The shares ``s_k`` sum
to at most 1, so the sum cannot overflow while ``|x| < 2^22``, which :func:`fault` makes sure. A
mean over K sites differs from the exact one by at most K 2^-40, then it is rounded to float32,
whose own step is larger for every value above 1.5e-5.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

ONE = 2.0**40
LARGEST = 2.0**22
# Elements worked on at a time: the two scratch buffers (4 MiB) stay in the processor's cache.
_BLOCK = 1 << 18


def fault(x: Tensor) -> str | None:
    """Why ``x`` (any shape, on the CPU) cannot be averaged, or None where it can."""
    return too_large(magnitude(x))


def magnitude(x: Tensor) -> float:
    """The largest magnitude in ``x`` (any shape, on the CPU), NaN if it holds one, 0 of nothing."""
    return extent(x.reshape(-1), norm=False)[0]


def too_large(largest: float) -> str | None:
    """Why a vector of this largest magnitude (NaN if it holds one) cannot be averaged, or None."""
    if not math.isfinite(largest):
        return "the model holds NaN or infinite values"
    if largest >= LARGEST:
        return (
            f"the model diverged: it holds {largest:.3g}, the largest value taken is {LARGEST:.3g}"
        )
    return None


def extent(x: Tensor, origin: Tensor | None = None, *, norm: bool = True) -> tuple[float, float]:
    """The largest magnitude in ``x`` [d] (NaN if it holds one), and ``|x - origin|``.

    Without an origin, the norm is ``|x|``. Both in one pass over memory: a block stays in the
    cache.
    """
    if not x.numel():
        return 0.0, 0.0
    largest, squares = [], []
    origins = x.split(_BLOCK) if origin is None else origin.split(_BLOCK)
    scratch = x.new_empty(min(_BLOCK, x.numel()))
    for block, start in zip(x.split(_BLOCK), origins, strict=True):
        here = scratch[: block.numel()]
        largest.append(torch.abs(block, out=here).amax())
        if norm:
            moved = block if origin is None else torch.sub(block, start, out=here)
            squares.append(torch.dot(moved, moved))
    return torch.stack(largest).amax().item(), math.sqrt(
        math.fsum(square.item() for square in squares)
    )


def relative_change(new: Tensor, old: Tensor) -> float:
    """``|x' - x| / |x|``, Euclidean norms over all trainable parameters [d].

    In blocks, so that no third vector is needed.
    """
    moved = size = 0.0
    for a, b in zip(new.split(1 << 18), old.split(1 << 18), strict=True):
        moved += torch.dist(a, b).item() ** 2
        size += torch.linalg.vector_norm(b).item() ** 2
    return math.sqrt(moved) / (math.sqrt(size) + 1e-12)


class StreamingMean:
    """Keeps one 64-bit integer a coordinate.

    With the vector being added, that is the memory of three float32 models.
    """

    def __init__(self, shape: torch.Size) -> None:
        self._sum = torch.empty(shape.numel(), dtype=torch.int64)
        self._shares: list[float] = []
        self._shape = shape
        block = min(_BLOCK, self._sum.numel())
        self._scaled, self._whole = (
            torch.empty(block, dtype=torch.float64),
            torch.empty(block, dtype=torch.int64),
        )

    def add(self, x: Tensor, share: float) -> None:
        """Add ``x`` (float32, the mean's shape) with a share in (0, 1]; all together at most 1."""
        first = not self._shares
        for source, target in zip(
            x.reshape(-1).split(_BLOCK), self._sum.split(_BLOCK), strict=True
        ):
            product = self._scaled[: source.numel()].copy_(source).mul_(share * ONE)
            if first:
                target.copy_(product)
            else:
                target.add_(self._whole[: source.numel()].copy_(product))
        self._shares.append(share)

    @property
    def share(self) -> float:
        """The sum of the weights that were added."""
        return math.fsum(self._shares)

    def result(self) -> Tensor:
        """The mean of what was added, float32.

        It is the end of this object, whose memory becomes the mean's.

        Raises:
            ValueError: nothing was added.
        """
        if not self._shares:
            raise ValueError("the mean of nothing")
        total = math.fsum(self._shares) * ONE
        # A block of the mean ends before the integers still to be read.
        mean = self._sum.view(torch.float32)[: self._sum.numel()]
        for source, target in zip(self._sum.split(_BLOCK), mean.split(_BLOCK), strict=True):
            target.copy_(self._scaled[: source.numel()].copy_(source).div_(total))
        return mean.reshape(self._shape)


def weighted_mean(rows: Sequence[Mapping[str, float]], weight: str) -> dict[str, float]:
    """Means of the sites' metrics by ``weight``, which are summed; {} of no sites.

    They do not depend on the order of the sites.
    A metric that some keep to themselves is the mean over the others.
    """
    means = {}
    for key in dict.fromkeys(key for row in rows for key in row if key != weight):
        known = [row for row in rows if key in row]
        means[key] = math.fsum(row[weight] * row[key] for row in known) / math.fsum(
            row[weight] for row in known
        )
    return {**means, weight: math.fsum(row[weight] for row in rows)} if rows else {}
