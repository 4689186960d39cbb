"""Asynchronous strategies: the real ServerApp and ClientApp in virtual time.

Sites are slow, fail, die and come back.
"""

import math
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from flwr.app import Error, Message
from matplotlib.image import imread

from client_app.app import app as client_app
from client_app.framing import STOPPED
from configuration.config import configuration
from server_app.app import run as run_server
from server_app.discovery import RunError
from server_app.results import History
from simulation.grid import VirtualGrid
from simulation.laboratory import Run, simulate
from simulation.world import Lognormal, World
from strategies.methods import METHODS
from tests.conftest import RunApp

UNEQUAL = World(samples_per_s=Lognormal(median=100, sigma=0.7))
SMALL: dict[str, Any] = {
    "num_sites": 4,
    "epochs": 6,
    "model.name": "mlp",
    "training.lr": 0.05,
    "training.lr-ratio": 1.0,
    "progress": False,
}
TOTAL = 6 * 48  # updates: four sites of 12 batches


def run(world: World = UNEQUAL, **changes: Any) -> Run:
    return simulate(**(SMALL | changes), world=world)


def updates(found: Run, site: str = "all") -> list[float]:
    rows = found.metrics.query("metric == 'updates' and split == 'train'")
    return [float(value) for value in rows[rows["site"] == site]["value"]]


def staleness(found: Run) -> Counter[int]:
    rows = found.metrics[found.metrics["metric"].str.startswith("staleness-")]
    return Counter(
        {
            int(str(name).removeprefix("staleness-")): int(n)
            for name, n in rows.groupby("metric")["value"].sum().items()
        }
    )


@pytest.mark.parametrize("base", ["dc-asgd-c", "dc-asgd-a", "adam", "rmsprop"])
def test_gsgm_stands_on_other_optimizers(base: str) -> None:
    found = run(
        strategy="gsgm",
        epochs=10,
        gsgm={"base": base, "server_lr": 0.003 if base in ("adam", "rmsprop") else 1.0},
    )
    assert found.history["accuracy"].iloc[-1] > 0.7


NOTHING = {"window": 1, "momentum": 0.0, "schedule": "list", "slack": 1e9}


def test_gsgm_with_everything_off_is_asgd_bit_for_bit() -> None:
    gsgm, asgd = (
        run(strategy="gsgm", gsgm=NOTHING),
        run(strategy="asgd"),
    )
    assert all(torch.equal(gsgm.model[name], asgd.model[name]) for name in asgd.model)
    assert gsgm.metrics.equals(asgd.metrics)


def test_same_seed_same_history() -> None:
    one, two = run(strategy="gsgm"), run(strategy="gsgm")
    assert one.metrics.equals(two.metrics)
    assert all(torch.equal(one.model[name], two.model[name]) for name in one.model)


def test_white_list_is_even_and_bounds_staleness_where_asgd_does_neither() -> None:
    even, uneven = run(strategy="gsgm"), run(strategy="asgd")
    for found, spread in ((even, 1), (uneven, math.inf)):
        counts = [sum(updates(found, str(site))) for site in range(4)]
        assert sum(counts) == TOTAL
        assert max(counts) - min(counts) <= spread
    assert max(counts) - min(counts) > 10
    assert sum(staleness(even).values()) == TOTAL
    assert max(staleness(even)) <= 2 * 3
    assert max(staleness(uneven)) > 2 * 3


def test_waiting_for_the_slowest_costs_time_and_the_local_reading_uses_it() -> None:
    asgd, strict, local = (
        run(strategy="asgd"),
        run(strategy="gsgm"),
        run(strategy="gsgm", gsgm={"schedule": "local"}),
    )
    assert strict.summary["hours"] > 1.3 * asgd.summary["hours"]
    counts = [sum(updates(local, str(site))) for site in range(4)]
    assert max(counts) - min(counts) <= 1
    bytes_of = {
        name: found.metrics["bytes_up"].max()
        for name, found in (("strict", strict), ("local", local))
    }
    # Nobody idles: what fast sites send is averaged.
    assert bytes_of["local"] > 1.3 * bytes_of["strict"]


def test_slack_trades_evenness_for_time() -> None:
    strict, loose = (
        run(strategy="gsgm", gsgm={"schedule": "list", "slack": slack}) for slack in (0.0, 10.0)
    )
    counts = [sum(updates(loose, str(site))) for site in range(4)]
    assert 1 < max(counts) - min(counts) <= 11
    assert loose.summary["hours"] < strict.summary["hours"]


@pytest.mark.parametrize("strategy", ["gsgm", "fedbuff"])
def test_site_that_dies_halfway_does_not_stop_the_run(strategy: str) -> None:
    world = World(samples_per_s=100, offline={2: [(8.0, math.inf)]})
    found = run(world, strategy=strategy)
    assert found.finished
    gone = updates(found, "2")
    assert gone[0] > 0
    assert gone[-1] == 0
    assert sum(updates(found)) == round(TOTAL / METHODS[strategy].keys().local_steps)
    assert found.history["accuracy"].iloc[-1] > 0.6


def test_site_that_comes_back_contributes_again() -> None:
    world = World(samples_per_s=100, offline={2: [(8.0, 90.0)]})
    found = run(world, strategy="gsgm", epochs=20)
    each = updates(found, "2")
    assert 0 in each
    assert each[-1] == pytest.approx(updates(found, "0")[-1], abs=1)


def test_site_that_is_silent_is_set_aside_until_it_answers() -> None:
    """It is there, but slower than the timeout: the others go on without it."""
    found = run(World(samples_per_s=[100, 100, 100, 1]), strategy="gsgm", timeout_s=20.0)
    assert found.finished
    assert sum(updates(found, "3")) == 0
    assert sum(updates(found)) == TOTAL


def spoil(site: int) -> Any:
    def tamper(number: int, message: Message, reply: Message) -> Message:
        if number == site and message.metadata.message_type == "train":
            reply.content.metric_records["metrics"]["loss"] = math.nan
        return reply

    return tamper


def test_site_that_sends_nan_is_left_out_by_name(
    run_app: RunApp, caplog: pytest.LogCaptureFixture
) -> None:
    found = run_app(spoil(1), strategy="gsgm", num_sites=3, epochs=3)
    assert (
        "update 1: site 1 (site 1) is left out of the training: loss is nan: "
        "must be a finite number" in caplog.text
    )
    assert found.trace("updates", "train", "1") == [0] * len(found.trace("updates", "train", "1"))
    assert sum(found.trace("updates", "train")) == 3 * 45


def test_too_few_sites_that_can_be_used_stop_the_run() -> None:
    def all_but_one(number: int, message: Message, reply: Message) -> Message:
        return spoil(number)(number, message, reply) if number > 0 else reply

    config = configuration(strategy="gsgm", num_sites=3, epochs=2, model={"name": "mlp"})
    history = History(config)
    with pytest.raises(
        RunError,
        match=r"1 sites go on and no others will, min-sites = 2: stopped\. site 1, site 2: "
        r"loss is nan",
    ):
        run_server(
            VirtualGrid(client_app, World().sites(3, 1), config.flat(), all_but_one),
            config,
            history,
        )


AWAY: dict[str, Any] = {
    "strategy": "gsgm",
    "num_sites": 2,
    "min_sites": 1,
    "epochs": 2,
    "training.batch-size": 64,
}


def test_test_that_nobody_can_take_is_not_waited_for() -> None:
    world = World(samples_per_s=[64, 0.5], offline={0: [(100, 400)], 1: [(100, 400)]})
    assert run(world, **AWAY, results={"evaluate_every": 1}, timeout_s=36000.0).finished


@pytest.mark.slow
def test_site_that_is_back_is_sent_one_message_not_two() -> None:
    """Its earlier contribution is applied while it is away.

    That alone would send it the newest model.
    """
    world = World(samples_per_s=[64, 0.5], offline={0: [(10, 100)]})
    assert run(world, **AWAY, gsgm={"schedule": "local"}).finished


@pytest.mark.parametrize("schedule", ["list", "refill"])
@pytest.mark.parametrize("dead", [[0], [0, 1]])
def test_sites_that_die_while_they_wait_for_the_others_do_not_stop_the_run(
    schedule: str, dead: list[int]
) -> None:
    """Who is left goes on, and is sent each model once."""
    world = World(
        samples_per_s=[640, 640, 640, 0.5, 0.5],
        offline={site: [(10.0 + site, math.inf)] for site in dead},
    )
    keys = AWAY | {"num_sites": 5, "epochs": 3}
    found = run(world, **keys, gsgm={"schedule": schedule})
    assert found.finished
    for site in dead:
        assert updates(found, str(site))[-1] == 0
    assert min(sum(updates(found, str(site))) for site in (2, 3, 4)) > 0


def test_site_that_died_at_work_is_missed_even_where_sites_come_and_go() -> None:
    world = World(offline={0: [(5, math.inf)]}, samples_per_s=50, mean_up_s=1000, mean_down_s=30)
    found = run(world, strategy="gsgm", epochs=2, results={"evaluate_every": 4})
    assert found.finished
    assert found.summary["hours"] < 0.1  # not the timeout


def test_everybody_dead_ends_the_run_with_what_was_reached() -> None:
    dead = World(samples_per_s=100, offline={site: [(10.0, math.inf)] for site in range(4)})
    with pytest.raises(
        RunError, match=r"0 sites go on after patience-s = 21600, min-sites = 2: stopped"
    ):
        run(dead, strategy="gsgm")


def test_everybody_too_slow_ends_the_run() -> None:
    with pytest.raises(
        RunError, match=r"0 sites go on after patience-s = 5, min-sites = 2: stopped"
    ):
        run(World(samples_per_s=1), strategy="gsgm", timeout_s=5.0, patience_s=5.0)


def test_site_that_fails_and_then_is_gone_counts_once() -> None:
    def fail(number: int, message: Message, reply: Message) -> Message:
        training = message.metadata.message_type == "train"
        return (
            Message(Error(2, "out of memory"), reply_to=message)
            if number == 3 and training
            else reply
        )

    config = configuration(
        strategy="asgd",
        num_sites=4,
        min_sites=3,
        epochs=8,
        model={"name": "mlp"},
        results={"evaluate_every": 20},
        timeout_s=50.0,
    )
    history = History(config)
    sites = World(samples_per_s=100, offline={3: [(2.0, math.inf)]}).sites(4, 1)
    run_server(VirtualGrid(client_app, sites, config.flat(), fail), config, history)
    assert sum(history.metrics.query("metric == 'updates' and site == 'all'")["value"]) == 8 * 48


def test_service_that_is_away_is_called_ever_less_often() -> None:
    calls = []

    def away(number: int, message: Message, reply: Message) -> Message:
        if number == 3 and message.metadata.message_type == "train":
            calls.append(grid.now())
            return (
                reply
                if len(calls) > 9
                else Message(Error(STOPPED, "nobody listens"), reply_to=message)
            )
        return reply

    config = configuration(strategy="asgd", num_sites=4, epochs=8, model={"name": "mlp"})
    grid = VirtualGrid(client_app, World(samples_per_s=50).sites(4, 1), config.flat(), away)
    run_server(grid, config, History(config))
    between = [later - earlier for earlier, later in pairwise(calls[:8])]
    assert all(longer > 1.5 * shorter for shorter, longer in pairwise(between))


def test_budget_that_holds_no_update_is_refused() -> None:
    with pytest.raises(
        RunError, match="local-steps = 1000: epochs = 2 have 96 batches; at most these"
    ):
        run(strategy="gsgm", gsgm={"local_steps": 1000}, epochs=2)
    with pytest.raises(
        RunError, match="epochs = 2: 19 contributions, and fedbuff needs 100 for a step"
    ):
        run(strategy="fedbuff", fedbuff={"buffer_size": 100}, epochs=2)


def test_results_show_staleness_and_contributions(
    run_app: RunApp, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_app(strategy="gsgm", epochs=3, draw=True)
    assert imread(found.folder / "arrivals.png").shape[0] > 200
    assert not (found.folder / "schedule.png").exists()
    printed = capsys.readouterr().out
    assert "update    45 | epoch 1/3 | lr" in printed
    assert "staleness 1.0" in printed
    assert "gsgm after 135 updates" in printed
    assert Run.load(found.folder).finished


def test_batch_norm_statistics_are_averaged_too() -> None:
    found = run(
        strategy="gsgm",
        model={"name": "resnet20"},
        data={"source": "tests.data:few"},
        num_sites=2,
        epochs=2,
    )
    assert not torch.equal(found.model["stem.1.running_mean"], torch.zeros(16))
    assert (found.model["stem.1.running_var"] > 0).all()
