"""Learning rates as functions of the fraction of a cycle that is done.

    exponential   eta(u) = eta_max r^u
    linear        eta(u) = eta_max (1 - (1 - r) u)
    cosine        eta(u) = eta_max (r + (1 - r) (1 + cos(pi u)) / 2)

``r`` is the rate at the end of the cycle over the rate at its start; every shape starts at
``eta_max`` and ends at ``r eta_max``. With warm-up over a fraction ``w`` of the cycle the rate
rises linearly: a step that ends at ``u`` has ``u / w`` of ``eta_max``, so that the first is not 0.
Then the shape goes over the rest.

Source: the cyclical rate of Xu et al., "Collaborative Deep Learning Across Multiple Data Centers"
(arXiv 1810.06877), of which only the abstract could be read: the shapes are reconstructed. Linear
is the cycle of SWA (Izmailov et al. 2018), which that paper cites; cosine is SGDR (Loshchilov and
Hutter 2017, eq. 5).
"""

import math
from collections.abc import Callable


def warm(warmup: float, u: float, after: float) -> float:
    """The warm-up factor of a rate in a step from fraction ``u`` of the cycle to ``after``.

    With ``warmup`` = 0 it is 1.
    """
    return min(1.0, after / warmup) if u < warmup else 1.0


def decay(shape: str, ratio: float, u: float, warmup: float = 0.0) -> float:
    """The factor of the starting rate when a fraction ``u`` in [0, 1] of the cycle is done.

    The fraction includes the warm-up.
    """
    u = max(0.0, u - warmup) / (1 - warmup)
    match shape:
        case "exponential":
            return float(ratio**u)
        case "linear":
            return 1 - (1 - ratio) * u
        case "cosine":
            return ratio + (1 - ratio) * (1 + math.cos(math.pi * u)) / 2
    raise ValueError(f"shape {shape!r}: exponential, linear or cosine")


def progress(step: int, steps: int, epoch: int, every: str) -> float:
    """Fraction of a round of ``steps`` batches that is done before its batch ``step``.

    An epoch has ``epoch`` batches. ``every`` is "batch" or "epoch"; by epoch, the rate stands still
    inside an epoch.
    """
    return step / steps if every == "batch" else step // epoch * epoch / steps


def rates(
    lr: float,
    shape: str,
    ratio: float,
    every: str,
    cycle: tuple[float, float],
    *,
    steps: int,
    epoch: int,
    warmup: float = 0.0,
) -> Callable[[int], float]:
    """The learning rate before each batch of a site's ``steps``, counted from 0.

    Args:
        lr: the rate at the start of a cycle, after warm-up.
        shape: of :func:`decay`.
        ratio: of :func:`decay`.
        every: of :func:`progress`.
        cycle: fractions of the cycle at the first batch and after the last.
        steps: batches in all.
        epoch: batches an epoch.
        warmup: of :func:`warm`, always by batch.
    """
    start, stop = cycle

    def rate(step: int) -> float:
        before, after = (start + (stop - start) * each / steps for each in (step, step + 1))
        u = start + (stop - start) * progress(step, steps, epoch, every)
        return lr * warm(warmup, before, after) * decay(shape, ratio, u, warmup)

    return rate
