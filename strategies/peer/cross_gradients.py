"""Neighbourhood gradients: what NGM and N-SADDLe descend along instead of the own gradient.

    data variant     g_i = sum_j w_ij grad F_j(x_i)        the neighbours' gradients at the own model: a second exchange
    model variant    g_i = sum_j w_ij grad F_i(x_j)        the own gradients at the neighbours' models: nothing more to send

Source: Aketi et al., "Neighborhood Gradient Clustering" (NGM; arXiv 2209.14390); for N-SADDLe, Choudhary, Aketi, Roy, WACV 2025
(arXiv 2405.13961), **reconstructed from the abstracts** and from the code of the former. Differs from that code: every gradient is
taken at the models of before the exchange (theirs takes the own one after averaging), and weights are W's, not 1 / (deg + 1) (the
same on regular graphs). N-SADDLe makes each of these gradients sharpness-aware; where its perturbation is taken is not known:

    owner-of-data    by whoever computes the gradient, with its own loss at the model it received (the default)
    none             the own gradient only
    owner-of-model   by the peer whose model it is, with its own loss; neighbours receive the perturbed model too

Special cases: W = I is the own gradient; equal models and exact gradients give the mean of the neighbourhood's gradients.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

VARIANTS = ("data", "model")
PERTURBATIONS = ("owner-of-data", "none", "owner-of-model")
SMALL = 1e-12


class PairGradient(Protocol):
    """Gradients [m, d] at models ``x`` [m, d], each with the loss of the peer ``owner`` [m]."""

    def __call__(self, x: Tensor, owner: Tensor, /) -> Tensor: ...


def perturbed(x: Tensor, gradient: Tensor, rho: float) -> Tensor:
    """``x + rho g / |g|``, each [..., d]."""
    norm: Tensor = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
    return x + gradient * (rho / (norm + SMALL))


def cross_gradients(
    pair: PairGradient,
    x: Tensor,
    received: Tensor,
    mixing: Tensor,
    *,
    variant: str,
    rho: float,
    perturbation: str,
    carry: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """The neighbourhood gradients of all peers at once, [n, d].

    Args:
        pair: gradients of one peer's loss at another one's model.
        x: [n, d], the peers' models.
        received: [n, d], the same as their neighbours decode them.
        mixing: W [n, n].
        variant: one of ``VARIANTS``.
        rho: SAM radius; 0 for NGM.
        perturbation: one of ``PERTURBATIONS``.
        carry: what arrives of gradients [m, d] that peers ``owner`` [m] took for peers ``model`` [m]; without it, all of it.
    """
    i, j = mixing.nonzero(as_tuple=True)
    model, owner = (i, j) if variant == "data" else (j, i)
    own = (i == j)[:, None]
    points = torch.where(own, x[model], received[model])
    if rho and perturbation == "owner-of-model":
        everybody = torch.arange(len(x), device=x.device)
        shift = perturbed(x, pair(x, everybody), rho) - x
        points = points + shift[model]
    gradients = pair(points, owner)
    if rho and perturbation == "owner-of-data":
        gradients = pair(perturbed(points, gradients, rho), owner)
    elif rho and perturbation == "none":
        gradients = torch.where(own, pair(torch.where(own, perturbed(points, gradients, rho), points), owner), gradients)
    if carry:
        gradients = carry(gradients, owner, model)
    weights = mixing[i, j].to(x)[:, None]
    return torch.zeros_like(x).index_add_(0, i, weights * gradients)
