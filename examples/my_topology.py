"""A topology of one's own: ``topology.name = "examples.my_topology:cities"``.

A function of the number of peers; it returns a graph of networkx over peers 0 .. n-1, or a list of
graphs, which are used in turn. A link with a ``weight`` bears that in the mixing matrix; the others
get theirs by ``topology.mixing``. The app checks that the matrix is doubly stochastic and that
everybody can reach everybody.
"""

import networkx as nx

CITIES = 2  # whose hospitals are all linked with each other; one link joins a city with the next


def cities(n: int) -> "nx.Graph[int]":
    """Complete graphs of equal size, joined in a row."""
    if n % CITIES or n < 2 * CITIES:
        raise ValueError(f"num-sites = {n}: {CITIES} cities of equal size need a multiple of it")
    size = n // CITIES
    links = nx.disjoint_union_all([nx.complete_graph(size) for _ in range(CITIES)])
    links.add_edges_from((size * city - 1, size * city) for city in range(1, CITIES))
    return links
