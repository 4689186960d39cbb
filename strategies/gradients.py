"""What is done to a gradient before it is followed.

Every function takes vectors [..., d] and reduces over the last axis only: one model's [d], or all
peers' [n, d]. Inputs are never written.
"""

import torch
from torch import Tensor

SMALL = 1e-12
MEND = "a smaller training.lr, training.clip-norm above 0 or a model.norm may help"


class Diverged(ValueError):
    """Training diverged: a loss or a parameter is not finite."""

    def __init__(self, what: str) -> None:
        super().__init__(f"training diverged: {what}; {MEND}")


def perturbed(x: Tensor, gradient: Tensor, rho: float, norm: Tensor | None = None) -> Tensor:
    """``x + rho g / |g|``: the worst point near by, to first order.

    Source: Foret et al., "Sharpness-Aware Minimization", ICLR 2021, equation 2; one norm over all
    parameters. ``norm`` is |g| where ``gradient`` is a part of g.
    """
    if norm is None:
        norm = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
    return x + gradient * (rho / (norm + SMALL))


def regularised(gradient: Tensor, x: Tensor, *, clip_norm: float, weight_decay: float) -> Tensor:
    """The gradient cut to a Euclidean norm of ``clip_norm`` (0: not), then ``+ weight_decay x``."""
    if clip_norm:
        norm: Tensor = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
        gradient = gradient * (clip_norm / (norm + 1e-6)).clamp(max=1)
    return torch.add(gradient, x, alpha=weight_decay)
