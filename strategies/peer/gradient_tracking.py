"""Gradient tracking: each peer follows its estimate of everybody's mean gradient.

It reaches the common optimum on unlike data.

    y = y_mixed + g(x) - g_previous                  y_mixed = 0, g_previous = 0 at first
    adapt, then combine      x = sum_j w_ij (x_j - lr y_j)
    combine while adapting   x = sum_j w_ij x_j - lr y
    y_mixed = sum_j w_ij y_j

Sources: Di Lorenzo and Scutari 2016; Nedic, Olshevsky, Shi, SIAM J. Optim. 2017; the code of Vogels
et al., "RelaySum", 2021 (adapt first) and of Lin et al. 2021 (combine while adapting). Differs:
none known. Two vectors a message.
Special case: W = I is gradient descent.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from strategies.keys import PeerKeys
from strategies.method import Method, Neighbourhood, PeerPlan, Run
from strategies.peer.algorithm import PeerAlgorithm, Vectors


class Tracking(NamedTuple):
    """The state of a peer that tracks the mean gradient.

    Attributes:
        x: the model.
        start: the model of the last exchange; empty when adapting first.
        y: the tracker.
        g: the last gradient.
    """

    x: Tensor
    start: Tensor
    y: Tensor
    g: Tensor


def gradient_tracking(*, adapt_first: bool) -> PeerAlgorithm[Tracking]:
    """Gradient tracking; ``adapt_first`` as in :func:`strategies.peer.dsgd.dsgd`."""

    def init(x: Tensor) -> Tracking:
        zero = torch.zeros_like(x)
        return Tracking(x, x.new_empty(0) if adapt_first else x, zero, zero)

    def descend(state: Tracking, gradient: Tensor, lr: float) -> Tracking:
        y = (state.y + gradient).sub_(state.g)
        return state._replace(x=torch.sub(state.x, y, alpha=lr), y=y, g=gradient)

    def outgoing(state: Tracking) -> Vectors:
        return state.x if adapt_first else state.start, state.y

    def mix(state: Tracking, sent: Vectors, mixed: Vectors) -> Tracking:
        x = state.x + (mixed[0] - sent[0])
        return Tracking(
            x, state.start if adapt_first else x, state.y + (mixed[1] - sent[1]), state.g
        )

    return PeerAlgorithm(init, descend, outgoing, mix)


class Keys(PeerKeys):
    """The keys of gradient tracking: those of every peer."""


def plan(keys: Keys, run: Run) -> PeerPlan:
    """Adapt, then combine; trackers would carry on every error of a codec."""
    algorithm = gradient_tracking(adapt_first=True)
    return PeerPlan(
        algorithm, Neighbourhood(rho=run.sam_radius), keys.local_steps, accumulates_errors=True
    )


METHOD = Method("gradient-tracking", Keys, plan)
