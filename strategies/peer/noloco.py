"""NoLoCo: local steps, then an outer step with momentum with one other peer, another each time.

    D_i  = theta_i - x_i        minus what H local steps from theta_i added
    d_i  = alpha d_i - beta sum_j w_ij D_j - gamma (theta_i - sum_j w_ij theta_j)
    theta_i = theta_i + d_i;    x_i = theta_i

On the topology ``matching`` the sums are means of a pair, and nobody ever waits for more than one
other.

Source: "NoLoCo: No-all-reduce Low Communication Training Method for Large Models",
arXiv 2506.10911, **reconstructed**: the signs are those above, the paper's values of alpha, beta
and gamma are not known. Differs: local steps are SGD, with momentum of their own that an exchange
does not reset, where the paper takes Adam. Two vectors a message.
Special cases: alpha = 0, beta = gamma = 1 is D-PSGD with local steps; W = I is SGD with heavy ball
on the own D; complete graph and equal beginnings: one outer heavy ball for all.
Invariant: with gamma alone (beta = 0) the mean of all theta keeps still.
"""

from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from strategies.keys import Above0, Decay, NotNegative, PeerKeys, Positive
from strategies.method import Method, Neighbourhood, PeerPlan, Run
from strategies.peer.algorithm import PeerAlgorithm, Vectors


class Outer(NamedTuple):
    """The state of a peer: its model and its outer momentum.

    Attributes:
        x: the model.
        theta: the model of the last exchange.
        d: the outer momentum.
        v: the velocity of local steps; empty without momentum.
    """

    x: Tensor
    theta: Tensor
    d: Tensor
    v: Tensor


def noloco(
    *, alpha: float, beta: float, gamma: float, momentum: float = 0.0
) -> PeerAlgorithm[Outer]:
    """NoLoCo.

    Args:
        alpha: outer momentum.
        beta: outer learning rate.
        gamma: how far a peer goes to its partner's model.
        momentum: of the local steps.
    """

    def init(x: Tensor) -> Outer:
        zero = torch.zeros_like(x)
        return Outer(x, x, zero, zero if momentum else x.new_empty(0))

    def descend(state: Outer, gradient: Tensor, lr: float) -> Outer:
        if not momentum:
            return state._replace(x=torch.sub(state.x, gradient, alpha=lr))
        v = (state.v * momentum).sub_(gradient, alpha=lr)
        return state._replace(x=state.x + v, v=v)

    def outgoing(state: Outer) -> Vectors:
        return state.theta, state.theta - state.x

    def mix(state: Outer, sent: Vectors, mixed: Vectors) -> Outer:
        step = (state.theta - state.x) + (mixed[1] - sent[1])
        d = (alpha * state.d).sub_(step, alpha=beta).add_(mixed[0] - sent[0], alpha=gamma)
        theta = state.theta + d
        return Outer(theta, theta, d, state.v)

    return PeerAlgorithm(init, descend, outgoing, mix)


class Keys(PeerKeys):
    """The keys of NoLoCo."""

    local_steps: Positive = 10
    """batches between two exchanges"""
    alpha: Decay = 0.5
    """outer momentum"""
    beta: Above0 = 0.7
    """outer learning rate"""
    gamma: Annotated[NotNegative, Field(le=2)] = 0.9
    """how far a peer goes to its partner's model"""
    momentum: Decay = 0.0
    """of the local steps"""


def plan(keys: Keys, run: Run) -> PeerPlan:
    """Adapt, then combine with momentum."""
    algorithm = noloco(alpha=keys.alpha, beta=keys.beta, gamma=keys.gamma, momentum=keys.momentum)
    return PeerPlan(algorithm, Neighbourhood(rho=run.sam_radius), keys.local_steps)


METHOD = Method("noloco", Keys, plan)
