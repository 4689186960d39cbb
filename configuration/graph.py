"""The communication graph of a run of peers."""

from functools import lru_cache

from configuration.checks import DIRECTED, VARYING
from configuration.config import Config
from strategies.method import PeerPlan
from strategies.randomness import derive
from strategies.topology import Topology, TopologyError, topology


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
    one_way = any(bool(((each > 0) != (each.T > 0)).any()) for each in found.matrices)
    if one_way and config.plan.gradient.messages > 1:
        raise TopologyError(f"topology.name = {keys.name!r}: {DIRECTED}")
    if len(found.matrices) > 1 and config.wire.error_feedback == "choco":
        raise TopologyError(f"wire.error-feedback = 'choco': {VARYING}")
    config.plan.check(found, keys.averaging_rate)
    if config.robust.mean != "mean":
        least = {"median": 2, "trimmed-mean": 2 * config.robust.faulty}.get(
            config.robust.mean, config.robust.faulty + 1
        )
        exchanges, peers = range(len(found.matrices)), range(config.num_sites)
        fewest = min(
            len(found.neighbours(exchange, peer)) for exchange in exchanges for peer in peers
        )
        if fewest < least:
            wrong = f"topology.name = {keys.name!r}: a peer has {fewest} neighbours"
            raise TopologyError(
                f"{wrong}; robust.mean = {config.robust.mean!r} needs at least {least}, "
                "such as of a 'complete' graph"
            )
    return found
