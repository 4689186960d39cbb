"""RelaySGD: special cases, invariants, and an independent dense reference.

In float64, by the steps that the app runs.
"""

from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor

from client_app.app import app as client_app
from configuration.config import configuration
from configuration.errors import ConfigError
from server_app.app import run as run_server
from server_app.results import History
from simulation.grid import VirtualGrid
from simulation.laboratory import simulate
from simulation.world import World
from strategies.method import PeerPlan, Run
from strategies.peer.dsgd import dsgd
from strategies.peer.relay_sgd import METHOD, relay_sgd
from strategies.topology import Topology, TopologyError, topology
from tests.equivalence.golden import LR, B, H, N, Quadratic, lockstep, models

NAME = "strategies.peer.relay_sgd:METHOD"
TREES: dict[str, "nx.Graph[int]"] = {
    "path": nx.path_graph(N),
    "star": nx.star_graph(N - 1),
    "fork": nx.Graph([(0, 1), (1, 2), (1, 3), (3, 4)]),
}


def tree(name: str) -> Tensor:
    """Which links there are; the weights are not used."""
    adjacency = torch.from_numpy(nx.to_numpy_array(TREES[name], nodelist=range(N))) / N
    return adjacency + torch.diag(1 - adjacency.sum(1))


def reference(name: str, exchanges: int, x: Tensor, lr: float = LR, beta: float = 0.0) -> Tensor:
    """Every peer's mean by distances: what j had when its model set out, d - 1 exchanges ago.

    Before that it is the own model.
    """
    distances = dict(nx.all_pairs_shortest_path_length(TREES[name]))
    v, halves = torch.zeros_like(x), list[Tensor]()
    for now in range(exchanges):
        v = beta * v - lr * H * (x - B)
        halves.append(x + v)
        x = torch.zeros_like(x)
        for i in range(N):
            for j, d in distances[i].items():
                x[i] += (halves[now - max(d - 1, 0)][j] if now >= d - 1 else halves[now][i]) / N
    return x


def vectors() -> Tensor:
    return torch.randn(N, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("exchanges", [1, 2, 3, 9])
def test_models_are_those_of_the_dense_reference(name: str, beta: float, exchanges: int) -> None:
    found = models(lockstep(PeerPlan(relay_sgd(n=N, beta=beta)), exchanges, tree(name), vectors()))
    torch.testing.assert_close(found, reference(name, exchanges, vectors(), beta=beta))


def test_two_peers_average_exactly() -> None:
    pair, x = torch.full((2, 2), 0.5, dtype=torch.float64), vectors()[:2]
    found = models(lockstep(PeerPlan(relay_sgd(n=2)), 1, pair, x))
    torch.testing.assert_close(found, (x - LR * H[:2] * (x - B[:2])).mean(0).expand(2, -1))


def test_two_peers_with_equal_data_are_sgd() -> None:
    pair, x = torch.full((2, 2), 0.5, dtype=torch.float64), vectors()[:1].expand(2, -1)
    found = models(
        lockstep(
            PeerPlan(relay_sgd(n=2, beta=0.9)), 6, pair, x, oracles=[Quadratic(H[0], B[1])] * 2
        )
    )
    alone = torch.nn.Parameter(x[0].clone())
    reference = torch.optim.SGD([alone], LR, momentum=0.9)
    for _ in range(6):
        alone.grad = H[0] * (alone.detach() - B[1])
        reference.step()
    torch.testing.assert_close(found, alone.detach().expand(2, -1))


@pytest.mark.parametrize("name", TREES)
def test_agreement_without_gradients_is_a_fixed_point(name: str) -> None:
    x = vectors()[:1].expand(N, -1)
    torch.testing.assert_close(
        models(lockstep(PeerPlan(relay_sgd(n=N)), 5, tree(name), x, oracles=[Flat()] * N)), x
    )


@pytest.mark.parametrize("name", TREES)
def test_after_as_many_exchanges_as_a_tree_is_wide_every_model_counts_the_same(name: str) -> None:
    """Without gradients each peer has in its sums everybody else once.

    The mean of what set out is the mean of all.
    """
    wide = nx.diameter(TREES[name])
    states = lockstep(
        PeerPlan(relay_sgd(n=N)),
        wide,
        tree(name),
        torch.eye(N, dtype=torch.float64),
        oracles=[Flat()] * N,
    )
    for state in states:
        assert sum(state.algorithm.counts.values()) == N - 1
    before = lockstep(
        PeerPlan(relay_sgd(n=N)),
        wide - 1,
        tree(name),
        torch.eye(N, dtype=torch.float64),
        oracles=[Flat()] * N,
    )
    assert any(sum(state.algorithm.counts.values()) < N - 1 for state in before)
    x = models(lockstep(PeerPlan(relay_sgd(n=N)), 40, tree(name), vectors(), oracles=[Flat()] * N))
    torch.testing.assert_close(x, x[:1].expand(N, -1), rtol=0, atol=1e-3)  # they agree


class Flat:
    """No gradient anywhere."""

    def gradient(self, x: Tensor, stats: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        return x.new_zeros(()), torch.zeros_like(x), stats

    def test(self, x: Tensor, stats: Tensor) -> dict[str, float | int]:
        return {}


def test_unlike_data_bias_it_far_less_than_d_psgd() -> None:
    optimum, weights = (
        (H * B).sum(0) / H.sum(0),
        topology("path", N, weights="metropolis", lazy=False).mixing(0),
    )
    found = [
        models(lockstep(PeerPlan(algorithm), 400, weights, lr=0.05)) - optimum
        for algorithm in (relay_sgd(n=N), dsgd(beta=0.0, nesterov=False, adapt_first=True))
    ]
    relayed, gossiped = (float(each.abs().max()) for each in found)
    assert relayed < gossiped / 3


def test_a_silent_side_counts_as_the_own_model_and_a_wrong_count_does_little() -> None:
    algorithm = relay_sgd(n=5)
    state = algorithm.init(torch.tensor([2.0]))
    one = torch.ones(1)
    assert algorithm.mix(state, {}).x == 2
    assert algorithm.mix(state, {1: (torch.tensor([12.0]), 3 * one)}).x == torch.tensor(
        [(12 + 2 * 2) / 5]
    )
    assert algorithm.mix(state, {1: (torch.tensor([12.0]), 9 * one)}).x == torch.tensor(
        [(12 + 2) / 10]
    )
    assert algorithm.mix(state, {1: (torch.tensor([12.0]), -4e6 * one)}).x == torch.tensor(
        [(12 + 5 * 2) / 5]
    )
    mixed = algorithm.mix(
        state, {1: (torch.tensor([12.0]), 3 * one), 2: (torch.tensor([7.0]), one)}
    )
    assert [float(part) for part in algorithm.outgoing(mixed, 1)] == [pytest.approx(mixed.x + 7), 2]
    assert [float(part) for part in algorithm.outgoing(mixed, 2)] == [
        pytest.approx(mixed.x + 12),
        4,
    ]
    # What 1 sent before is of no use any more.
    silent = algorithm.mix(mixed, {2: (torch.tensor([7.0]), one)})
    assert silent.x == pytest.approx(float((7 + 4 * mixed.x) / 5))
    assert float(algorithm.outgoing(silent, 2)[1]) == 1


def in_turn(n: int) -> "list[nx.Graph[int]]":
    """A path, of which a link at a time is there."""
    return [nx.Graph([(k, k + 1)]) for k in range(n - 1)]


def graph(name: str) -> Topology:
    return topology(name, 5, weights="metropolis", lazy=False, degree=4, stride=4, edges="", seed=1)


@pytest.mark.parametrize(
    "name", ["ring", "complete", "matching", "exponential", f"{__name__}:in_turn"]
)
def test_only_trees(name: str) -> None:
    plan: Any = METHOD.plan(METHOD.keys(), Run(0.1, 0.0, 5))
    with pytest.raises(
        TopologyError, match=f"relaysgd: needs a tree; topology.name = '{name}' has "
    ):
        plan.check(graph(name), 1.0)
    plan.check(graph("path"), 1.0)
    plan.check(graph("star"), 1.0)


# In the app.

SMALL: dict[str, Any] = {
    "strategy": NAME,
    "num_sites": 4,
    "epochs": 4,
    "model.name": "mlp",
    "topology.name": "path",
}


def test_the_number_of_peers_is_that_of_the_run() -> None:
    plan = configuration(**SMALL).plan
    assert isinstance(plan, PeerPlan)
    algorithm: Any = plan.algorithm
    mixed = algorithm.mix(
        algorithm.init(torch.tensor([2.0])), {1: (torch.tensor([9.0]), torch.ones(1))}
    )
    assert mixed.x == torch.tensor([(9 + 3 * 2) / 4])


@pytest.mark.parametrize("sealing", ["off", "trust-on-first-use"])
def test_peers_of_the_app_relay_along_a_tree(sealing: str) -> None:
    config = configuration(**SMALL, **{"wire.sealing": sealing})
    history = History(config)
    wrapped = set[tuple[int, str]]()

    def look(number: int, message: Any, reply: Any) -> Any:
        if not reply.has_error():
            wrapped.update(
                (number, name.partition("/")[0]) for name in reply.content.get("arrays", {})
            )
        return reply

    run_server(VirtualGrid(client_app, World().sites(4, 1), config.flat(), look), config, history)
    accuracies = history.metrics.query("metric == 'accuracy' and site == 'all'")["value"]
    assert accuracies.iloc[-1] > 0.6
    assert wrapped == {(0, "to-1"), (1, "to-0"), (1, "to-2"), (2, "to-1"), (2, "to-3"), (3, "to-2")}


def test_it_is_refused_where_it_cannot_run() -> None:
    with pytest.raises(
        TopologyError,
        match=r"relaysgd: needs a tree; topology.name = 'ring' has 4 links between 4 peers",
    ):
        simulate(**(SMALL | {"topology.name": "ring", "progress": False}))
    with pytest.raises(
        ConfigError,
        match=rf"engine = 'batched': strategy = '{NAME}' offers each neighbour something else",
    ):
        simulate(**SMALL, progress=False, engine="batched")
    with pytest.raises(
        ConfigError, match=r"wire.error-feedback = 'choco': .* offers each neighbour something else"
    ):
        configuration(**SMALL, **{"wire.codec": "fp16", "wire.error-feedback": "choco"})
    with pytest.raises(ConfigError, match=r"wire.codec = 'qsgd': .* would carry on every error"):
        configuration(**SMALL, **{"wire.codec": "qsgd"})


def test_what_it_remembers_survives_the_process() -> None:
    from client_app import site as site_module

    def accuracies(forget: bool) -> list[float]:
        config = configuration(**(SMALL | {"epochs": 1}))
        history = History(config)

        def tamper(number: int, message: Any, reply: Any) -> Any:
            if forget:
                site_module.network_of.cache_clear()
            return reply

        run_server(
            VirtualGrid(client_app, World().sites(4, 1), config.flat(), tamper), config, history
        )
        found: list[float] = history.metrics.query("metric == 'accuracy'")["value"].tolist()
        return found

    assert accuracies(True) == accuracies(False)
