"""The server: reads the configuration, counts the sites, builds the strategy, runs it, writes the results."""

import logging

from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from configuration.config import Config
from configuration.graph import graph_of
from models.flat import FlatModel
from models.networks import build
from server_app.asynchronous import Asynchronous
from server_app.census import Federation, RunError, take_census
from server_app.consensus import conclude
from server_app.relay import Relay
from server_app.results import Folder, History
from server_app.rounds import Rounds
from strategies.averaging.adapter import Planned
from strategies.averaging.alone import Alone
from strategies.averaging.shipped import Shipped
from strategies.method import AlonePlan, ArrivalPlan, ForeignPlan, PeerPlan, RoundPlan
from strategies.randomness import derive
from strategies.records import STATS, X, pack

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run, from the run configuration to the results folder."""
    config = Config.read(context.run_config)
    run(grid, config, Folder(config))


def run(grid: Grid, config: Config, history: History) -> None:
    """Everything that the server does, reported to ``history``.

    Raises:
        RunError: the run cannot start or go on; what it reached is in ``history``.
    """
    # Flower's own lines about sampling and aggregation would drown ours; its warnings and errors stay.
    logging.getLogger("flwr").setLevel(logging.WARNING)
    topology = graph_of(config) if isinstance(config.plan, PeerPlan) else None  # one that cannot be stops the run here
    federation = take_census(grid, config)
    if topology is not None and (parts := topology.parts({site.number for site in federation.sites})):
        raise RunError(f"without the sites that do not take part, the peers fall into parts: {', '.join(map(str, parts))}")
    for note in federation.notes:
        log(logging.WARNING, "%s", note)
    model = FlatModel(
        build(config.model.name, federation.shape, len(federation.classes), config.model.norm, derive(config.seed, "model"))
    )
    history.begin(federation, model)
    initial = pack({X: model.x, STATS: model.stats})
    try:
        match config.plan:
            case ArrivalPlan() as plan:
                Asynchronous(grid, plan, federation, config, history).run(initial)
            case PeerPlan():
                assert topology is not None
                relay = Relay(grid, topology, federation, config, history)
                conclude(grid, relay.run(), federation, config, history, relay.report, relay.exchanges)
            case RoundPlan() as plan:
                planned = Planned(plan, _shares(federation, plan.weighting))
                beside = plan.site.sends if plan.site else ()
                Rounds(grid, planned, planned.instruct, federation, config, history).run(initial, beside)
            case AlonePlan(instruct=by_itself, ensemble=ensemble):
                alone = Alone({site.node: row for row, site in enumerate(federation.sites)}, ensemble=ensemble)
                Rounds(grid, alone, lambda moment, _: by_itself(moment), federation, config, history).run(initial)
            case ForeignPlan(build=make, instruct=foreign, weighting=weighting):
                shipped = Shipped(make(), _shares(federation, weighting))
                Rounds(grid, shipped, lambda moment, _: foreign(moment), federation, config, history).run(initial)
    finally:  # whatever stopped the run
        history.end()


def _shares(federation: Federation, weighting: str) -> dict[int, float]:
    """Each node's share in a mean, in the order of the sites; together 1."""
    sites = federation.sites
    total = sum(site.num_train for site in sites)
    return {site.node: 1 / len(sites) if weighting == "equal" else site.num_train / total for site in sites}
