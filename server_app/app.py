"""The server: reads the configuration, counts the sites, builds the strategy, runs it, writes the results."""

import logging

import torch
from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from models.flat import FlatModel
from models.networks import build
from server_app.asynchronous import Asynchronous
from server_app.census import RunError, take_census
from server_app.consensus import conclude
from server_app.events import Began, Ended, Event, Refused, Sink
from server_app.relay import Relay
from server_app.results import Folder
from server_app.rounds import Rounds
from strategies.config import Config, ConfigError
from strategies.protocol import Layout
from strategies.randomness import derive
from strategies.records import STATS, X, pack
from strategies.registry import arrival_plan, peer_plan, peer_topology, round_strategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run, from the run configuration to the results folder."""
    config = Config.read(context.run_config)
    run(grid, config, Folder(config))


def run(grid: Grid, config: Config, sink: Sink) -> None:
    """Everything that the server does, reported to ``sink``.

    Raises:
        RunError: the run cannot start or go on; what it reached was reported.
    """
    # Flower's own lines about sampling and aggregation would drown ours; its warnings and errors stay.
    logging.getLogger("flwr").setLevel(logging.WARNING)

    def emit(event: Event) -> None:
        if isinstance(event, Refused):
            log(logging.WARNING, "%s", event)
        sink(event)

    topology = peer_topology(config) if config.unit == "exchange" else None  # one that cannot be stops the run here
    if config.unit == "round":
        _check_arguments(config)
    federation = take_census(grid, config)
    if topology is not None and (parts := topology.parts({site.number for site in federation.sites})):
        raise RunError(f"without the sites that do not take part, the peers fall into parts: {', '.join(map(str, parts))}")
    for note in federation.notes:
        log(logging.WARNING, "%s", note)
    model = FlatModel(build(config.model, federation.shape, len(federation.classes), config.norm, derive(config.seed, "model")))
    initial, layout = pack({X: model.x, STATS: model.stats}), layout_of(model)
    emit(Began(federation, model))
    try:
        if topology is not None:
            relay = Relay(grid, peer_plan(config), topology, federation, config, layout, emit)
            conclude(grid, relay.run(), federation, config, relay.report, relay.exchanges)
        elif config.unit == "update":
            Asynchronous(grid, arrival_plan(config), federation, config, layout, emit).run(initial)
        else:
            strategy = round_strategy(config, {site.node: site.num_train for site in federation.sites})
            Rounds(grid, strategy, federation, config, layout, emit).run(initial)
    except BaseException as error:
        try:
            emit(Ended(error))
        except Exception as second:  # it must not hide the first
            log(logging.ERROR, "%s: %s", type(second).__name__, second)
        raise
    emit(Ended(None))


def _check_arguments(config: Config) -> None:
    """Make the strategy once before any site works.

    Raises:
        ConfigError: it refuses its arguments.
    """
    try:
        round_strategy(config, {})
    except Exception as error:
        raise ConfigError(f"strategy-arguments = {config.strategy_arguments!r}: {config.strategy}: {error}") from error


def layout_of(model: FlatModel) -> Layout:
    """How a model looks on the wire."""
    named = [(name, buffer) for name, buffer in model.network.named_buffers() if buffer.is_floating_point()]
    marks = [torch.full((buffer.numel(),), name.endswith("running_var")) for name, buffer in named]
    sizes = {X: model.x.numel()} | ({STATS: model.num_stats} if model.num_stats else {})
    return Layout(sizes, torch.cat([torch.empty(0, dtype=torch.bool), *marks]))
