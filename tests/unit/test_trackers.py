"""Experiment trackers: what they get, and what is said where they are missing.

Their failures cost the run nothing.
"""

from pathlib import Path
from threading import Event

import pytest

from configuration.config import Config, configuration
from configuration.errors import ConfigError
from server_app import trackers
from server_app.discovery import RunError
from server_app.events import EVERYBODY, Ended, Reported
from server_app.results import Folder
from server_app.trackers import Trackers


def config_of(names: str, folder: Path) -> Config:
    return configuration(strategy="fedavg", results={"trackers": names, "folder": str(folder)})


def reported(number: int, site: int | str = EVERYBODY) -> Reported:
    return Reported(
        number,
        2.0,
        site,
        "test",
        {"accuracy": number / 4, "loss": 0.5, "num-examples": 4.0},
        30,
        40,
    )


def test_missing_library_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"results.trackers = 'mlflow': mlflow is not installed; .*--extra mlflow"
    ):
        Folder(config_of("mlflow", tmp_path))
    Folder(config_of("", tmp_path))


def test_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"results.trackers = 'wandb': allowed: tensorboard, mlflow"
    ):
        config_of("wandb", tmp_path)


def test_tensorboard_gets_the_metrics_of_all_sites_and_the_headline_of_each(tmp_path: Path) -> None:
    pytest.importorskip(
        "tensorboard", reason="tensorboard is not installed: an extra of this project"
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = Trackers(config_of("tensorboard", tmp_path)).begin(tmp_path)
    for number in (1, 2, 3):
        sink(reported(number))
        sink(reported(number, 0))
    sink(Ended(None))
    found = EventAccumulator(str(tmp_path)).Reload()
    assert [(each.step, each.value) for each in found.Scalars("test/accuracy")] == [
        (1, 0.25),
        (2, 0.5),
        (3, 0.75),
    ]
    assert [each.value for each in found.Scalars("test/accuracy/site-0")] == [0.25, 0.5, 0.75]
    assert [each.value for each in found.Scalars("test/bytes-up")] == [30.0] * 3


def test_mlflow_gets_the_configuration_and_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed: an extra of this project")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", address := f"sqlite:///{tmp_path / 'mlflow.db'}")
    sink = Trackers(config_of("mlflow", tmp_path)).begin(tmp_path)
    for number in (1, 2):
        sink(reported(number))
    sink(Ended(RunError("stopped")))
    (run,) = MlflowClient(address).search_runs(["0"])
    assert (run.info.status, run.info.run_name) == ("FAILED", tmp_path.name)
    assert run.data.params["strategy"] == "fedavg"
    assert run.data.metrics["test/accuracy"] == 0.5


def test_tracker_that_fails_or_hangs_costs_the_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, got = Event(), list[int]()

    def failing(number: int, values: object) -> None:
        raise ConnectionError("nobody there")

    def slow(number: int, values: object) -> None:
        hangs.wait()
        got.append(number)

    starts = {
        "mlflow": lambda *_: (failing, lambda _: None),
        "tensorboard": lambda *_: (slow, lambda _: None),
    }
    monkeypatch.setattr(trackers, "STARTS", starts)
    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    sink = Trackers(config_of("mlflow tensorboard", tmp_path)).begin(tmp_path)
    for number in (1, 2, 3):
        sink(reported(number))
    assert got == []  # the run went on
    hangs.set()
    sink(Ended(None))
    assert got == [1, 2, 3]
