"""Communication graphs of peers, and their mixing weights.

A topology is a graph over peers 0 .. n-1 and a mixing matrix W [n, n], float64: peer i forms
``sum_j w_ij x_j``. W is doubly stochastic, so that exchanging never moves the mean of all peers.
Time-varying graphs have several matrices, used in turn. ``TOPOLOGIES`` names those of this file;
one's own is ``package.module:function`` (see ``examples/my_topology.py``).
"""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import networkx as nx
import numpy as np
import torch
from torch import Tensor

from strategies.imported import imported

TOLERANCE = 1e-9
MATCHINGS = 64  # drawn, then used in turn


class TopologyError(ValueError):
    """The peers cannot be connected as asked; the message names the key of the configuration."""


class Topology(NamedTuple):
    """A communication graph, or a sequence of them, with mixing weights.

    Attributes:
        graph: all links; directed, from a reader to whom it reads, where links are not both ways.
        matrices: [n, n] float64 each, used in turn from exchange to exchange.
        name: of the run configuration.
    """

    graph: "nx.Graph[int]"
    matrices: tuple[Tensor, ...]
    name: str = ""

    def mixing(self, exchange: int) -> Tensor:
        """W [n, n] of an exchange, counted from 0."""
        return self.matrices[exchange % len(self.matrices)]

    def neighbours(self, exchange: int, peer: int) -> dict[int, float]:
        """Whose vectors ``peer`` mixes in an exchange, with their weights; without itself."""
        return _neighbours_of(self.matrices)[exchange % len(self.matrices)][peer]

    def readers(self, peer: int) -> set[int]:
        """The peers that mix what ``peer`` offers, in any exchange."""
        return {other for other in self.graph if self.graph.has_edge(other, peer)}

    def linked(self, peer: int) -> list[int]:
        """The peers that are linked with ``peer`` in any exchange, in either direction."""
        return sorted(set(nx.all_neighbors(self.graph, peer)))

    def parts(self, peers: set[int]) -> list[list[int]]:
        """The parts into which these peers fall without the others; none if they are connected."""
        found = [
            sorted(part) for part in nx.connected_components(nx.Graph(self.graph).subgraph(peers))
        ]
        return sorted(found) if len(found) > 1 else []


@lru_cache(maxsize=4)
def _neighbours_of(matrices: tuple[Tensor, ...]) -> list[list[dict[int, float]]]:
    """The neighbours of each peer in each matrix; looked up for every message."""
    return [
        [
            {j: weight for j, weight in enumerate(row) if weight and j != peer}
            for peer, row in enumerate(matrix.tolist())
        ]
        for matrix in matrices
    ]


def ring(n: int) -> "nx.Graph[int]":
    """A circle; two peers share one link."""
    return nx.cycle_graph(n) if n > 2 else nx.path_graph(n)


def torus(n: int) -> "nx.Graph[int]":
    """A grid a x b whose borders are joined, as square as ``n`` allows, both at least 3."""
    rows = next((a for a in range(math.isqrt(n), 2, -1) if n % a == 0), 0)
    if not rows:
        raise TopologyError(
            f"topology.name = 'torus': num-sites = {n} is no product of two numbers from 3 on"
        )
    return nx.convert_node_labels_to_integers(
        nx.grid_2d_graph(rows, n // rows, periodic=True), ordering="sorted"
    )


def hypercube(n: int) -> "nx.Graph[int]":
    """Corners of a cube of log2 n dimensions."""
    if n & (n - 1):
        raise TopologyError(
            f"topology.name = 'hypercube': num-sites = {n} is no power of two; "
            "allowed: 2, 4, 8, 16, ..."
        )
    return nx.convert_node_labels_to_integers(
        nx.hypercube_graph(n.bit_length() - 1), ordering="sorted"
    )


def hubs(n: int) -> "nx.Graph[int]":
    """Two hubs, the last peers, each linked to all others and not to one another.

    It is the "bipartite" graph of the code of CGA.
    Source: Esfandiari et al., "Cross-Gradient Aggregation", ICML 2021, code. Differs: that code
    rounds weights to two decimals.
    """
    if n < 4:
        raise TopologyError(f"topology.name = 'hubs': num-sites = {n}; allowed: 4, 5, 6, ...")
    return nx.Graph((i, hub) for i in range(n - 2) for hub in (n - 2, n - 1))


def dyck(n: int) -> "nx.Graph[int]":
    """The Dyck graph: 32 peers, three links each."""
    if n != 32:
        raise TopologyError(f"topology.name = 'dyck': num-sites = {n}; allowed: 32")
    return nx.LCF_graph(32, [5, -5, 13, -13], 8)


def dyck_purdue(n: int) -> "nx.Graph[int]":
    """The graph called "Dyck" in the code of Aketi et al. (GUT, CCL, AdaG-SGD).

    It is cubic and has 32 peers, but it is not the Dyck graph.
    """
    if n != 32:
        raise TopologyError(f"topology.name = 'dyck-purdue': num-sites = {n}; allowed: 32")
    circles = [(8 * c + i, 8 * c + (i + 1) % 8) for c in range(4) for i in range(8)]
    across = [(i, i + 8 if i % 2 == 0 else i + 16) for i in range(8)]
    across += [(i, i + 16) for i in range(9, 16, 2)] + [(i, i + 8) for i in range(16, 24, 2)]
    return nx.Graph(circles + across)


def circulant(n: int, stride: int) -> "nx.Graph[int]":
    """Peers 1 and ``stride`` apart; called "torus" in the code of Aketi et al."""
    links = nx.circulant_graph(n, [1, stride % n])
    links.remove_edges_from(list(nx.selfloop_edges(links)))
    return links


def random_regular(n: int, degree: int, seed: int) -> "nx.Graph[int]":
    """A connected random graph with ``degree`` links a peer."""
    if not 2 <= degree < n or n * degree % 2:
        raise TopologyError(
            f"topology.degree = {degree}: "
            f"'random-regular' with num-sites = {n} allows 2 to {n - 1}, num-sites x degree even"
        )
    generator = np.random.default_rng(seed)
    while True:
        found = nx.random_regular_graph(degree, n, seed=generator)
        if nx.is_connected(found):
            return found


def one_peer_exponential(n: int) -> "list[nx.Graph[int]]":
    """Peers read that 1, 2, 4, ... before them, one of these in turn."""
    return [
        nx.DiGraph((i, (i - (1 << k)) % n) for i in range(n)) for k in range((n - 1).bit_length())
    ]


def exponential(n: int) -> "nx.Graph[int]":
    """Peers read those 1, 2, 4, ... before them."""
    return nx.compose_all(one_peer_exponential(n))


def matching(n: int, seed: int) -> "list[nx.Graph[int]]":
    """Random perfect matchings: everybody exchanges with one partner, another each time.

    Where their number is odd, one peer is left over and keeps its own model.
    """
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(n).tolist() for _ in range(MATCHINGS)]
    return [nx.Graph(zip(order[::2], order[1::2], strict=False)) for order in orders]


def read_edges(n: int, edges: str) -> "nx.Graph[int]":
    """Links from a file, a line each, ``i j`` or ``i j weight``."""
    try:
        if not Path(edges).is_file():
            raise FileNotFoundError("there is no such file, or it is no regular one")
        lines = [line.split("#")[0].split() for line in Path(edges).read_text().splitlines()]
        rows = [
            (int(row[0]), int(row[1]), [float(weight) for weight in row[2:]])
            for row in lines
            if row
        ]
    except (OSError, ValueError, IndexError) as error:
        raise TopologyError(
            f"topology.edges = {edges!r}: "
            f"a file with a link 'i j' or 'i j weight' a line is expected: {error}"
        ) from None
    if wrong := [
        row for row in rows if not (0 <= row[0] < n and 0 <= row[1] < n) or row[0] == row[1]
    ]:
        raise TopologyError(
            f"topology.edges = {edges!r}: "
            f"{wrong[0][:2]} is no link between two of the sites 0 to {n - 1}"
        )
    if {len(row[2]) for row in rows} not in (set(), {0}, {1}):
        raise TopologyError(f"topology.edges = {edges!r}: either all links have one weight or none")
    if twice := [
        link
        for link, count in Counter(frozenset(row[:2]) for row in rows if row[2]).items()
        if count > 1
    ]:
        raise TopologyError(
            f"topology.edges = {edges!r}: the link {tuple(sorted(twice[0]))} has two weights"
        )
    if zero := [row[:2] for row in rows if row[2] == [0]]:
        raise TopologyError(
            f"topology.edges = {edges!r}: the link {zero[0]} has the weight 0; "
            "above 0, or leave it out"
        )
    links = nx.Graph()
    for i, j, weight in rows:
        links.add_edge(i, j, **dict(zip(("weight",), weight, strict=False)))
    return links


class Kind(NamedTuple):
    """A named topology.

    Attributes:
        build: takes the number of peers and the keys, and returns a graph, or several that are used
            in turn. A link with a ``weight`` bears that in W; the others get theirs by the
            configuration.
        directed: whether links have a direction, from a reader to whom it reads.
        varying: whether neighbours change.
    """

    build: Callable[..., "nx.Graph[int] | Sequence[nx.Graph[int]]"]
    directed: bool = False
    varying: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that it takes."""
        return tuple(inspect.signature(self.build).parameters)[1:]


TOPOLOGIES = {
    "ring": Kind(ring),
    "path": Kind(lambda n: nx.path_graph(n)),
    "star": Kind(lambda n: nx.star_graph(n - 1)),
    "complete": Kind(lambda n: nx.complete_graph(n)),
    "torus": Kind(torus),
    "hypercube": Kind(hypercube),
    "bipartite": Kind(lambda n: nx.complete_bipartite_graph(n // 2, n - n // 2)),
    "hubs": Kind(hubs),
    "circulant": Kind(circulant),
    "random-regular": Kind(random_regular),
    "exponential": Kind(exponential, directed=True),
    "one-peer-exponential": Kind(one_peer_exponential, directed=True, varying=True),
    "matching": Kind(matching, varying=True),
    "dyck": Kind(dyck),
    "dyck-purdue": Kind(dyck_purdue),
    "edges": Kind(read_edges),
}


def topology(name: str, n: int, *, weights: str, lazy: bool, **keys: Any) -> Topology:
    """The topology of a run configuration for ``n`` peers.

    Args:
        name: one of ``TOPOLOGIES``, or the import path of one's own: a function of the number of
            peers.
        n: number of peers.
        weights: ``metropolis`` or ``uniform``; the same on regular graphs, and others must not be
            directed.
        lazy: halve all links, (I + W) / 2: no negative eigenvalues.
        keys: what it takes, and it may be more.

    Raises:
        TopologyError: the graph does not exist for ``n`` peers, is not connected, or its matrix not
            doubly stochastic.
    """
    if n < 2:
        raise TopologyError(f"num-sites = {n}: peers need somebody to exchange with; at least 2")
    graphs = _built(name, n, keys)
    matrices = [_weigh(graph, n, weights) for graph in graphs]
    if lazy:
        matrices = [(torch.eye(n, dtype=torch.float64) + each) / 2 for each in matrices]
    check(matrices, name)
    links = nx.compose_all(graphs)
    links.add_nodes_from(range(n))
    return Topology(links, tuple(matrices), name)


def _built(name: str, n: int, keys: dict[str, Any]) -> "list[nx.Graph[int]]":
    if name in TOPOLOGIES:
        kind = TOPOLOGIES[name]
        found = kind.build(n, **{key: keys[key] for key in kind.keys})
    else:
        try:
            found = imported(name, FunctionType, TOPOLOGIES, "function")(n)
        except Exception as error:
            raise TopologyError(f"topology.name = {name!r}: {error}") from error
    peers = set(range(n))
    graphs: list[nx.Graph[int]] = list(found) if isinstance(found, list | tuple) else [found]
    for graph in graphs:
        if not isinstance(graph, nx.Graph) or graph.is_multigraph():
            raise TopologyError(
                f"topology.name = {name!r}: a graph of networkx is expected, or a list; "
                f"got {type(graph).__name__}"
            )
        if wrong := [link for link in graph.edges if link[0] == link[1] or not {*link} <= peers]:
            raise TopologyError(
                f"topology.name = {name!r}: "
                f"{wrong[0]} is no link between two of the peers 0 to {n - 1}"
            )
    if not graphs or len({graph.is_directed() for graph in graphs}) > 1:
        raise TopologyError(
            f"topology.name = {name!r}: at least one graph is expected, all directed or none"
        )
    return graphs


def _weigh(links: "nx.Graph[int]", n: int, weights: str) -> Tensor:
    known = links.copy()
    known.add_nodes_from(range(n))
    given = len(nx.get_edge_attributes(links, "weight")) > 0
    try:
        array = nx.to_numpy_array(
            known, nodelist=range(n), weight="weight" if given else None, dtype=np.float64
        )
    except (ValueError, TypeError) as error:
        raise TopologyError(f"a weight is no number: {error}") from None
    matrix = torch.from_numpy(array)
    if given:
        return matrix + torch.diag(1 - matrix.sum(1))
    return uniform_weights(matrix) if weights == "uniform" else metropolis_weights(matrix)


def metropolis_weights(adjacency: Tensor) -> Tensor:
    """Metropolis-Hastings weights, ``w_ij = 1 / (1 + max(deg_i, deg_j))`` on links.

    They are doubly stochastic on every undirected graph.
    Source: Xiao and Boyd, "Fast linear iterations for distributed averaging", 2004. On a regular
    graph these are :func:`uniform_weights`.

    Args:
        adjacency: [n, n] float64, 1 where i and j are linked; symmetric, zero diagonal.

    Returns:
        W [n, n] float64, symmetric.
    """
    degrees = adjacency.sum(1)
    weights = adjacency / (1 + torch.maximum(degrees[:, None], degrees[None, :]))
    return weights + torch.diag(1 - weights.sum(1))


def uniform_weights(adjacency: Tensor) -> Tensor:
    """All neighbours and the peer itself count the same: ``1 / (1 + deg_i)``.

    These weights are doubly stochastic on regular graphs only.
    """
    return (adjacency + torch.eye(len(adjacency), dtype=torch.float64)) / (
        1 + adjacency.sum(1, keepdim=True)
    )


def spectral_gap(*matrices: Tensor) -> float:
    """1 minus the largest factor by which an exchange shrinks disagreement.

    Of a symmetric W it is ``1 - max(|lambda_2|, |lambda_n|)``. Of several matrices used in turn,
    that of their product, an exchange; of a matrix that is not symmetric, by eigenvalues too.
    """
    product = matrices[0]
    for matrix in matrices[1:]:
        product = matrix @ product
    n = len(product)
    disagreement = product - torch.full((n, n), 1 / n, dtype=torch.float64)
    largest = float(torch.linalg.eigvals(disagreement).abs().max())
    return float(1 - (largest if largest > 1e-7 else 0.0) ** (1 / len(matrices)))


def check(matrices: list[Tensor], name: str) -> None:
    """Refuse what does not lead to agreement.

    Raises:
        TopologyError: a negative weight, a row or column that does not sum to 1, or peers that
            others never reach.
    """
    union = torch.stack(matrices).sum(0)
    for matrix in matrices:
        for kind, sums in (("row", matrix.sum(1)), ("column", matrix.sum(0))):
            worst = int((sums - 1).abs().argmax())
            if not abs(float(sums[worst]) - 1) <= TOLERANCE:  # so that NaN is refused too
                raise TopologyError(
                    f"topology.name = {name!r}: the mixing matrix is not doubly stochastic, "
                    f"{kind} {worst} sums to {float(sums[worst]):.6g}; "
                    "topology.mixing = 'metropolis' suits every undirected graph, "
                    "'uniform' regular ones"
                )
        if float(matrix.min()) < -TOLERANCE:
            i, j = divmod(int(matrix.argmin()), len(matrix))
            raise TopologyError(
                f"topology.name = {name!r}: the weight of ({i}, {j}) is {float(matrix.min()):.6g}; "
                "at least 0"
            )
    graph = nx.from_numpy_array(union.numpy(), create_using=nx.DiGraph)
    if not nx.is_strongly_connected(graph):
        parts = sorted(sorted(part) for part in nx.strongly_connected_components(graph))
        first = ", ".join(map(str, parts[:4]))
        raise TopologyError(
            f"topology.name = {name!r}: the graph is not connected, its parts are {first}"
        )
