"""The server: reads the configuration, counts the sites, builds the strategy, runs it, writes the results."""

import logging

from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from models.flat import FlatModel
from models.networks import build
from server_app.census import take_census
from server_app.results import Folder, History
from server_app.rounds import Rounds
from strategies.config import Config
from strategies.randomness import derive
from strategies.records import STATS, X, pack
from strategies.registry import round_strategy

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
    federation = take_census(grid, config)
    for note in federation.notes:
        log(logging.WARNING, "%s", note)
    model = FlatModel(build(config.model, federation.shape, len(federation.classes), config.norm, derive(config.seed, "model")))
    strategy = round_strategy(config, {site.node: site.num_train for site in federation.sites})
    history.begin(federation, model)
    try:
        Rounds(grid, strategy, federation, config, history).run(pack({X: model.x, STATS: model.stats}))
    finally:  # whatever stopped the run
        history.end()
