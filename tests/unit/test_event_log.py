"""The event log of a run: what a line says.

Whatever happens to the file, and whatever kinds of events come.
"""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from flwr.app import ArrayRecord

from configuration.config import Config, configuration
from configuration.flower import log
from models.flat import FlatModel
from server_app import event_log
from server_app.discovery import Federation, RunError, Site
from server_app.event_log import EventFormatter, EventLog, JsonConsole, is_running
from server_app.events import EVERYBODY, Began, Ended, Event, NewModel, Progress, Refused, Reported

SITES = tuple(
    Site(number, 10 + number, f"site {number}", 8, 4, (), b"", b"") for number in range(3)
)


@pytest.fixture
def config() -> Config:
    return configuration(strategy="fedavg", num_sites=3)


def began() -> Began:
    return Began(
        Federation(SITES, ("a", "b"), (1, 2, 2), None, ()), FlatModel(torch.nn.Linear(4, 2))
    )


def reported(number: int, site: int | str) -> Reported:
    return Reported(number, 1.0, site, "train", {"loss": 1.0}, 5, 6)


def progress(number: int) -> Progress:
    many = {f"recall-{index}": 0.5 for index in range(100)}
    return Progress(
        "round", number, 1.0, number, 4, 2.0, 0.1, {"loss": math.inf}, {"accuracy": 0.5, **many}
    )


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_lines_say_time_run_round_site_and_what_happened(config: Config, tmp_path: Path) -> None:
    sink = EventLog(config, tmp_path)
    events: tuple[Event, ...] = (
        began(),
        reported(1, 0),
        reported(1, 2),
        reported(1, EVERYBODY),
        NewModel(ArrayRecord()),
        Refused("round 1", SITES[1], "training", "x holds NaN"),
        progress(1),
        *(reported(2, site) for site in range(3)),
        progress(2),
        Ended(RunError("too few")),
    )
    for event in events:
        sink(event)
    first, refused, one, two, ended = lines(tmp_path / "events.jsonl")
    assert {line["run"] for line in (first, refused, one, two, ended)} == {tmp_path.name}
    assert first["kind"] == "began"
    assert first["parameters"] == 10
    assert [site["name"] for site in first["sites"]] == ["site 0", "site 1", "site 2"]
    assert {key: refused[key] for key in ("kind", "round", "site", "name", "phase", "reason")} == {
        "kind": "refused",
        "round": 1,
        "site": 1,
        "name": "site 1",
        "phase": "training",
        "reason": "x holds NaN",
    }
    assert (one["reported"], two["reported"]) == ([0, 2], "all")
    assert one["test"] == {"accuracy": 0.5}  # metrics.csv has the others
    assert one["train"] == {"loss": None}  # JSON has no infinity
    assert (ended["kind"], ended["error"]) == ("ended", "RunError: too few")


def test_events_that_nobody_knows_yet_are_written_too(config: Config) -> None:
    class Away(NamedTuple):
        when: str
        site: Site
        since: float
        other: object

    line = EventFormatter(config).format(Away("round 7", SITES[2], 3.5, object()))  # type: ignore[arg-type]
    assert line is not None
    assert {key: line[key] for key in ("kind", "round", "site", "name", "since", "other")} == {
        "kind": "away",
        "round": 7,
        "site": 2,
        "name": "site 2",
        "since": 3.5,
        "other": None,
    }


def test_what_is_still_to_be_computed_is_no_line(config: Config) -> None:
    class Checkpoint(NamedTuple):
        state: Callable[[], dict[str, Any]]

    assert EventFormatter(config).format(Checkpoint(dict)) is None  # type: ignore[arg-type]


def test_event_log_is_bounded_and_keeps_how_the_run_began(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_log, "MOST", 20_000)
    sink = EventLog(config, tmp_path)
    sink(began())
    for number in range(1, 300):
        sink(Refused(f"round {number}", SITES[0], "training", "x" * 10_000))
        assert (tmp_path / "events.jsonl").stat().st_size <= 20_000
    sink(Ended(None))
    found = lines(tmp_path / "events.jsonl")
    assert found[0]["kind"] == "began"
    assert [line["round"] for line in found[-3:-1]] == [298, 299]
    assert found[-1]["kind"] == "ended"


def test_event_log_that_is_deleted_is_written_again_and_one_that_is_there_goes_on(
    config: Config, tmp_path: Path
) -> None:
    file = tmp_path / "events.jsonl"
    sink = EventLog(config, tmp_path)
    sink(began())
    file.unlink()
    sink(progress(1))
    assert [line["kind"] for line in lines(file)] == ["began", "progress"]
    sink(Ended(None))
    again = EventLog(config, tmp_path)
    again(began())
    again(Ended(None))
    assert [line["kind"] for line in lines(file)] == [
        "began",
        "progress",
        "ended",
        "began",
        "ended",
    ]


def test_others_see_whether_the_run_goes_on(config: Config, tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    assert not is_running(file)
    sink = EventLog(config, tmp_path)
    sink(began())
    assert is_running(file)
    sink(Ended(None))
    assert not is_running(file)
    killed = EventLog(config, tmp_path)
    killed(began())
    assert is_running(file)
    del killed  # as its process
    assert not is_running(file)


def test_json_log_has_run_round_and_site_and_no_event_twice(
    config: Config, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("flwr")
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    try:
        sink = JsonConsole(config)
        sink.formatter.run = "a-run"
        refused = Refused("round 3", SITES[1], "training", "no")
        sink(began())
        sink(progress(2))
        log(logging.WARNING, "%s", refused)
        sink(refused)
        log(logging.WARNING, "waiting for %d sites", 2)
        sink(Ended(None))
    finally:
        logger.removeHandler(handler)
    out, err = capfd.readouterr()
    printed = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    logged = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert [line["kind"] for line in printed if line["kind"] not in ("log", "refused")] == [
        "began",
        "progress",
        "ended",
    ]
    both = {line["message"]: line for line in (*printed, *logged) if "message" in line}
    assert {key: both[str(refused)][key] for key in ("run", "round", "site", "level")} == {
        "run": "a-run",
        "round": 3,
        "site": 1,
        "level": "warning",
    }
    waiting = both["waiting for 2 sites"]
    assert (waiting["round"], waiting["site"], waiting["kind"]) == (2, None, "log")
    assert handler.formatter is None
