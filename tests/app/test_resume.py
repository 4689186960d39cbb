"""A run that is killed goes on: the real ServerApp and ClientApp, a server that dies at any event, and another one after it."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from client_app.app import app as client_app
from configuration.config import Config, configuration
from configuration.errors import ConfigError
from server_app import checkpoint
from server_app.app import run as run_server
from server_app.events import Event
from server_app.results import Folder
from simulation.grid import VirtualGrid
from simulation.laboratory import compare, simulate
from simulation.world import World
from strategies.method import ArrivalPlan
from strategies.methods import METHODS
from tests.conftest import own

MORE: dict[str, dict[str, Any]] = {"relaysgd": {"topology.name": "path"}, "diloco": {"diloco.local-steps": 5}}
VARIANTS: dict[str, dict[str, Any]] = {name: {"strategy": name} for name in METHODS} | {
    "sealed": {"strategy": "dmsgd", "wire.sealing": "trust-on-first-use"},
    "choco": {"strategy": "q-saddle", "wire.codec": "top-k", "wire.error-feedback": "choco"},
    "deep-squeeze": {"strategy": "d-psgd", "wire.codec": "qsgd", "wire.error-feedback": "deep-squeeze"},
    "cross-gradients": {"strategy": "n-saddle", "wire.cross-codec": "qsgd"},
    "batch norm": {"strategy": "FedAdam", "model.name": "cnn", "model.norm": "batch"},
    "coded": {"strategy": "fedavg", "wire.codec": "qsgd", "wire.down-codec": "bf16", "wire.error-feedback": "deep-squeeze"},
}


class Killed(BaseException):
    """The server's process is gone."""


def small(folder: Path, **changes: Any) -> Config:
    strategy = changes["strategy"]
    short = {key.replace("_", "-"): value for key, value in own(strategy, local_epochs=1).items()}
    base = {"num-sites": 3, "epochs": 3, "model.name": "mlp", "results.folder": str(folder), "data.test-fraction": 0.5}
    return configuration(**base | short | MORE.get(strategy, {}) | changes)  # type: ignore[arg-type]


def serve(config: Config, folder: Path, dies_at: int | None = None) -> tuple[Folder, int]:
    """Run, or go on with the unfinished run; die instead of taking notice of an event. And how many events there were."""
    config = configuration(**config.flat() | {"results.resume": "auto"})  # type: ignore[arg-type]
    before = checkpoint.find(config)
    history, count = Folder(config, 1, before), 0

    def sink(event: Event) -> None:
        nonlocal count
        if count == dies_at:
            raise Killed
        count += 1
        history(event)

    grid = VirtualGrid(client_app, World().sites(config.num_sites, 1), config.flat(), state=folder / "state")
    try:
        run_server(grid, config, sink, before[1] if before else None)
    except Killed:
        for each in history._sinks:  # what the end of a process does
            if hasattr(each, "_writer"):
                each._writer._lock.release()
    return history, count


def models(history: Folder) -> dict[str, Tensor]:
    return {f"{name}/{key}": value for name, model in history.models.items() for key, value in model.items()}


def told(history: Folder) -> pd.DataFrame:
    """What was measured, without times and bytes."""
    frame = pd.read_csv(history.path / "metrics.csv")
    return frame.drop(columns=["seconds", "bytes_up", "bytes_down"])


@pytest.mark.parametrize("name", VARIANTS)
def test_whatever_is_killed_ends_as_if_nothing_had_been(name: str, tmp_path: Path) -> None:
    undisturbed, events = serve(small(tmp_path / "a", **VARIANTS[name]), tmp_path / "a")
    config = small(tmp_path / "b", **VARIANTS[name])
    for part in (0.4, 0.5):
        serve(config, tmp_path / "b", dies_at=int(part * events))
    resumed, _ = serve(config, tmp_path / "b")
    folders = [path for path in (tmp_path / "b").iterdir() if path.name != "state"]
    assert folders == [resumed.path] and not (resumed.path / checkpoint.FOLDER).exists()
    expected, found = told(undisturbed), told(resumed)
    if isinstance(config.plan, ArrivalPlan):
        tests = found[(found["split"] == "test") & (found["site"] == "all") & (found["metric"] == "accuracy")]
        assert tests["round"].is_unique and tests["round"].is_monotonic_increasing
        assert found["round"].max() == expected["round"].max()
        return
    pd.testing.assert_frame_equal(found, expected)
    assert models(resumed).keys() == models(undisturbed).keys()
    for key, value in models(undisturbed).items():
        assert torch.equal(models(resumed)[key], value), key
