"""Graphs and mixing matrices: closed forms, and what is refused."""

import math
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch

from configuration.config import configuration
from configuration.graph import graph_of
from strategies.topology import TOPOLOGIES, Topology, TopologyError, spectral_gap, topology

SIZES = {"torus": 16, "hypercube": 16, "dyck": 32, "dyck-purdue": 32, "bipartite": 8}
NAMES = [name for name in TOPOLOGIES if name != "edges"]


def build(name: str, n: int, **changes: Any) -> Topology:
    defaults: dict[str, Any] = {
        "weights": "metropolis",
        "lazy": False,
        "degree": 4,
        "stride": 4,
        "edges": "",
        "seed": 1,
    }
    return topology(name, n, **defaults | changes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lazy", [False, True])
def test_every_matrix_is_doubly_stochastic_and_its_support_is_the_graph(
    name: str, lazy: bool
) -> None:
    n = SIZES.get(name, 10)
    found = build(name, n, lazy=lazy)
    one = torch.ones(n, dtype=torch.float64)
    for matrix in found.matrices:
        assert matrix.dtype == torch.float64
        torch.testing.assert_close(matrix.sum(0), one)
        torch.testing.assert_close(matrix.sum(1), one)
        if "exponential" not in name:
            assert torch.equal(matrix, matrix.T)
    links = {(i, j) for i, j in torch.stack(found.matrices).sum(0).nonzero().tolist() if i != j}
    graph = found.graph if found.graph.is_directed() else found.graph.to_directed()
    assert links == set(graph.edges)
    assert spectral_gap(*found.matrices) > 1e-3
    assert found.graph.is_directed() == TOPOLOGIES[name].directed
    assert (len(found.matrices) > 1) == TOPOLOGIES[name].varying
    assert found.name == name


RING16 = 1 - (1 / 3 + 2 / 3 * math.cos(2 * math.pi / 16))
GAPS = [
    ("complete", 8, 1.0),
    ("ring", 16, RING16),
    ("ring", 5, 0.460655),
    ("path", 8, RING16),  # the gap of a ring of twice the size
    ("star", 16, 1 / 16),
    ("torus", 9, 0.6),
    ("torus", 16, 0.4),
    ("torus", 20, 0.276393),
    ("hypercube", 16, 2 / 5),
    ("bipartite", 8, 2 / 5),
    ("hubs", 10, 2 / 9),
    ("dyck", 32, 0.190983),
    ("dyck-purdue", 32, 0.146447),
    ("exponential", 16, 2 / 5),
    ("exponential", 7, 0.6464),
    ("one-peer-exponential", 8, 1.0),
]


@pytest.mark.parametrize(("name", "n", "gap"), GAPS)
def test_spectral_gap_in_closed_form(name: str, n: int, gap: float) -> None:
    assert spectral_gap(*build(name, n).matrices) == pytest.approx(
        gap, abs=1e-4 if gap in (0.6464,) else 1e-6
    )


@pytest.mark.parametrize(
    ("n", "stride", "gap"), [(32, 4, 0.124843), (32, 5, 0.185458), (20, 5, 0.276393), (16, 4, 0.4)]
)
def test_circulant_graph_that_others_call_torus(n: int, stride: int, gap: float) -> None:
    assert spectral_gap(*build("circulant", n, stride=stride).matrices) == pytest.approx(
        gap, abs=1e-6
    )


def test_dyck_graphs_differ() -> None:
    true, other = build("dyck", 32).graph, build("dyck-purdue", 32).graph
    assert {degree for _, degree in true.degree} == {degree for _, degree in other.degree} == {3}
    assert nx.diameter(true) == 5
    assert nx.diameter(other) == 6


def test_lazy_matrix_has_no_negative_eigenvalues() -> None:
    assert float(torch.linalg.eigvalsh(build("ring", 8).mixing(0)).min()) == pytest.approx(-1 / 3)
    assert float(torch.linalg.eigvalsh(build("ring", 8, lazy=True).mixing(0)).min()) > 0


def test_one_peer_exponential_averages_exactly_after_log2_n_exchanges() -> None:
    found = build("one-peer-exponential", 8)
    x = torch.arange(8, dtype=torch.float64)
    for exchange in range(3):
        x = found.mixing(exchange) @ x
    torch.testing.assert_close(x, torch.full((8,), 3.5, dtype=torch.float64))
    assert found.neighbours(3, 0) == {7: 0.5}  # the first matrix again
    assert found.neighbours(1, 0) == {6: 0.5}


def test_readers_are_those_who_read_a_peer_and_not_whom_it_reads() -> None:
    found = build("exponential", 8)
    assert set(found.neighbours(0, 0)) == {7, 6, 4}  # 1, 2 and 4 before it
    assert found.readers(0) == {1, 2, 4}
    assert found.linked(0) == [1, 2, 4, 6, 7]


@pytest.mark.parametrize("n", [6, 7])
@pytest.mark.parametrize("weights", ["metropolis", "uniform"])
def test_matchings_pair_everybody_but_an_odd_one_and_are_drawn_from_the_seed(
    n: int, weights: str
) -> None:
    found = build("matching", n, weights=weights)
    alone = []
    for exchange in range(len(found.matrices)):
        pairs = {peer: found.neighbours(exchange, peer) for peer in range(n)}
        for peer, partner in pairs.items():
            assert partner in ({}, {next(iter(partner), -1): 0.5})
            assert all(set(pairs[other]) == {peer} for other in partner)
        alone.append([peer for peer, partner in pairs.items() if not partner])
        assert len(alone[-1]) == n % 2
    assert n % 2 == 0 or len({each[0] for each in alone}) == n  # another one each time
    drawn = [{frozenset(pair) for pair in each.nonzero().tolist()} for each in found.matrices]
    assert len({frozenset(each) for each in drawn}) > 10
    assert all(
        torch.equal(*each)
        for each in zip(found.matrices, build("matching", n, weights=weights).matrices, strict=True)
    )
    other = build("matching", n, seed=2).matrices
    assert not all(torch.equal(*each) for each in zip(found.matrices, other, strict=True))


def test_topology_of_ones_own() -> None:
    found = build("examples.my_topology:cities", 8)
    assert {peer: set(found.neighbours(0, peer)) for peer in (0, 3, 4)} == {
        0: {1, 2, 3},
        3: {0, 1, 2, 4},
        4: {3, 5, 6, 7},
    }
    assert found.readers(3) == {0, 1, 2, 4}
    with pytest.raises(
        TopologyError,
        match=r"topology.name = 'examples.my_topology:cities': num-sites = 7: 2 cities",
    ):
        build("examples.my_topology:cities", 7)


def drawn_once(n: int) -> "list[nx.Graph[int]]":
    half = nx.Graph()
    half.add_edge(0, 1, weight=0.25)
    return [half, nx.Graph([(k, k + 1) for k in range(1, n - 1)])]


def looped(n: int) -> "nx.Graph[int]":
    return nx.Graph([(0, 1), (1, 1)])


def both(n: int) -> "list[nx.Graph[int]]":
    return [nx.cycle_graph(n), nx.DiGraph([(0, 1), (1, 0)])]


def adrift(n: int) -> "nx.Graph[int]":
    return nx.Graph([(0, 1)])


def matrix(n: int) -> torch.Tensor:
    return torch.eye(n)


def test_graphs_of_ones_own_may_change_and_bear_weights() -> None:
    found = build(f"{__name__}:drawn_once", 4)
    assert found.neighbours(0, 0) == {1: 0.25}
    assert found.neighbours(1, 0) == {}
    assert set(found.neighbours(3, 2)) == {1, 3}  # the second graph again
    assert found.readers(1) == {0, 2}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{__name__}:looped", r"\(1, 1\) is no link between two of the peers 0 to 3"),
        (f"{__name__}:both", "at least one graph is expected, all directed or none"),
        (f"{__name__}:adrift", "the graph is not connected"),
        (f"{__name__}:matrix", "a graph of networkx is expected, or a list; got Tensor"),
        (f"{__name__}:SIZES", "a function is expected, it is a dict"),
        ("nowhere:graph", "cannot be imported: ModuleNotFoundError"),
        ("rings", "allowed: ring, path, .*package.module:function; did you mean 'ring'"),
    ],
)
def test_topology_of_ones_own_is_checked(name: str, message: str) -> None:
    with pytest.raises(TopologyError, match=f"topology.name = '{name}': .*{message}"):
        build(name, 4)


def circle_one_way(n: int) -> "nx.DiGraph[int]":
    return nx.DiGraph((i, (i + 1) % n) for i in range(n))


def by_turns(n: int) -> "list[nx.Graph[int]]":
    return [nx.Graph((i, i + 1) for i in range(first, n - 1, 2)) for first in (0, 1)]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"strategy": "ngm", "topology.name": f"{__name__}:circle_one_way"},
            "against its links; or gradients = 'model'",
        ),
        (
            {
                "strategy": "d-psgd",
                "topology.name": f"{__name__}:by_turns",
                "wire.codec": "top-k",
                "wire.error-feedback": "choco",
            },
            "wire.error-feedback = 'choco': neighbours change",
        ),
    ],
)
def test_topology_of_ones_own_must_suit_the_method(keys: dict[str, Any], message: str) -> None:
    """Its name does not tell.

    A run went on without the gradients, or without half of the exchanges.
    """
    with pytest.raises(TopologyError, match=message):
        graph_of(configuration(num_sites=4, **keys))


def test_edges_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "links"
    file.write_text("# four hospitals\n0 1\n1 2\n\n2 3 # by night\n")
    assert torch.equal(build("edges", 4, edges=str(file)).mixing(0), build("path", 4).mixing(0))
    file.write_text("0 1 0.25\n1 2 0.5\n")
    found = build("edges", 3, edges=str(file)).mixing(0)
    expected = torch.tensor(
        [[0.75, 0.25, 0], [0.25, 0.25, 0.5], [0, 0.5, 0.5]], dtype=torch.float64
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("name", "n", "changes", "message"),
    [
        (
            "torus",
            14,
            {},
            "topology.name = 'torus': num-sites = 14 is no product of two numbers from 3 on",
        ),
        ("hypercube", 12, {}, "topology.name = 'hypercube': num-sites = 12 is no power of two"),
        ("hubs", 3, {}, "topology.name = 'hubs': num-sites = 3; allowed: 4"),
        ("dyck", 16, {}, "num-sites = 16; allowed: 32"),
        (
            "random-regular",
            5,
            {"degree": 3},
            "topology.degree = 3: 'random-regular' with num-sites = 5 allows 2 to 4",
        ),
        (
            "star",
            5,
            {"weights": "uniform"},
            (
                "not doubly stochastic, column 0 sums to 2.2; "
                "topology.mixing = 'metropolis' suits every"
            ),
        ),
        (
            "edges",
            4,
            {"edges": "0 1\n2 3\n"},
            r"the graph is not connected, its parts are \[0, 1\], \[2, 3\]",
        ),
        (
            "edges",
            3,
            {"edges": "0 1 0.7\n1 2 0.7\n"},
            r"the weight of \(1, 1\) is -0.4; at least 0",
        ),
        (
            "edges",
            3,
            {"edges": "0 1\n1 3\n"},
            r"\(1, 3\) is no link between two of the sites 0 to 2",
        ),
        (
            "edges",
            3,
            {"edges": "0 one\n"},
            "a file with a link 'i j' or 'i j weight' a line is expected",
        ),
        ("edges", 3, {"edges": "0 1\n1 2 0.5\n"}, "either all links have one weight or none"),
        (
            "edges",
            3,
            {"edges": "0 1 0.5 0.5\n1 2 0.5 0.1\n"},
            "either all links have one weight or none",
        ),
        (
            "edges",
            3,
            {"edges": "0 1 0.5\n1 2 0.3\n1 0 0.2\n"},
            r"the link \(0, 1\) has two weights",
        ),
        ("edges", 3, {"edges": "0 1 0.5\n1 2 0.5\n0 2 0\n"}, r"the link \(0, 2\) has the weight 0"),
        ("edges", 3, {"edges": ""}, r"edges = .*: the graph|the graph is not connected"),
        ("ring", 1, {}, "num-sites = 1: peers need somebody to exchange with"),
    ],
)
def test_what_cannot_be_is_an_error_that_names_the_key(
    name: str, n: int, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if "edges" in changes:
        (tmp_path / "links").write_text(changes["edges"])
        changes = {"edges": str(tmp_path / "links")}
    with pytest.raises(TopologyError, match=message):
        build(name, n, **changes)
