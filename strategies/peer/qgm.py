"""QGM, quasi-global momentum: momentum fed by how the model moved across an exchange.

    m      = beta m_hat + g
    x_half = x - lr m, or with Nesterov x - lr (g + beta m)
    x_new  = sum_j w_ij x_half_j
    m_hat  = mu m_hat + (1 - mu) (x - x_new) / lr

Source: Lin, Karimireddy, Stich, Jaggi, "Quasi-global momentum", ICML 2021 (there QG-DSGDm), and its
code. Differs: with several local steps, the move is divided by the sum of their learning rates.
Special cases: beta = mu = 0 is D-PSGD; W = I is SGD with quasi-hyperbolic momentum.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from strategies.keys import Decay, MomentumKeys, PeerKeys
from strategies.method import Method, Neighbourhood, PeerPlan, Run
from strategies.peer.algorithm import PeerAlgorithm, Vectors


class Quasi(NamedTuple):
    """The state of a peer: its model and its quasi-global momentum.

    Attributes:
        x: the model.
        start: the model of the last exchange.
        m_hat: the quasi-global momentum.
        lr: [1], the sum of learning rates since that exchange.
    """

    x: Tensor
    start: Tensor
    m_hat: Tensor
    lr: Tensor


def qgm(*, beta: float, mu: float, nesterov: bool) -> PeerAlgorithm[Quasi]:
    """Quasi-global momentum.

    Args:
        beta: of the momentum in a step.
        mu: decay of the quasi-global momentum; the authors take beta = mu.
        nesterov: look ahead.
    """

    def init(x: Tensor) -> Quasi:
        return Quasi(x, x, torch.zeros_like(x), x.new_zeros(1))

    def descend(state: Quasi, gradient: Tensor, lr: float) -> Quasi:
        m = torch.add(gradient, state.m_hat, alpha=beta)
        step = m.mul_(beta).add_(gradient) if nesterov else m
        return state._replace(x=torch.sub(state.x, step, alpha=lr), lr=state.lr + lr)

    def outgoing(state: Quasi) -> Vectors:
        return (state.x,)

    def mix(state: Quasi, sent: Vectors, mixed: Vectors) -> Quasi:
        x = state.x + (mixed[0] - sent[0])
        # Without a local step in between nothing moved by a gradient, and nothing is learned from
        # the move.
        moved = torch.where(
            state.lr > 0,
            (state.start - x) / state.lr.clamp_min(torch.finfo(x.dtype).tiny),
            state.m_hat,
        )
        return Quasi(x, x, torch.lerp(moved, state.m_hat, mu), torch.zeros_like(state.lr))

    return PeerAlgorithm(init, descend, outgoing, mix)


class Keys(PeerKeys, MomentumKeys):
    """The keys of QGM."""

    decay: Decay = 0.9
    """mu of the quasi-global momentum; the authors take that of momentum"""


def plan(keys: Keys, run: Run) -> PeerPlan:
    """Adapt, then combine."""
    algorithm = qgm(beta=keys.momentum, mu=keys.decay, nesterov=keys.nesterov)
    return PeerPlan(algorithm, Neighbourhood(rho=run.sam_radius), keys.local_steps)


METHOD = Method("qgm", Keys, plan)
