"""Learning rates as functions of the fraction of a cycle that is done.

    exponential   eta(u) = eta_max r^u
    linear        eta(u) = eta_max (1 - (1 - r) u)
    cosine        eta(u) = eta_max (r + (1 - r) (1 + cos(pi u)) / 2)

``r`` is the rate at the end of the cycle over the rate at its start; every shape starts at ``eta_max`` and ends at ``r eta_max``.

Source: the cyclical rate of Xu et al., "Collaborative Deep Learning Across Multiple Data Centers" (arXiv 1810.06877), of which
only the abstract could be read: the shapes are reconstructed. Linear is the cycle of SWA (Izmailov et al. 2018), which that
paper cites; cosine is SGDR (Loshchilov and Hutter 2017, eq. 5).
"""

import math
from collections.abc import Callable


def decay(shape: str, ratio: float, u: float) -> float:
    """What the starting rate is multiplied with when a fraction ``u`` in [0, 1] of the cycle is done."""
    match shape:
        case "exponential":
            return float(ratio**u)
        case "linear":
            return 1 - (1 - ratio) * u
        case "cosine":
            return ratio + (1 - ratio) * (1 + math.cos(math.pi * u)) / 2
    raise ValueError(f"shape {shape!r}: exponential, linear or cosine")


def progress(step: int, steps: int, epoch: int, every: str) -> float:
    """Fraction of a round of ``steps`` batches done before its batch ``step``; an epoch has ``epoch`` batches.

    ``every`` is "batch" or "epoch"; by epoch, the rate stands still inside an epoch.
    """
    return step / steps if every == "batch" else step // epoch * epoch / steps


def rates(
    lr: float, shape: str, ratio: float, every: str, cycle: tuple[float, float], *, steps: int, epoch: int
) -> Callable[[int], float]:
    """The learning rate before each batch of a site's ``steps``, counted from 0.

    Args:
        lr: the rate at the start of a cycle.
        shape, ratio: of :func:`decay`.
        every: of :func:`progress`.
        cycle: fractions of the cycle at the first batch and after the last.
        steps: batches in all.
        epoch: batches an epoch.
    """
    start, stop = cycle
    return lambda step: lr * decay(shape, ratio, start + (stop - start) * progress(step, steps, epoch, every))
