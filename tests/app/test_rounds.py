"""Rounds with sites that are silent, slow or come back.

Runs that end without anything of use say so.
"""

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict

from configuration.config import Config, configuration
from configuration.errors import ConfigError
from server_app.app import run
from server_app.discovery import RunError
from server_app.events import Checkpoint, Event, NewModel
from server_app.results import Folder
from strategies.averaging import fedavg
from strategies.method import Mean, Method, RoundPlan, Run
from strategies.protocol import read_order
from strategies.records import config_of
from tests.app.stubs import NETWORK, Answer, Outcome, Sites, Spoil, outcome


def rounds(number: int = 4, **changes: Any) -> Config:
    """One epoch a round."""
    common: dict[str, Any] = {"strategy": "fedavg", "num_sites": 4, "model": {"name": NETWORK}}
    own: dict[str, Any] = {} if "strategy" in changes else {"fedavg.local-epochs": 1}
    return configuration(epochs=number, **common | changes | own)


def took_part(found: Outcome, site: int, split: str = "train") -> list[int]:
    rows = found.metrics.query(f"metric == 'loss' and split == '{split}' and site == '{site}'")
    return [int(number) for number in rows["round"]]


def silent(site: int, rounds: range, kinds: tuple[str, ...] = ("train", "evaluate")) -> Spoil:
    """A site whose answers are lost in some rounds."""

    def spoil(number: int, message: Message, content: RecordDict) -> Answer:
        if number != site or message.metadata.message_type not in kinds:
            return content
        return None if read_order(config_of(message)).number in rounds else content

    return spoil


def test_site_that_never_answers_is_waited_for_once() -> None:
    found = outcome(rounds(8), silent(2, range(1, 99)))
    assert found.error is None
    assert took_part(found, 2) == []
    assert 3600 < found.seconds < 3600 + 8 * 3
    assert len(found.refused) == 1  # its other messages are still under way


@pytest.mark.parametrize("strategy", ["gsgm", "d-psgd"])
def test_others_wait_once_for_a_site_that_never_answers_too(strategy: str) -> None:
    def mute(site: int, message: Message, content: RecordDict) -> Answer:
        return None if site == 2 and message.metadata.message_type != "query.site" else content

    small: dict[str, Any] = {"model": {"name": NETWORK}, "training": {"batch_size": 4}}
    found = outcome(configuration(strategy=strategy, num_sites=4, epochs=8, **small), mute)
    assert found.error is None
    assert 3600 < found.seconds < 3600 + 60


def sample(found: Outcome, number: int) -> set[int]:
    return {site for site in range(found.config.num_sites) if number in took_part(found, site)}


def test_sample_of_the_sites_takes_part_in_a_round() -> None:
    """Two of five, which follow from seed and round; after the last round all test."""
    half: dict[str, Any] = {"num_sites": 5, "sampling.fraction": 0.5}
    found = outcome(rounds(60, **half))
    again, other = (outcome(rounds(10, **half, seed=seed)) for seed in (1, 2))
    samples = [sample(found, number) for number in range(1, 61)]
    assert {len(each) for each in samples} == {2}
    assert samples[:10] == [sample(again, number) for number in range(1, 11)]
    assert samples[:10] != [sample(other, number) for number in range(1, 11)]
    # A round is tested by those who train next.
    tested = [
        {site for site in range(5) if number in took_part(found, site, "test")}
        for number in range(1, 61)
    ]
    assert tested == [*samples[1:], set(range(5))]
    # Each site, and each pair of them, equally often: a sample's mean is unbiased.
    values = np.array([3.0, 1.0, 4.0, 1.0, 5.0])
    means = np.array([values[list(each)].mean() for each in samples])
    error = means.std(ddof=1) / len(means) ** 0.5
    assert abs(means.mean() - values.mean()) < 2 * error
    counts = np.array([sum(site in each for each in samples) for site in range(5)])
    assert np.abs(counts - 24).max() < 3 * (60 * 0.4 * 0.6) ** 0.5
    assert len({tuple(each) for each in samples}) == 10
    whole = outcome(rounds(60, num_sites=5))
    up, down = (
        found.metrics[way].iloc[-1] / whole.metrics[way].iloc[-1]
        for way in ("bytes_up", "bytes_down")
    )
    assert 0.4 < up < 0.45
    assert 0.4 < down < 0.45


@pytest.mark.parametrize("strategy", ["fedavg", "co-learning", "FedAvg", "diloco"])
def test_model_of_a_sample_is_the_mean_of_those_in_it(strategy: str) -> None:
    """As if the others had been lost."""
    keys: dict[str, Any] = {"strategy": strategy, "num_sites": 4}
    if strategy in ("fedavg", "co-learning"):
        keys[f"{strategy}.weighting"] = "samples"
    found = outcome(rounds(1, **keys, **{"sampling.fraction": 0.6}))
    others = set(range(4)) - sample(found, 1)
    assert len(others) == 2

    def lost(site: int, message: Message, content: RecordDict) -> Answer:
        return None if site in others and message.metadata.message_type == "train" else content

    expected = outcome(rounds(1, **keys), lost)
    assert sample(expected, 1) == sample(found, 1)
    for name, value in expected.models["model"].items():
        assert torch.equal(found.models["model"][name], value)


def test_sample_is_of_the_sites_that_are_there_and_never_too_small() -> None:
    half: dict[str, Any] = {"num_sites": 4, "sampling.fraction": 0.5, "min_sites": 1}
    whole = outcome(rounds(30, **half))
    without = outcome(rounds(30, **half), silent(2, range(1, 99)))
    (first, *later) = (number for number in range(1, 31) if 2 in sample(whole, number))
    for number in range(1, 31):
        there, before = sample(without, number), sample(whole, number)
        assert there.isdisjoint({2})
        if number == first:  # lost, and not yet known to be away
            assert there == before - {2}
        else:
            assert len(there) == 2
            assert there >= before - {2}
    assert len(later) > 5
    few = outcome(rounds(5, num_sites=4, **{"sampling.fraction": 0.01, "min_sites": 3}))
    assert {len(sample(few, number)) for number in range(1, 6)} == {3}
    one = outcome(rounds(5, num_sites=4, **{"sampling.fraction": 0.01, "min_sites": 1}))
    assert {len(sample(one, number)) for number in range(1, 6)} == {1}


@pytest.mark.parametrize("strategy", ["gsgm", "dmsgd", "local", "ensemble", "centralized"])
def test_method_without_rounds_of_many_refuses_a_sample(strategy: str) -> None:
    said = rf"sampling.fraction = 0.5: has no effect with strategy = '{strategy}'; taken by co-l"
    with pytest.raises(ConfigError, match=said):
        configuration(strategy=strategy, sampling={"fraction": 0.5})
    with pytest.raises(ConfigError, match=r"sites in a round = 2: .*median.* needs at least 3"):
        configuration(sampling={"fraction": 0.4}, robust={"mean": "median"})


def test_silent_site_is_waited_for_again_after_its_answer(caplog: pytest.LogCaptureFixture) -> None:
    """Its training is lost in round 1; from round 2 on it is slow: its answer comes in round 5."""

    def slow(site: int, message: Message) -> float:
        return 3.5 if site == 2 else 1.0

    found = outcome(rounds(8), silent(2, range(1, 2), ("train",)), seconds=slow)
    assert found.error is None
    assert took_part(found, 2) == [6, 7, 8]
    assert "site 2 answers again, but too late" in caplog.text
    up = {site: found.metrics.query(f"site == '{site}'")["bytes_up"].iloc[0] for site in (1, 2)}
    assert up[2] > up[1] + 50  # with the answer that came too late


def test_site_that_answers_in_time_while_nobody_waits_takes_part_at_once() -> None:
    found = outcome(rounds(4), silent(2, range(1, 2), ("train",)))
    assert took_part(found, 2) == [2, 3, 4]
    assert took_part(found, 2, "test") == [1, 2, 3, 4]


def test_site_that_stays_silent_is_called_ever_less_often() -> None:
    called: list[int] = []
    mute = silent(2, range(1, 99))

    def watch(site: int, message: Message, content: RecordDict) -> Answer:
        if site == 2 and message.metadata.message_type != "query.site":
            called.append(read_order(config_of(message)).number)
        return mute(site, message, content)

    outcome(rounds(40), watch)
    assert called == [1, 2, 4, 8, 16, 32]


def test_message_of_before_that_nobody_answers_does_not_send_a_site_away_that_is_back() -> None:
    """That is known an hour later: rounds take 500 seconds."""

    def slow(site: int, message: Message) -> float:
        return 900.0 if site == 2 else 500.0

    found = outcome(rounds(9), silent(2, range(1, 2)), seconds=slow)
    assert took_part(found, 2) == [4, 5, 6, 7, 8, 9]  # called in the third, where it comes too late
    assert took_part(found, 2, "test") == [3, 4, 5, 6, 7, 8, 9]  # each with the training after it


def test_too_few_without_a_silent_site_means_waiting_for_it() -> None:
    """All four are needed: from round 2 on one is away, but each round waits for its answer."""

    def slow(site: int, message: Message) -> float:
        return 3.5 if site == 2 else 1.0

    # A strategy whose tests are messages of their own.
    alone = {"strategy": "ensemble", "ensemble.local-epochs": 1}
    found = outcome(
        rounds(3, min_sites=4, **alone), silent(2, range(1, 2), ("evaluate",)), seconds=slow
    )
    assert found.error is None
    assert took_part(found, 2) == [1, 2, 3]


def test_silent_site_that_the_grid_lost_and_has_again_is_waited_for() -> None:
    """Silent in round 1, not connected in 2 and 3; from round 4 on it has its time to answer."""
    absent, trained = False, 0

    class Grid(Sites):
        def get_node_ids(self) -> Any:
            return [node for node in super().get_node_ids() if not (absent and node == 1002)]

    lost = silent(2, range(1, 2))

    def watch(site: int, message: Message, content: RecordDict) -> Answer:
        nonlocal absent, trained
        if site == 0 and message.metadata.message_type == "train":
            trained += 1
            absent = trained in (1, 2)
        return lost(site, message, content)

    config = rounds(6)
    found = Outcome(config)
    run(Grid(config, watch, lambda site, message: 9.0 if site == 2 else 1.0), config, found)
    assert took_part(found, 2) == [4, 5, 6]


def unusable(kind: str) -> Spoil:
    def spoil(site: int, message: Message, content: RecordDict) -> Answer:
        if message.metadata.message_type == kind:
            content.metric_records["metrics"]["loss"] = math.nan
        return content

    return spoil


@pytest.mark.parametrize("strategy", ["fedavg", "local", "Krum", "gsgm"])
def test_run_whose_model_nobody_can_test_is_an_error(strategy: str) -> None:
    found = outcome(rounds(2, strategy=strategy), unusable("evaluate"))
    assert isinstance(found.error, RunError)
    assert "no site could test the model: it is of no use" in str(found.error)
    assert found.new_models  # the model of the first rounds stays


@pytest.mark.parametrize("strategy", ["fedavg", "local", "ensemble", "FedMedian", "gsgm"])
def test_last_model_is_tested_when_sites_are_back(strategy: str) -> None:
    """All are away when it is to be tested, such as while a SuperLink is started again."""
    asked: Counter[int] = Counter()

    def spoil(site: int, message: Message, content: RecordDict) -> Answer:
        asked[site] += message.metadata.message_type == "evaluate"
        return None if asked[site] == 1 else content

    found = outcome(rounds(1, strategy=strategy), spoil)
    assert found.error is None
    assert [took_part(found, site, "test") != [] for site in range(4)] == [True] * 4
    assert set(asked.values()) == {2}


@pytest.mark.parametrize("strategy", ["fedavg", "gsgm"])
def test_last_test_has_an_end(strategy: str) -> None:
    """And no checkpoint is beyond it: a run that goes on trains its last round again."""
    config = rounds(1, strategy=strategy, patience_s=10_000)
    found, checkpoints = Outcome(config), list[Event]()

    def sink(event: Event) -> None:
        found(event)
        checkpoints.extend([event] if isinstance(event, Checkpoint) else [])

    def spoil(site: int, message: Message, content: RecordDict) -> Answer:
        return None if message.metadata.message_type == "evaluate" else content

    grid = Sites(config, spoil)
    with pytest.raises(RunError, match="no site could test the model: it is of no use"):
        run(grid, config, sink)
    assert 10_000 < grid.now() < 20_000
    assert not checkpoints


def test_last_model_is_not_tested_again_for_an_older_test() -> None:
    """Nobody answered the first test, which is known only when all is over."""
    first = set[int]()

    def spoil(site: int, message: Message, content: RecordDict) -> Answer:
        new = message.metadata.message_type == "evaluate" and site not in first
        first.update([site] if new else [])
        return None if new else content

    found = outcome(rounds(2, strategy="gsgm"), spoil)
    assert found.error is None
    tests = [took_part(found, site, "test") for site in range(4)]
    assert [len(each) for each in tests] == [1] * 4
    assert found.seconds > 3600


def test_last_model_waits_for_somebody_to_test_it() -> None:
    """Nobody is connected when the last update is made."""

    class Grid(Sites):
        away = False

        def get_node_ids(self) -> Iterable[int]:
            return [] if self.away else super().get_node_ids()

        def wait(self, poll_s: float, limit_s: float) -> None:
            self.away = False
            super().wait(poll_s, limit_s)

    found = Outcome(config := rounds(1, strategy="gsgm"))
    grid, waited = Grid(config), list[Event]()

    def sink(event: Event) -> None:
        found(event)
        if isinstance(event, NewModel):
            grid.away = True
            waited.append(event)

    run(grid, config, sink)
    assert len(waited) == 1
    assert [took_part(found, site, "test") != [] for site in range(4)] == [True] * 4


def test_one_test_that_can_be_used_is_enough() -> None:
    spoil = unusable("evaluate")
    found = outcome(
        rounds(2), lambda site, message, content: spoil(site, message, content) if site else content
    )
    assert found.error is None
    assert took_part(found, 0, "test") == [1, 2]


def test_steps_that_could_leave_the_bounds_are_not_taken() -> None:
    """With so large a server rate one contribution could: the model stays what it was."""
    keys = {"server_lr": 1e9, "window": 1, "momentum": 0.0}
    config = configuration(
        strategy="gsgm", num_sites=4, epochs=2, model={"name": NETWORK}, gsgm=keys
    )
    found = outcome(config)
    assert isinstance(found.error, RunError)
    assert (
        "with it the model may hold more than 4.19e+06; a smaller lr or server-lr may help"
        in found.refused[0].reason
    )
    assert found.new_models == []


def _fails(state: fedavg.Average, mean: Mean) -> fedavg.Average:
    raise ZeroDivisionError("by the number of sites")


def _plan(keys: fedavg.Keys, of: Run) -> RoundPlan[fedavg.Average]:
    return fedavg.plan(keys, of)._replace(absorb=_fails)


BROKEN = Method("broken", fedavg.Keys, _plan)


def test_strategy_that_fails_is_named() -> None:
    found = outcome(rounds(2, strategy="tests.app.test_rounds:BROKEN"))
    assert isinstance(found.error, RunError)
    assert str(found.error).endswith(":BROKEN fails: ZeroDivisionError: by the number of sites")


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_reply_from_somebody_else_is_refused(kind: str) -> None:
    def pretend(site: int, message: Message, reply: Message) -> Message:
        if site == 1 and message.metadata.message_type == kind:
            reply.metadata.__dict__["_src_node_id"] = 1000
        return reply

    found = outcome(rounds(1), tamper=pretend)
    assert [(event.site.number, event.reason) for event in found.refused] == [
        (1, "it says that it comes from node 1000")
    ]


@pytest.mark.parametrize(
    ("strategy", "table", "tests"),
    [
        ("fedavg", "fedavg", 1),
        ("local", "local", 1),
        ("Krum", "flower", 1),
        ("ensemble", "ensemble", 3),
    ],
)
def test_round_is_one_message(strategy: str, table: str, tests: int) -> None:
    """What a round made is tested with the next one.

    Only the last, and common predictions, are tested by themselves.
    """
    kinds: list[str] = []

    def watch(site: int, message: Message, content: RecordDict) -> Answer:
        kinds.extend([message.metadata.message_type] if site == 0 else [])
        return content

    found = outcome(rounds(3, strategy=strategy, **{f"{table}.local-epochs": 1}), watch)
    assert (kinds.count("train"), kinds.count("evaluate")) == (3, tests)
    assert took_part(found, 0, "test") == [1, 2, 3]


def test_flaw_in_a_test_costs_the_test_only() -> None:
    def spoil(site: int, message: Message, content: RecordDict) -> Answer:
        if site == 1 and "test" in content:
            content.metric_records["test"]["loss"] = math.nan
        return content

    found, honest = outcome(rounds(3), spoil), outcome(rounds(3))
    assert found.model() == honest.model()
    assert took_part(found, 1) == [1, 2, 3]
    assert took_part(found, 1, "test") == [3]
    assert [str(event) for event in found.refused] == [
        f"round {number}: site 1 (site 1) is left out of the test: loss is nan: "
        "must be a finite number"
        for number in (1, 2)
    ]


@pytest.mark.parametrize(
    "strategy", ["fedavg", "scaffold", "local", "ensemble", "Krum", "FedAdam", "gsgm", "d-psgd"]
)
@pytest.mark.parametrize("sites", [[1], range(4)])
def test_sites_that_keep_metrics_to_themselves_take_part(strategy: str, sites: list[int]) -> None:
    def reticent(site: int, message: Message, content: RecordDict) -> Answer:
        for record in content.metric_records.values() if site in sites else ():
            for name in [name for name in record if "loss" in name or "accuracy" in name]:
                del record[name]
        return content

    small: dict[str, Any] = {"model": {"name": NETWORK}, "training": {"batch_size": 4}}
    config = configuration(strategy=strategy, num_sites=4, epochs=2, **small)
    found, honest = outcome(config, reticent), outcome(config)
    assert found.error is None
    assert found.refused == []
    assert found.model() == honest.model()
    assert set(took_part(found, 0, "test")) == (
        set() if 0 in sites else set(took_part(honest, 0, "test"))
    )


@pytest.mark.parametrize("kept", [("loss", "accuracy"), ("accuracy",)])
@pytest.mark.parametrize("strategy", ["fedavg", "local", "gsgm", "d-psgd"])
def test_results_of_sites_that_keep_metrics_to_themselves_are_printed_and_drawn(
    strategy: str, kept: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reticent(site: int, message: Message, content: RecordDict) -> Answer:
        for record in content.metric_records.values():
            for name in [name for name in record if any(each in name for each in kept)]:
                del record[name]
        return content

    small: dict[str, Any] = {
        "model": {"name": NETWORK},
        "training": {"batch_size": 4},
        "results": {"folder": str(tmp_path)},
    }
    config = configuration(strategy=strategy, num_sites=4, epochs=2, **small)
    run(Sites(config, reticent), config, Folder(config))
    [row] = [line for line in capsys.readouterr().out.splitlines() if "site 1 " in line]
    assert [cell.strip() for cell in row.split("│")[2:-1]] == [
        "8",
        "4",
        "",
        "" if "loss" in kept else "2.0000",
    ]
    assert list(tmp_path.rglob("curves.png"))


def test_strategy_that_weighs_by_losses_leaves_out_who_keeps_it_to_himself() -> None:
    def reticent(site: int, message: Message, content: RecordDict) -> Answer:
        if site == 1 and message.metadata.message_type == "train":
            del content.metric_records["metrics"]["loss"]
        return content

    keys = {"arguments": "client_learning_rate=0.05"}
    found = outcome(rounds(1, strategy="QFedAvg", flower=keys), reticent)
    assert found.error is None
    assert [event.reason for event in found.refused] == [
        "it keeps its loss to itself, by which QFedAvg weighs"
    ]
