"""Who exchanges with whom in a run of peers."""

from functools import lru_cache

from configuration.config import Config
from strategies.method import PeerPlan
from strategies.randomness import derive
from strategies.topology import Topology, topology


@lru_cache(maxsize=4)
def graph_of(config: Config) -> Topology:
    """The topology of a run of peers: site k is peer k.

    Raises:
        TopologyError: they cannot be connected as asked, or would never agree.
    """
    assert isinstance(config.plan, PeerPlan)
    keys = config.topology
    found = topology(
        keys.name,
        config.num_sites,
        weights=keys.mixing,
        lazy=keys.lazy,
        degree=keys.degree,
        stride=keys.stride,
        edges=keys.edges,
        seed=derive(config.seed, "topology"),
    )
    config.plan.check(found, keys.averaging_rate)
    return found
