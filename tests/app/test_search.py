"""Hyperparameter search: what it measures, finds, keeps and refuses."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from configuration.config import Config
from configuration.errors import ConfigError
from server_app.discovery import RunError
from server_app.overview import COLUMNS
from simulation import search as module
from simulation.laboratory import Run, simulate
from simulation.search import Search, search
from tests.conftest import ROOT

SMALL: dict[str, Any] = {
    "strategy": "fedavg",
    "fedavg.local-epochs": 1,
    "num_sites": 2,
    "epochs": 2,
    "model.name": "mlp",
    "data.source": "tests.own_data:few",
    "training.batch-size": 8,
    "training.momentum": 0.0,
    "processes": 1,
    "progress": False,
}
GRID: dict[str, Any] = {"training.lr": [0.01, 1.0, 1e4], "training.lr-shape": ["linear", "cosine"]}
SMALL_GRID = GRID | {"training.lr": [0.001, 0.1, 9.0]}
RANGES: dict[str, Any] = {"training.lr": (1e-4, 10.0, "log"), "training.batch-size": (4, 32, "log")}


def made_up(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """In place of runs: best at lr = 0.1 and batches of 8; those above lr = 5 fail.

    Returns the list of their configurations.
    """
    runs: list[dict[str, Any]] = []

    def run_one(label: str, config: Config, *_: Any) -> Run | str:
        runs.append(config.flat())
        if config.training.lr > 5:
            return "training diverged"
        value = -abs(math.log10(config.training.lr) + 1) - abs(config.training.batch_size - 8) / 10
        rows = [1, 1.0, 0, 0, "all", "test", "accuracy", 1 + value / 10 + config.seed / 1000]
        columns = list(COLUMNS)
        return Run(config, pd.DataFrame([rows], columns=columns), {}, pd.DataFrame(), True)

    monkeypatch.setattr(module, "run_one", run_one)
    return runs


def test_grid_is_tried_one_by_one_on_validation_examples_and_the_best_is_ready_to_run() -> None:
    found = search(space=GRID, trials=6, seeds=2, **SMALL)
    assert len(found.trials) == 12
    table = found.table()
    assert sorted(zip(table["training.lr"], table["training.lr-shape"], strict=True)) == [
        (lr, shape) for lr in GRID["training.lr"] for shape in ("cosine", "linear")
    ]
    assert table["accuracy"].dropna().is_monotonic_decreasing
    failed = table["accuracy"].isna()
    assert list(failed) == [False] * 4 + [True] * 2
    assert set(table["training.lr"][failed]) == {1e4}
    assert found.best["training.lr"] == 1.0
    assert found.at_border == ()
    of_best = found.trials[found.trials["trial"] == table.index[0]]
    again = [
        simulate(**{**found.best, "data.validation": 0.2}, seed=seed, progress=False)
        for seed in (1, 2)
    ]
    assert [run.summary["accuracy"] for run in again] == list(of_best["accuracy"])
    # 96 examples at two sites: 38 or 39 to train on, of which 8 are validated on.
    assert list(again[0].sites["test"]) == [8, 8]
    assert list(simulate(**found.best, progress=False).sites["test"]) == [10, 10]
    assert simulate(**found.best, progress=False).config.data.validation == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "d-psgd", "engine": "batched"},
        {"strategy": "d-psgd"},
        {"strategy": "centralized"},
        {"data.source": "csv", "data.path": "table.csv"},
        {"data.source": "text-bytes", "data.path": "texts", "training.task": "language"},
        {"data.source": "tests.own_data:labelled"},
        {"data.test-part": "pooled"},
    ],
    ids=lambda changes: " ".join(changes.values()),
)
def test_all_kinds_of_data_and_methods_validate_on_training_examples(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [f"{row % 7},{row * row % 11},{row % 2}" for row in range(80)]
    (tmp_path / "table.csv").write_text("\n".join(["a,b,label", *rows]))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("how much wood would a woodchuck chuck " * 40)
    monkeypatch.chdir(tmp_path)
    language = {"model.name": "gpt", "model.width": 8, "model.layers": 1, "data.context": 16}
    keys = {key: value for key, value in SMALL.items() if key != "processes"} | changes
    keys |= language if "training.task" in changes else {}
    if changes.get("strategy"):
        del keys["fedavg.local-epochs"]
    if changes.get("strategy") == "d-psgd":
        del keys["training.momentum"]
    plain, chosen = (simulate(**keys, data={"validation": share}) for share in (0.0, 0.25))
    held = sum(chosen.sites["test"])
    assert sum(chosen.sites["train"]) + held == sum(plain.sites["train"])
    assert 0.2 < held / sum(plain.sites["train"]) < 0.3
    tested = chosen.metrics.query("split == 'test' and metric == 'loss' and site == 'all'")
    assert tested["value"].map(math.isfinite).all()


def test_sampler_finds_what_is_best_and_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = made_up(monkeypatch)
    found = search(space=RANGES, trials=40, **SMALL)
    assert len(runs) == 40
    assert 0.03 < found.best["training.lr"] < 0.3
    assert 6 <= found.best["training.batch-size"] <= 10
    assert isinstance(found.best["training.batch-size"], int)
    pd.testing.assert_frame_equal(found.trials, search(space=RANGES, trials=40, **SMALL).trials)
    other = search(space=RANGES, trials=40, seeds=[2], **SMALL)
    assert not np.allclose(found.trials["training.lr"], other.trials["training.lr"])
    # Better than chance: of the first ten trials, drawn at random, none is as good as the best.
    assert found.table().index[0] >= 10


@pytest.mark.parametrize(
    ("space", "at"),
    [*((SMALL_GRID, at) for at in (0, 1, 11)), *((RANGES, at) for at in (9, 20, 21))],
)
def test_interrupted_search_goes_on_as_if_it_had_not_been(
    space: Any, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {**SMALL, "space": space, "trials": 11, "seeds": 2}
    runs = made_up(monkeypatch)
    whole, count = search(**keys), len(runs)
    run_one: Any = module.run_one  # type: ignore[attr-defined]

    def interrupted(*arguments: Any) -> Any:
        if len(runs) == count + at:
            raise KeyboardInterrupt
        return run_one(*arguments)

    monkeypatch.setattr(module, "run_one", interrupted)
    with pytest.warns(UserWarning, match=rf"interrupted: {at // 2} of \d+ trials are finished"):
        part = search(**keys, folder=tmp_path)
    assert len(part.trials) == at // 2 * 2
    assert repr(part)
    monkeypatch.setattr(module, "run_one", run_one)
    resumed = search(**keys, folder=tmp_path)
    pd.testing.assert_frame_equal(resumed.trials, whole.trials)
    assert len(runs) == 2 * count  # nothing is run twice
    pd.testing.assert_frame_equal(search(**keys, folder=tmp_path).trials, whole.trials)
    assert len(runs) == 2 * count


def test_search_goes_on_with_more_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = made_up(monkeypatch)
    first = search(space=RANGES, trials=12, folder=tmp_path, **SMALL)
    more = search(space=RANGES, trials=20, folder=tmp_path, **SMALL)
    pd.testing.assert_frame_equal(more.trials[:12], first.trials)
    assert len(runs) == 20


def test_search_goes_on_after_an_entry_that_a_full_disk_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(monkeypatch)
    whole = search(space=RANGES, trials=12, **SMALL)
    search(space=RANGES, trials=8, folder=tmp_path, **SMALL)
    log = tmp_path / "search.log"
    log.write_bytes(log.read_bytes()[:-10])
    for _ in range(2):  # what is written then can be read again
        found = search(space=RANGES, trials=12, folder=tmp_path, **SMALL)
        pd.testing.assert_frame_equal(found.trials, whole.trials)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is at the border")
def test_killed_search_goes_on(tmp_path: Path) -> None:
    """-9, in the middle of a run of the third trial."""
    keys = SMALL | {"trials": 4}
    space = {"training.lr": [0.01, 0.1, 0.2, 0.3]}
    program = f"""
import os, signal
from simulation import search as module
count, run_one = 0, module.run_one
def killed(*arguments):
    global count
    if count == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    count += 1
    return run_one(*arguments)
module.run_one = killed
module.search(space={space}, folder={str(tmp_path)!r}, **{keys})
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=os.environ, check=False)
    assert ended.returncode == -signal.SIGKILL
    log = (tmp_path / "search.log").read_bytes()
    resumed = search(space=space, folder=tmp_path, **keys)
    assert (tmp_path / "search.log").read_bytes().startswith(log)
    whole = search(space=space, **keys)
    pd.testing.assert_frame_equal(resumed.trials, whole.trials)


@pytest.mark.slow
def test_number_of_processes_changes_no_result() -> None:
    keys = SMALL | {"space": GRID, "trials": 6}
    several = search(**keys | {"processes": 2})
    pd.testing.assert_frame_equal(several.trials, search(**keys).trials)


def test_trial_that_fails_is_the_worst_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch)
    space = {"training.lr": [1e-4, 0.1, 10.0]}
    found = search(space=space, trials=3, **SMALL)
    assert list(found.table().index) == [1, 0, 2]
    assert list(found.trials["failure"]) == ["", "", "training diverged"]
    assert found.trials["accuracy"].isna().tolist() == [False, False, True]
    with pytest.raises(RunError, match="all 1 trials failed: training diverged"):
        search(space={"training.lr": [10.0]}, trials=1, **SMALL)
    # A network that is no longer finite, in a run.
    diverging = {"strategy": "FedAdam", "flower.arguments": "eta=1e38"}
    keys = {key: value for key, value in SMALL.items() if "fedavg" not in key}
    monkeypatch.undo()
    with pytest.raises(RunError, match=r"all 1 trials failed: round 1: .*diverged"):
        search(space={"training.lr": [0.1]}, trials=1, **keys | diverging)


@pytest.mark.parametrize(
    ("space", "border"),
    [
        ({"training.lr": [0.001, 0.03, 0.1]}, ("training.lr",)),
        ({"training.lr": [0.1, 1.0, 3.0]}, ("training.lr",)),
        ({"training.lr": [0.01, 0.1, 1.0]}, ()),
        ({"training.lr": [0.1]}, ()),
        ({"training.batch-size": [8, 16], "training.lr": [0.1]}, ("training.batch-size",)),
        # None smaller than 1, and none larger than 1, is allowed.
        ({"training.batch-size": [1], "training.lr-ratio": [1.0, 0.1]}, ()),
        ({"training.nesterov": [True, False], "training.momentum": [0.9]}, ()),
    ],
    ids=str,
)
def test_best_at_the_border_of_its_values_is_told(
    space: dict[str, Any], border: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(monkeypatch)
    keys = {"training.lr": 0.1} | SMALL
    if border:
        with pytest.warns(UserWarning, match=f"{border[0]} = .* is at the border of .*: widen it"):
            found = search(space=space, trials=9, **keys)
    else:
        found = search(space=space, trials=9, **keys)
    assert found.at_border == border
    assert all(f"{key} is at the border" in repr(found) for key in border)


def test_best_near_the_border_of_its_range_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch)
    with pytest.warns(UserWarning, match=r"training.lr = .* is at the border of \(0.11, 4.0, 'log"):
        search(space={"training.lr": (0.11, 4, "log")}, trials=30, **SMALL)
    assert search(space={"training.lr": (0.01, 1, "log")}, trials=30, **SMALL).at_border == ()


def test_whole_bounds_of_a_key_that_is_no_whole_number(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = made_up(monkeypatch)
    search(space={"training.lr": (1, 4)}, trials=10, **SMALL)
    assert any(run["training.lr"] % 1 for run in runs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"training.lr": []}}, r"training.lr = \[\]: a list of values, or"),
        (
            {"space": {"training.lr": 0.1}},
            r"training.lr = 0.1|training.lr = \[\]: a list of values",
        ),
        ({"space": {"training.lr": (1.0, 0.1)}}, r"training.lr = \(1.0, 0.1\): .*low < high"),
        ({"space": {"training.lr": (0, 1, "log")}}, "above 0 with 'log'"),
        ({"space": {"training.lr": (0.1, 1, "ln")}}, r"\(low, high, 'log'\)"),
        ({"space": {"training.lr": [0.1, -1.0]}}, "training.lr = -1.0: must be greater than"),
        ({"space": {"training.lr": (-1.0, 1.0)}}, "training.lr = -1.0: must be greater than"),
        ({"space": {"training.batch-size": (1.5, 8)}}, "training.batch-size = 1.5"),
        ({"space": {"training.rate": [1]}}, "training.rate = 1: unknown key"),
        ({"space": {"seed": [1, 2]}}, "seed: the same for all trials"),
        ({"space": GRID, "seed": 3}, r"seed = 3: a search has seeds = 3"),
        ({"space": GRID, "trials": 0}, "trials = 0: at least one"),
        ({"space": GRID, "engine": "ray"}, "engine = 'ray': allowed: 'app', 'batched'"),
        (
            {"space": {"training.nesterov": [True], "training.momentum": [0.0, 0.9]}},
            "training.nesterov = True: needs training.momentum above 0",
        ),
    ],
    ids=str,
)
def test_mistakes_are_named_before_anything_runs(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "run_one", None)
    with pytest.raises(ConfigError, match=message):
        search(**SMALL | changes)


@pytest.mark.filterwarnings("ignore:.*is at the border")
def test_keys_that_go_with_some_others_only_are_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nesterov's momentum is none without momentum: such a trial fails by itself."""
    runs = made_up(monkeypatch)
    space = {"training.nesterov": [True, False], "training.momentum": [0.0, 0.5, 0.9]}
    found = search(space=space, trials=5, **SMALL | {"training.lr": 0.1})
    said = found.trials[
        found.trials["training.nesterov"] & (found.trials["training.momentum"] == 0)
    ]
    assert all("needs training.momentum above 0" in failure for failure in said["failure"])
    assert len(runs) == 5 - len(said)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_sites": 3}, "num-sites = 3: 2 is that of the run in"),
        ({"space": GRID}, "space = .* is that of the search in"),
        ({"seeds": 2}, r"seeds = \[1, 2\]: \[1\] is that of the search in"),
    ],
    ids=str,
)
def test_folder_of_another_search_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = made_up(monkeypatch)
    keys = SMALL | {"space": {"training.lr": [0.1]}, "folder": tmp_path}
    search(**keys)
    with pytest.raises(ConfigError, match=message):
        search(**keys | changes)
    assert len(runs) == 1


def test_folder_is_that_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = SMALL | {"space": {"training.lr": [0.1]}, "folder": tmp_path}

    def run_one(*_: Any) -> str:
        with pytest.raises(ConfigError, match="a search is going on in it"):
            search(**keys)
        return "seen"

    monkeypatch.setattr(module, "run_one", run_one)
    with pytest.raises(RunError, match="seen"):
        search(**keys)


def test_smaller_is_better_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Search(
        pd.DataFrame({"trial": [0, 1], "training.lr": [0.1, 1.0], "rmse": [2.0, 1.0]}),
        Config.read({"training.task": "regression", "data.source": "csv"}),
        {},
        {"training.lr": [0.1, 1.0]},
    )
    assert found.best["training.lr"] == 1.0


def test_picture_has_a_panel_a_key_and_a_point_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch)
    space = {"training.lr": [0.01, 0.1, 1.0], "training.lr-shape": ["linear", "cosine"]}
    found = search(space=space, trials=6, **SMALL)
    panels: list[Axes] = found.plot().axes
    assert [axes.get_xlabel() for axes in panels] == list(space)
    assert panels[0].get_xscale() == "log"
    assert [len(np.asarray(axes.lines[0].get_xdata())) for axes in panels] == [6, 6]
    best = np.asarray(panels[0].lines[-1].get_xdata())
    assert best.tolist() == [0.1]
