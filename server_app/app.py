"""The server: reads the configuration, counts the sites, builds the strategy, runs it, writes the results."""

import logging
import math

from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from models.flat import FlatModel
from models.networks import build
from server_app.asynchronous import Asynchronous
from server_app.census import RunError, take_census
from server_app.consensus import conclude
from server_app.relay import Relay
from server_app.results import Folder, History
from server_app.rounds import Rounds
from strategies.config import ASYNCHRONOUS, PEERS, Config
from strategies.randomness import derive
from strategies.records import STATS, X, pack
from strategies.registry import peer_topology, round_strategy, server_rule

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
    topology = peer_topology(config) if config.strategy in PEERS else None  # one that cannot be stops the run here
    federation = take_census(grid, config)
    if topology is not None and (parts := topology.parts({site.number for site in federation.sites})):
        raise RunError(f"without the sites that do not take part, the peers fall into parts: {', '.join(map(str, parts))}")
    for note in federation.notes:
        log(logging.WARNING, "%s", note)
    model = FlatModel(build(config.model, federation.shape, len(federation.classes), config.norm, derive(config.seed, "model")))
    history.begin(federation, model)
    initial = pack({X: model.x, STATS: model.stats})
    try:
        if config.strategy in ASYNCHRONOUS:
            gsgm = config.strategy == "gsgm"
            slack, blocking = config.slack if gsgm else math.inf, config.schedule == "white-list"
            rule = server_rule(config)
            Asynchronous(grid, rule, federation, config, history, slack=slack, blocking=blocking).run(initial)
        elif topology is not None:
            relay = Relay(grid, topology, federation, config, history)
            conclude(grid, relay.run(), federation, config, history, relay.report, relay.exchanges)
        else:
            strategy = round_strategy(config, {site.node: site.num_train for site in federation.sites})
            Rounds(grid, strategy, federation, config, history).run(initial)
    finally:  # whatever stopped the run
        history.end()
