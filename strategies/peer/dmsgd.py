"""DMSGD: heavy-ball momentum, and consensus on it too.

    q     = (1 - omega) p_i + omega sum_j w_ij p_j
    x_new = sum_j w_ij x_j - lr g_i(x_i) + beta q
    p_new = x_new - x_i                    position form: Polyak's heavy ball
          | beta q - lr g_i(x_i)           velocity form

Source: Balu et al., "Decentralized Deep Learning using Momentum-Accelerated Consensus", ICASSP 2021
(arXiv 2010.11166). **Reconstructed from its abstract and introduction** (neighbours exchange models
and momentum values) and from the code of the same group: which of the two forms is the paper's, and
that omega weighs the neighbours and not the peer itself, is not known.
Differs: with several local steps, momentum counts exchanges; both forms keep the learning rates of
past steps. With omega = 0 momentum is not sent.
Special cases: beta = 0 is CDSGD; velocity form, omega = 0 is CDMSGD; W = I is heavy ball, in both
forms.
Invariant: the mean of all peers moves the same whatever omega, W and the form.
Trap: in the position form, disagreement itself has momentum, and grows where W has eigenvalues far
below 0 or far from real ones: :func:`growth`.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from strategies.keys import Decay, PeerKeys
from strategies.method import Method, Neighbourhood, PeerPlan, Run
from strategies.peer.algorithm import PeerAlgorithm, Vectors
from strategies.topology import Topology, TopologyError


class HeavyBall(NamedTuple):
    """The model, the model of the last exchange, and the momentum."""

    x: Tensor
    start: Tensor
    p: Tensor


def dmsgd(*, beta: float, omega: float, velocity: bool) -> PeerAlgorithm[HeavyBall]:
    """DMSGD.

    Args:
        beta: momentum.
        omega: weight of the neighbourhood's momentum, from 0 (own only) to 1.
        velocity: the velocity form instead of the position form.
    """

    def init(x: Tensor) -> HeavyBall:
        return HeavyBall(x, x, torch.zeros_like(x))

    def descend(state: HeavyBall, gradient: Tensor, lr: float) -> HeavyBall:
        return state._replace(x=torch.sub(state.x, gradient, alpha=lr))

    def outgoing(state: HeavyBall) -> Vectors:
        return (state.start, state.p) if omega else (state.start,)

    def mix(state: HeavyBall, sent: Vectors, mixed: Vectors) -> HeavyBall:
        shared = torch.add(state.p, mixed[1] - sent[1], alpha=omega) if omega else state.p
        push = beta * shared
        x = (state.x + push).add_(mixed[0] - sent[0])
        return HeavyBall(
            x, x, push.add_(state.x).sub_(state.start) if velocity else x - state.start
        )

    return PeerAlgorithm(init, descend, outgoing, mix)


def growth(matrices: Sequence[Tensor], *, beta: float, omega: float) -> float:
    """The factor by which disagreement in the position form grows an exchange in the long run.

    Gradients are left out. Peers agree in the end if it is below 1. It is the spectral radius of
    ``(x, x_last) -> (W x + beta q, x)``, q as above, taken over all ``matrices`` in turn, each W
    [n, n] float64, on what is orthogonal to agreement.
    """
    n = len(matrices[0])
    apart = torch.eye(n, dtype=torch.float64) - 1 / n
    product = torch.eye(2 * n, dtype=torch.float64)
    for matrix in matrices:
        w = matrix @ apart
        momentum = beta * ((1 - omega) * apart + omega * w)
        product = (
            torch.cat(
                [
                    torch.cat([w + momentum, -momentum], 1),
                    torch.cat([apart, torch.zeros_like(w)], 1),
                ]
            )
            @ product
        )
    return float(torch.linalg.eigvals(product).abs().max() ** (1 / len(matrices)))


class Keys(PeerKeys):
    """The keys of DMSGD."""

    momentum: Decay = 0.9
    """beta"""
    consensus_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """omega, weight of the neighbourhood's momentum; 0: own momentum, 1: the neighbourhood's"""
    form: Literal["position", "velocity"] = "position"
    """position: Polyak's heavy ball; velocity: momentum of gradients"""


def plan(keys: Keys, run: Run) -> PeerPlan:
    """Heavy ball; refuse topologies on which disagreement would grow."""

    def check(topology: Topology, rate: float) -> None:
        if keys.form == "velocity":
            return
        mixing = [torch.lerp(torch.eye(len(w), dtype=w.dtype), w, rate) for w in topology.matrices]
        factor = growth(mixing, beta=keys.momentum, omega=keys.consensus_weight)
        if factor > 1 + 1e-6:
            raise TopologyError(
                f"dmsgd.momentum = {keys.momentum:g}, "
                f"dmsgd.consensus-weight = {keys.consensus_weight:g}: disagreement grows "
                f"by {factor:.3g} an exchange in dmsgd's position form on this topology; "
                "topology.lazy = true, dmsgd.form = 'velocity' or a smaller momentum may help"
            )

    algorithm = dmsgd(
        beta=keys.momentum, omega=keys.consensus_weight, velocity=keys.form == "velocity"
    )
    return PeerPlan(algorithm, Neighbourhood(rho=run.sam_radius), keys.local_steps, check)


METHOD = Method("dmsgd", Keys, plan)
