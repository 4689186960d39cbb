"""RelaySGD: peers on a tree relay sums of models, so each reaches everybody, undiluted and once.

    x_half  = x - lr g                                       or a step with momentum of one's own
    s_ij    = x_half_i + sum_{k in N_i, k != j} s_ki         s_ki, c_ki of the last exchange
    c_ij    = 1 + sum_{k in N_i, k != j} c_ki
    x_i     = (1/n) (sum_{j in N_i} s_ji + (n - sum_{j in N_i} c_ji) x_half_i)

with s_ji and c_ji of this exchange in the last line.

Peer i offers neighbour j the sum ``s_ij`` of the models on its own side of their link, and how many
they are. What has not arrived yet counts as the own model: that of a peer at distance t arrives in
t exchanges.

Source: Vogels, He, Koloskova, Karimireddy, Lin, Stich, Jaggi, "RelaySum for Decentralized Deep
Learning on Heterogeneous Data", NeurIPS 2021, algorithm 1, and its code. Differs: where a neighbour
sends nothing, its whole side counts as the own model, for as long as that lasts. BatchNorm
statistics are averaged with neighbours, by the mixing matrix.
Special cases: two peers average exactly, and with equal data are SGD; once as many exchanges are
over as the tree is wide, every peer's model counts 1/n. Trap: on a wide tree models arrive late,
and even with equal data it is not SGD but slower, by the mean distance; the authors take a larger
rate there.
"""

from collections.abc import Mapping
from typing import NamedTuple

import networkx as nx
import torch
from torch import Tensor

from strategies.keys import Decay, PeerKeys
from strategies.method import Method, Neighbourhood, PeerPlan, Run
from strategies.peer.algorithm import LinkAlgorithm, Vectors
from strategies.topology import Topology, TopologyError


class Relayed(NamedTuple):
    """The state of a peer: its model, and the sums that it relays.

    Attributes:
        x: the model.
        v: the velocity; empty without momentum.
        sums: of each neighbour, the sum that came last.
        counts: of each neighbour, how many models [1] that sum has.
    """

    x: Tensor
    v: Tensor
    sums: Mapping[int, Tensor]
    counts: Mapping[int, Tensor]


def relay_sgd(*, n: int, beta: float = 0.0) -> LinkAlgorithm[Relayed]:
    """RelaySGD of ``n`` peers, with momentum ``beta`` of their own."""

    def init(x: Tensor) -> Relayed:
        return Relayed(x, torch.zeros_like(x) if beta else x.new_empty(0), {}, {})

    def descend(state: Relayed, gradient: Tensor, lr: float) -> Relayed:
        if not beta:
            return state._replace(x=torch.sub(state.x, gradient, alpha=lr))
        v = (state.v * beta).sub_(gradient, alpha=lr)
        return state._replace(x=state.x + v, v=v)

    def outgoing(state: Relayed, reader: int) -> Vectors:
        total, count = state.x.clone(), state.x.new_ones(1)
        for j in state.sums.keys() - {reader}:
            total += state.sums[j]
            count += state.counts[j]
        return total, count

    def mix(state: Relayed, received: Mapping[int, Vectors]) -> Relayed:
        sums = {j: vectors[0] for j, vectors in received.items()}
        counts = {j: vectors[1] for j, vectors in received.items()}
        others = sum((each.clamp_min(0) for each in counts.values()), start=state.x.new_zeros(1))
        # Fewer, as below 0, only where a neighbour tells a wrong count.
        own = (n - others).clamp_min(1)
        total = sum(sums.values(), start=state.x * own)
        return Relayed(total / (own + others), state.v, sums, counts)

    return LinkAlgorithm(init, descend, outgoing, mix)


def check(topology: Topology, rate: float) -> None:
    """Refuse graphs with a circle, on which a model would come back and be counted again."""
    if len(topology.matrices) > 1 or not nx.is_tree(topology.graph):
        peers, links = topology.graph.number_of_nodes(), topology.graph.number_of_edges()
        raise TopologyError(
            f"relaysgd: needs a tree; topology.name = {topology.name!r} has {links} links "
            f"between {peers} peers, or changes; "
            f"allowed: {peers - 1} links that join all, such as 'path', 'star', "
            "or a file of 'edges'"
        )


class Keys(PeerKeys):
    """The keys of RelaySGD."""

    momentum: Decay = 0.0
    """beta, of each peer's own momentum"""


def plan(keys: Keys, run: Run) -> PeerPlan:
    """Adapt, then relay."""
    algorithm = relay_sgd(n=run.num_sites, beta=keys.momentum)
    return PeerPlan(
        algorithm,
        Neighbourhood(rho=run.sam_radius),
        keys.local_steps,
        check,
        accumulates_errors=True,
    )


METHOD = Method("relaysgd", Keys, plan, frozenset({"topology.averaging-rate"}))
