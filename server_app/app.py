"""The server: reads the configuration, finds the sites, runs the strategy, writes results."""

import logging
from collections.abc import Callable
from functools import partial

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from configuration.config import Config
from configuration.flower import log
from configuration.graph import graph_of
from configuration.network import codec_of, network_of, sends_updates
from models.flat import FlatModel
from models.pretrained import digest
from server_app.asynchronous import Asynchronous
from server_app.checkpoint import Saved, find
from server_app.consensus import report_consensus
from server_app.discovery import Federation, RunError, discover
from server_app.events import Away, Back, Began, Ended, Event, Refused, Sink
from server_app.relay import Relay
from server_app.results import Folder
from server_app.rounds import Rounds
from strategies.averaging.adapter import Planned
from strategies.averaging.alone import Alone
from strategies.averaging.shipped import Shipped
from strategies.method import (
    AlonePlan,
    ArrivalPlan,
    ForeignPlan,
    LocalTraining,
    PeerPlan,
    RoundPlan,
    RoundStart,
)
from strategies.protocol import Layout
from strategies.records import STATS, X, pack
from strategies.robust import capped

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the app, from the run configuration to the results folder."""
    config = Config.read(context.run_config)
    before = find(config)
    run(grid, config, Folder(config, context.run_id, before), before[1] if before else None)


def run(grid: Grid, config: Config, sink: Sink, saved: Saved | None = None) -> None:
    """Everything that the server does, reported to ``sink``.

    With ``saved``, the checkpoint of a run that was killed, that run goes on.

    Raises:
        RunError: the run cannot start or go on; what it reached was reported.
    """
    # Flower's own lines about sampling and aggregation would hide ours; warnings and errors stay.
    logging.getLogger("flwr").setLevel(logging.WARNING)

    def emit(event: Event) -> None:
        if isinstance(event, Refused | Away | Back):
            log(logging.WARNING, "%s", event)
        sink(event)

    # An impossible graph or a missing file stops the run before a site is asked for anything.
    topology = graph_of(config) if isinstance(config.plan, PeerPlan) else None
    if config.model.initial:
        digest(config.model.initial)
    federation = discover(
        grid, config, saved.federation._replace(started=saved.next_start()) if saved else None
    )
    if topology is not None and (
        parts := topology.parts({site.number for site in federation.sites})
    ):
        raise RunError(
            "without the sites that do not take part, the peers fall into parts: "
            f"{', '.join(map(str, parts))}"
        )
    for note in federation.notes:
        log(logging.WARNING, "%s", note)
    network, warning = network_of(config, federation.shape, len(federation.classes))
    if warning:
        log(logging.WARNING, "%s", warning)
    model = FlatModel(network)
    emit(Began(federation, model))
    try:
        _drive(grid, config, federation, model, emit, saved)
    except BaseException as error:
        try:
            emit(Ended(error))
        except Exception as second:  # it must not hide the first
            log(logging.ERROR, "%s: %s", type(second).__name__, second)
        raise
    emit(Ended(None))


def _drive(
    grid: Grid,
    config: Config,
    federation: Federation,
    model: FlatModel,
    emit: Sink,
    saved: Saved | None,
) -> None:
    """Execute the plan of the run."""
    first = saved.arrays if saved and saved.arrays else {X: model.x, STATS: model.stats}
    layout, shares = layout_of(model), partial(_shares, federation, config)
    if sends_updates(config.wire) and not isinstance(config.plan, PeerPlan):
        layout = layout.with_codec(codec_of(config.wire, model.sizes))

    def initial() -> ArrayRecord:  # held here, the first model would stay in memory
        arrays = pack(first)
        if saved:
            saved.forget()
        return arrays

    def rounds(
        strategy: Strategy, instruct: Callable[[RoundStart, Tensor], LocalTraining]
    ) -> Rounds:
        driver = Rounds(grid, strategy, instruct, federation, config, layout, emit)
        if saved:
            driver.resume(saved.driver)
        return driver

    match config.plan:
        case ArrivalPlan() as plan:
            arrivals = Asynchronous(grid, plan, federation, config, layout, emit)
            if saved:
                arrivals.resume(saved.driver)
            arrivals.run(initial())
        case PeerPlan() as plan:
            relay = Relay(grid, plan, graph_of(config), federation, config, layout, emit)
            if saved:
                relay.resume(saved.driver, saved.offers)
                saved.forget()
            report_consensus(grid, relay.run(), federation, config, relay.report, relay.exchanges)
        case RoundPlan() as plan:
            planned = Planned(plan, shares(plan.weighting), robust=config.robust.rule)
            rounds(planned, planned.instruct).run(initial(), plan.site.sends if plan.site else ())
        case AlonePlan(instruct=by_itself, ensemble=ensemble):
            alone = Alone(
                {site.node: row for row, site in enumerate(federation.sites)}, ensemble=ensemble
            )
            rounds(alone, lambda start, _: by_itself(start)).run(initial())
        case ForeignPlan(build=make, instruct=foreign, weighting=weighting):
            shipped = Shipped(
                make(), shares(weighting), config.robust.max_share, config.robust.rule
            )
            rounds(shipped, lambda start, _: foreign(start)).run(initial())


def _shares(federation: Federation, config: Config, weighting: str) -> dict[int, float]:
    """Each node's share in a mean, in the order of the sites.

    The shares sum to 1, and none is above ``robust.max-share``.
    """
    sites = federation.sites
    total = sum(site.num_train for site in sites)
    shares = {
        site.node: 1 / len(sites) if weighting == "equal" else site.num_train / total
        for site in sites
    }
    return capped(shares, config.robust.max_share)


def layout_of(model: FlatModel) -> Layout:
    """The layout of a model on the wire."""
    sizes = {X: model.x.numel()} | ({STATS: model.num_stats} if model.num_stats else {})
    return Layout(sizes, model.variances)
