"""The golden problem of docs/explanation/golden-values.md.

Five peers on a ring, weights 1/3, quadratics, exact gradients, float64:

    F_i(x) = sum_k h_ik (x_k - b_ik)^2 / 2

And two ways to run peers on it: :func:`lockstep` calls the steps that the app runs, with
dictionaries in the place of messages; :func:`gossip_round` is an algorithm's exchange in the open,
for tests of many rounds.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from strategies.codecs import Payload, identity
from strategies.gradients import regularised
from strategies.method import PeerPlan
from strategies.peer.algorithm import PeerAlgorithm, exchange
from strategies.peer.channel import Channel, channel
from strategies.peer.state import Metrics, Oracle, Order, Peer, PeerState, Received
from strategies.peer.step import begin, cross_step, models_step
from strategies.topology import topology

Algorithm = PeerAlgorithm[Any]
EXACT = channel(identity(), "none")


def ring(n: int) -> Tensor:
    """W [n, n] of a ring."""
    return topology(
        "ring", n, weights="metropolis", lazy=False, degree=4, stride=4, edges="", seed=1
    ).mixing(0)


N, LR = 5, 0.1
RING = ring(N)
B = torch.stack([torch.arange(N), -torch.arange(N)], 1).double()
H = torch.tensor([[1.0, 2.0], [2.0, 1.0]] * 2 + [[1.0, 2.0]], dtype=torch.float64)
OPTIMUM = torch.tensor([2.0, -2.0], dtype=torch.float64)
ORIGIN = torch.zeros(N, 2, dtype=torch.float64)


def gradient(x: Tensor) -> Tensor:
    """The gradient of every peer at its own model: [n, 2] to [n, 2]."""
    return H * (x - B)


class Quadratic(NamedTuple):
    """The oracle of a peer."""

    h: Tensor
    b: Tensor

    def gradient(self, x: Tensor, stats: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """The exact gradient; every batch is the same."""
        return (self.h * (x - self.b) ** 2).sum() / 2, self.h * (x - self.b), stats

    def test(self, x: Tensor, stats: Tensor) -> Metrics:
        """No metrics."""
        return {}


ORACLES = [Quadratic(h, b) for h, b in zip(H, B, strict=True)]


def lockstep(
    plan: PeerPlan,
    exchanges: int,
    mixing: Tensor | Sequence[Tensor] = RING,
    x: Tensor = ORIGIN,
    *,
    oracles: Sequence[Oracle] = ORACLES,
    way: Channel = EXACT,
    cross: Channel = EXACT,
    averaging_rate: float = 1.0,
    lr: float = LR,
    weight_decay: float = 0.0,
) -> list[PeerState]:
    """What peers remember after so many exchanges from models ``x`` [n, d].

    ``mixing`` is W, or several in turn.
    """
    matrices = [mixing] if isinstance(mixing, Tensor) else mixing

    def regular(g: Tensor, at: Tensor) -> Tensor:
        return regularised(g, at, clip_norm=0.0, weight_decay=weight_decay)

    peers = [
        Peer(plan, way, cross, regular, averaging_rate, number=i, seed=1) for i in range(len(x))
    ]
    states = [begin(peer, row, row.new_empty(0)) for peer, row in zip(peers, x, strict=True)]
    offers: list[Mapping[int | None, Payload]] = [{} for _ in peers]
    messages = plan.gradient.messages
    for step in range(exchanges * messages + 1):
        results = []
        for i, (peer, state) in enumerate(zip(peers, states, strict=True)):
            row = matrices[max(step - 1, 0) // messages % len(matrices)][i].tolist()
            neighbours = {j: w for j, w in enumerate(row) if step and w and j != i}
            readers = tuple(neighbours) or tuple(
                j for j in range(len(x)) if matrices[0][j, i] and j != i
            )
            order = Order(step, neighbours, lr, readers=readers, last=step == exchanges * messages)
            received = [
                Received(j, step - 1, payload)
                for j in neighbours
                for reader, payload in offers[j].items()
                if reader in (None, i)
            ]
            take = cross_step if messages == 2 and step % 2 else models_step
            results.append(take(peer, state, received, order, oracles[i]))
            assert results[-1].refused == ()
        states, offers = [result.state for result in results], [result.offers for result in results]
    return states


def models(states: Sequence[PeerState]) -> Tensor:
    """The models of all peers, [n, d]."""
    return torch.stack([state.x for state in states])


def gossip_round(
    algorithm: PeerAlgorithm[Any],
    state: Any,
    grad: Callable[[Tensor], Tensor],
    lr: float,
    mixing: Tensor,
) -> Any:
    """One local step and one exchange of all n peers.

    ``state`` holds [n, d], ``grad`` goes from [n, d] to [n, d].
    """
    state = algorithm.descend(state, grad(state.x), lr)
    sent = algorithm.outgoing(state)
    return exchange(
        algorithm, state, sent, tuple(mixing.to(vector) @ vector for vector in sent), 1.0
    )
