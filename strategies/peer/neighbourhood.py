"""Neighbourhood gradients: what NGM and N-SADDLe descend along instead of the own gradient.

    own              g_i = grad F_i(x_i)
    data variant     g_i = sum_j w_ij grad F_j(x_i)    the neighbours' gradients at the own model
    model variant    g_i = sum_j w_ij grad F_i(x_j)    the own gradients at the neighbours' models

The data variant needs a second exchange; for the model variant there is nothing more to send.

Source: Aketi et al., "Neighborhood Gradient Clustering" (NGM; arXiv 2209.14390); for N-SADDLe,
Choudhary, Aketi, Roy, WACV 2025 (arXiv 2405.13961), **reconstructed from the abstracts** and from
the code of the former. Differs from that code: every gradient is taken at the models of before the
exchange (theirs takes the own one after averaging), and weights are W's, not 1 / (deg + 1) (the
same on regular graphs). N-SADDLe makes each of these gradients sharpness-aware; where its
perturbation is taken is not known:

    owner-of-data    by whoever computes the gradient, with its own loss at the model it received
                     (the default)
    none             the own gradient only
    owner-of-model   by the peer whose model it is, with its own loss; neighbours receive the
                     perturbed model too

Special cases: W = I is the own gradient; equal models and exact gradients give the mean of the
neighbourhood's gradients.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from strategies.gradients import perturbed
from strategies.method import Neighbourhood

# Gradients and the models they were taken at, each [..., d], to gradients.
Regular = Callable[[Tensor, Tensor], Tensor]


class Gradients(NamedTuple):
    """The gradients of m pairs of a model and some peer's batch.

    Attributes:
        losses: [m].
        gradients: [m, d].
        stats: [m, b], BatchNorm statistics.
    """

    losses: Tensor
    gradients: Tensor
    stats: Tensor


class PairGradient(Protocol):
    """Plain gradients of pairs of a model and a batch."""

    def __call__(self, x: Tensor, rows: Tensor | None, /) -> Gradients:
        """At models ``x`` [k, d], of those of the m pairs that ``rows`` [k] names; None: of all."""
        ...


def neighbourhood_gradients(
    pair: PairGradient,
    x: Tensor,
    own: Tensor,
    gradient: Neighbourhood,
    regular: Regular,
    shift: Tensor | None = None,
) -> Gradients:
    """The gradients of m pairs: a batch of one peer or of all, at own and neighbours' models.

    Args:
        pair: takes the gradients.
        x: [m, d], the models; weight decay pulls from there.
        own: [m], whether model and batch are of the same peer.
        gradient: whose perturbation it is, and how far.
        regular: clipping and weight decay.
        shift: [m, d], how far a model's owner perturbed it; None where owners do not.

    Returns:
        Losses and statistics are those of the first pass, before any perturbation but the owner's.
    """
    points = x if shift is None else x + shift
    losses, g, stats = pair(points, None)
    if gradient.rho and (gradient.at == "own" or gradient.perturbed_by == "owner-of-data"):
        g = pair(perturbed(points, g, gradient.rho), None).gradients
    elif gradient.rho and gradient.perturbed_by == "none":
        rows = own.nonzero().flatten()
        g = g.index_copy(
            0, rows, pair(perturbed(points[rows], g[rows], gradient.rho), rows).gradients
        )
    return Gradients(losses, regular(g, x), stats)


def owners_shift(pair: PairGradient, x: Tensor, gradient: Neighbourhood) -> Tensor | None:
    """How far owners perturb their models ``x`` [m, d] by their own gradients; None: not at all."""
    if not gradient.rho or gradient.at == "own" or gradient.perturbed_by != "owner-of-model":
        return None
    return perturbed(x, pair(x, None).gradients, gradient.rho) - x


def weighted(own: Tensor, theirs: Mapping[int, Tensor], weights: Mapping[int, float]) -> Tensor:
    """``sum_j w_ij v_j``; the weight of a neighbour that sent nothing goes to the peer itself."""
    total = own * (1 - sum(weights[j] for j in theirs))
    for j, vector in theirs.items():
        total.add_(vector, alpha=weights[j])
    return total


def disagreement(own: Tensor, theirs: Mapping[int, Tensor], weights: Mapping[int, float]) -> float:
    """``sqrt(sum_j w_ij |x_j - x_i|^2)``: how far a peer is from its neighbours.

    It needs nobody to see all models.
    """
    squares = [weights[j] * torch.linalg.vector_norm(x - own) ** 2 for j, x in theirs.items()]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0
