"""A run that is killed goes on.

The real ServerApp and ClientApp, a server that dies at any event, and another one after it.
"""

from itertools import count as count_up
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from client_app.app import app as client_app
from configuration.config import Config, configuration
from configuration.description import write_models
from configuration.errors import ConfigError
from server_app import checkpoint, results
from server_app.app import run as run_server
from server_app.events import Event
from server_app.results import Folder
from simulation import laboratory
from simulation.grid import VirtualGrid
from simulation.laboratory import Run, compare, simulate
from simulation.world import World
from strategies.method import ArrivalPlan
from strategies.methods import METHODS
from tests.conftest import own

MORE: dict[str, dict[str, Any]] = {
    "relaysgd": {"topology.name": "path"},
    "diloco": {"diloco.local-steps": 5},
    "QFedAvg": {"flower.arguments": "client_learning_rate=0.05"},
}
VARIANTS: dict[str, dict[str, Any]] = {name: {"strategy": name} for name in METHODS} | {
    "sealed": {
        "strategy": "dmsgd",
        "wire.sealing": "trust-on-first-use",
        "data.test-fraction": 0.5,
    },
    "sampled": {"strategy": "fedavg", "sampling.fraction": 0.6},
    "sampled variates": {"strategy": "scaffold", "sampling.fraction": 0.6},
    "personal": {"strategy": "fedavg", "results.personalise-epochs": 1},
    "robust": {"strategy": "co-learning", "robust.mean": "median"},
    "robust window": {"strategy": "gsgm", "robust.mean": "median"},
    "choco": {"strategy": "q-saddle", "wire.codec": "top-k", "wire.error-feedback": "choco"},
    "deep-squeeze": {
        "strategy": "d-psgd",
        "wire.codec": "qsgd",
        "wire.error-feedback": "deep-squeeze",
    },
    "cross-gradients": {"strategy": "n-saddle", "wire.cross-codec": "qsgd"},
    "batch norm": {"strategy": "FedAdam", "model.name": "cnn", "model.norm": "batch"},
    "coded": {
        "strategy": "fedavg",
        "wire.codec": "qsgd",
        "wire.down-codec": "bf16",
        "wire.error-feedback": "deep-squeeze",
    },
}


RUNS = count_up(7)


@pytest.fixture(autouse=True)
def nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures and pages take longer than these runs."""
    for sink in ("Pictures", "Report"):
        monkeypatch.setattr(f"server_app.results.{sink}.__call__", lambda self, event: None)


class Killed(BaseException):
    """The server's process is gone."""


def small(folder: Path, **changes: Any) -> Config:
    strategy = changes["strategy"]
    short = {key.replace("_", "-"): value for key, value in own(strategy, local_epochs=1).items()}
    data = {"data.source": "tests.own_data:few", "training.batch-size": 8}
    base = {"num-sites": 3, "epochs": 3, "model.name": "mlp", "results.folder": str(folder), **data}
    return configuration(**base | short | MORE.get(strategy, {}) | changes)  # type: ignore[arg-type]


def serve(config: Config, folder: Path, dies_at: int | None = None) -> tuple[Folder, int]:
    """Run, or go on with the unfinished run; return its folder and how many events there were.

    At event ``dies_at`` the server dies instead of taking notice of it.
    """
    config = configuration(**config.flat() | {"results.resume": "auto"})  # type: ignore[arg-type]
    before = checkpoint.find(config)
    run = next(RUNS)
    history, count = Folder(config, run, before), 0

    def sink(event: Event) -> None:
        nonlocal count
        if count == dies_at:
            raise Killed
        count += 1
        history(event)

    grid = VirtualGrid(
        client_app, World().sites(config.num_sites, 1), config.flat(), state=folder / "state"
    )
    for context in grid.contexts.values():
        context.run_id = run
    try:
        run_server(grid, config, sink, before[1] if before else None)
    except Killed:
        history.close()  # as the end of its process does
    return history, count


def models(history: Folder) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value
        for name, model in history.models.items()
        for key, value in model.items()
    }


def counted(frame: pd.DataFrame) -> pd.DataFrame:
    """What was measured, without times and bytes."""
    return frame.drop(columns=["seconds", "bytes_up", "bytes_down"])


def reported(history: Folder) -> pd.DataFrame:
    return counted(pd.read_csv(history.path / "metrics.csv"))


@pytest.mark.parametrize("name", VARIANTS)
def test_whatever_is_killed_ends_as_if_nothing_had_been(name: str, tmp_path: Path) -> None:
    undisturbed, events = serve(small(tmp_path / "a", **VARIANTS[name]), tmp_path / "a")
    config = small(tmp_path / "b", **VARIANTS[name])
    for part in (0.4, 0.5):
        serve(config, tmp_path / "b", dies_at=int(part * events))
    resumed, _ = serve(config, tmp_path / "b")
    folders = sorted(path for path in (tmp_path / "b").iterdir() if path.name != "state")
    # There is none before it, but for one that was killed before its first checkpoint.
    assert folders[-1] == resumed.path
    assert not any((folder / checkpoint.FOLDER).exists() for folder in folders)
    expected, found = reported(undisturbed), reported(resumed)
    if isinstance(config.plan, ArrivalPlan):
        tests = found[
            (found["split"] == "test") & (found["site"] == "all") & (found["metric"] == "accuracy")
        ]
        assert tests["round"].is_unique
        assert tests["round"].is_monotonic_increasing
        assert found["round"].max() == expected["round"].max()
        return
    pd.testing.assert_frame_equal(found, expected)
    assert models(resumed).keys() == models(undisturbed).keys()
    for key, value in models(undisturbed).items():
        assert torch.equal(models(resumed)[key], value), key


def test_what_was_measured_and_kept_is_whole_whenever_the_server_dies(tmp_path: Path) -> None:
    """At every event of a short run."""
    undisturbed, events = serve(
        small(tmp_path / "a", strategy="scaffold", epochs=2), tmp_path / "a"
    )
    for at in range(events):
        folder = tmp_path / str(at)
        serve(small(folder, strategy="scaffold", epochs=2), folder, dies_at=at)
        resumed, _ = serve(small(folder, strategy="scaffold", epochs=2), folder)
        pd.testing.assert_frame_equal(reported(resumed), reported(undisturbed))
        assert all(
            torch.equal(models(resumed)[key], value) for key, value in models(undisturbed).items()
        )


def test_other_configuration_is_refused_key_by_key(tmp_path: Path) -> None:
    config = small(tmp_path, strategy="fedavg")
    history, _ = serve(config, tmp_path, dies_at=20)
    for changes, words in (
        ({"training.lr": 0.7}, "training.lr = 0.7: 0.0 is that of the run"),
        ({"seed": 3}, "seed = 3: 1 is that of the run"),
    ):
        with pytest.raises(ConfigError, match=words):
            checkpoint.find(
                small(
                    tmp_path, strategy="fedavg", **changes, **{"results.resume": history.path.name}
                )
            )
    with pytest.raises(
        ConfigError,
        match=r"results.resume = 'nowhere': no folder; allowed: auto, or the folder of a run",
    ):
        checkpoint.find(small(tmp_path, strategy="fedavg", **{"results.resume": "nowhere"}))
    with pytest.raises(ConfigError, match=r"results.resume = '~nobodyhere/x'"):
        checkpoint.find(small(tmp_path, strategy="fedavg", **{"results.resume": "~nobodyhere/x"}))
    free = {"min-sites": 1, "timeout-s": 5.0, "results.resume": str(history.path)}
    found = checkpoint.find(small(tmp_path, strategy="fedavg", **free))
    assert found is not None
    assert found[0] == history.path
    # Of another configuration, auto starts a new run.
    assert (
        checkpoint.find(small(tmp_path, strategy="fedavg", **{"seed": 3, "results.resume": "auto"}))
        is None
    )


def test_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    config = small(tmp_path, strategy="fedavg", epochs=4)
    history, _ = serve(config, tmp_path, dies_at=45)
    older, newest = sorted((history.path / checkpoint.FOLDER).glob("*.pt"))
    whole = checkpoint.read(history.path).driver["number"]
    newest.write_bytes(newest.read_bytes()[:-200])
    assert checkpoint.read(history.path).driver["number"] == whole - 1
    older.write_bytes(b"import os")
    with pytest.raises(ConfigError, match=r"results.resume: .*000.*\.pt"):
        checkpoint.read(history.path)


def test_checkpoint_that_holds_code_is_not_read(tmp_path: Path) -> None:
    history, _ = serve(small(tmp_path, strategy="fedavg"), tmp_path, dies_at=20)
    for file in (history.path / checkpoint.FOLDER).glob("*.pt"):
        torch.save({"config": Path("/etc/passwd")}, file)
    with pytest.raises(ConfigError, match=r"it holds a pathlib\."):
        checkpoint.read(history.path)


def test_run_that_is_going_on_is_not_gone_on_with(tmp_path: Path) -> None:
    config = configuration(**small(tmp_path, strategy="fedavg").flat() | {"results.resume": "auto"})  # type: ignore[arg-type]
    looked = []

    class Looking(Folder):
        def __call__(self, event: Event) -> None:
            super().__call__(event)
            if (self.path / checkpoint.FOLDER).exists():
                looked.append(checkpoint.find(config))

    run_server(
        VirtualGrid(client_app, World().sites(3, 1), config.flat()), config, Looking(config, 1)
    )
    assert looked
    assert set(looked) == {None}


def test_simulation_goes_on_and_a_finished_one_is_only_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: dict[str, Any] = {
        "strategy": "dmsgd",
        "num_sites": 3,
        "epochs": 2,
        "model": {"name": "mlp"},
        "progress": False,
    }
    whole = simulate(**keys)
    count, send = 0, VirtualGrid.push_messages

    def interrupted(self: VirtualGrid, messages: Any) -> Any:
        nonlocal count
        count += 1
        if count == 20:
            raise KeyboardInterrupt
        return send(self, messages)

    monkeypatch.setattr(VirtualGrid, "push_messages", interrupted)
    with pytest.warns(UserWarning, match="interrupted"):
        part = simulate(**keys, folder=tmp_path / "run")
    assert not part.finished
    found = simulate(**keys, folder=tmp_path / "run")
    assert found.finished
    assert count > 21
    for name, model in whole.models.items():
        assert all(torch.equal(found.models[name][key], value) for key, value in model.items())
    monkeypatch.setattr(VirtualGrid, "push_messages", None)
    again = simulate(**keys, folder=tmp_path / "run")
    assert again.summary["accuracy"] == found.summary["accuracy"]
    with pytest.raises(ConfigError, match="seed = 5: 1 is that of the run in"):
        simulate(**keys, seed=5, folder=tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("minutes", [0.0, 10.0])
def test_simulation_in_a_folder_is_whole_wherever_it_was_killed(
    minutes: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path, strategy="fedavg", epochs=2, **{"results.checkpoint-minutes": minutes})
    keys: dict[str, Any] = {**config.flat(), "progress": False}
    whole = simulate(**keys)
    writes, dies_at = count_up(1), 0

    def mortal(write: Any) -> Any:
        def of(*arguments: Any) -> None:
            if next(writes) == dies_at:
                raise Killed
            write(*arguments)

        return of

    for kind in (results.Rows, results.Checkpoints):
        monkeypatch.setattr(kind, "__call__", mortal(kind.__call__))
    monkeypatch.setattr(laboratory, "write_models", mortal(write_models))
    simulate(**keys, folder=tmp_path / "0")
    total = next(writes) - 1
    assert total > 20
    for dies_at in range(1, total + 1):
        writes, folder = count_up(1), tmp_path / str(dies_at)
        with pytest.raises(Killed):
            simulate(**keys, folder=folder)
        for found in (simulate(**keys, folder=folder), Run.load(folder)):
            assert counted(found.metrics).equals(counted(whole.metrics))
            assert all(torch.equal(found.model[name], value) for name, value in whole.model.items())


def test_batched_peers_in_a_folder_are_whole_wherever_they_were_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path, strategy="d-psgd", epochs=1)
    keys: dict[str, Any] = {**config.flat(), "progress": False, "engine": "batched"}
    whole = simulate(**keys)

    def killed(*arguments: Any) -> None:
        raise Killed

    for write in ("write_models", "write_description", "write_whole"):
        with monkeypatch.context() as patch:
            patch.setattr(laboratory, write, killed)
            with pytest.raises(Killed):
                simulate(**keys, folder=tmp_path / write)
        found = simulate(**keys, folder=tmp_path / write)
        for name, model in whole.models.items():
            assert all(torch.equal(found.models[name][key], value) for key, value in model.items())


def test_simulation_that_was_killed_while_it_began_begins_again(tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "strategy": "fedavg",
        "num_sites": 2,
        "epochs": 1,
        "model": {"name": "mlp"},
        "progress": False,
    }
    simulate(**keys, folder=tmp_path)
    (tmp_path / "metrics.csv").unlink()
    (tmp_path / "checkpoints").mkdir()  # the first one was not whole
    (tmp_path / "checkpoints" / "x.partial").touch()
    assert simulate(**keys, folder=tmp_path).finished


def test_comparison_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common: dict[str, Any] = {
        "num_sites": 2,
        "epochs": 1,
        "model": {"name": "mlp"},
        "progress": False,
        "processes": 1,
    }
    strategies = {"FedAvg": {"strategy": "fedavg"}, "alone": {"strategy": "local"}}
    first = compare({"FedAvg": strategies["FedAvg"]}, seeds=2, folder=tmp_path, **common)
    before = {
        file: file.stat().st_mtime_ns for file in (tmp_path / "FedAvg").rglob("*.safetensors")
    }
    both = compare(strategies, seeds=2, folder=tmp_path, **common)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert both.runs["FedAvg"][1].summary.equals(first.runs["FedAvg"][1].summary)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FedAvg", "alone"]
    with pytest.raises(ConfigError, match=r"FedAvg: training.lr = 0.3"):
        compare(strategies, seeds=2, folder=tmp_path, training={"lr": 0.3}, **common)
