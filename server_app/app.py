"""The server: reads the configuration, counts the sites, builds the strategy, runs it, writes the results."""

import logging

from flwr.app import ArrayRecord, Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from models.flat import FlatModel
from models.networks import build
from server_app.census import Federation, take_census
from server_app.results import Results
from server_app.rounds import Rounds
from strategies.config import Config
from strategies.randomness import derive
from strategies.records import STATS, X, pack, unpack
from strategies.registry import round_strategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run, from the run configuration to the results folder."""
    # Flower's own lines about sampling and aggregation would drown ours; its warnings and errors stay.
    logging.getLogger("flwr").setLevel(logging.WARNING)
    config = Config.read(context.run_config)
    federation = take_census(grid, config)
    network = build(config.model, federation.shape, len(federation.classes), config.norm, derive(config.seed, "model"))
    model = FlatModel(network)
    results = Results(config)
    announce(config, federation, model, results)
    results.draw_sites(federation)

    def save(arrays: ArrayRecord) -> None:
        """Models under the names that the network's own state dict has; one file, or one a site where they learn alone."""
        vectors = {name: unpack(array) for name, array in arrays.items()}
        xs = vectors[X].reshape(-1, model.x.numel())
        stats = vectors.get(STATS, xs.new_empty(len(xs), 0)).reshape(len(xs), model.num_stats)
        names = ["model"] if vectors[X].dim() == 1 else [f"model-{site.number}" for site in federation.sites]
        results.save_model({name: model.state_dict(x, s) for name, x, s in zip(names, xs, stats, strict=True)})

    strategy = round_strategy(config, {site.node: site.num_train for site in federation.sites})
    try:
        Rounds(grid, strategy, federation, config, results, save).run(pack({X: model.x, STATS: model.stats}))
    finally:  # whatever stopped the run, what it reached is drawn and shown
        results.draw(now=True)
        results.show(federation)


def announce(config: Config, federation: Federation, model: FlatModel, results: Results) -> None:
    """Say what is about to run."""
    train = sum(site.num_train for site in federation.sites)
    for note in federation.notes:
        log(logging.WARNING, "%s", note)
    print(
        f"{config.strategy}: {len(federation.sites)} sites, {train:,} training examples of {config.data} "
        f"{federation.shape} in {len(federation.classes)} classes, {config.model} of {model.x.numel():,} parameters, "
        f"{config.epochs} epochs a site\nresults: {results.folder}",
        flush=True,
    )
