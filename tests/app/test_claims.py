"""A claim is run, killed, run on, judged and written down."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from numpy.typing import NDArray

from benchmarks.claims import runner
from benchmarks.claims.__main__ import claim_of, measure, part
from benchmarks.claims.claim import (
    Candidate,
    Claim,
    Judgement,
    Measure,
    Setting,
    Size,
    cells,
    last,
    meanwhile,
)
from benchmarks.claims.data import FASHION
from configuration.__main__ import parsed
from datasets.errors import SourceError
from server_app.discovery import RunError
from simulation import laboratory
from simulation.laboratory import Run
from simulation.world import World
from tests.conftest import ROOT

KEYS = {"num-sites": 2, "model.name": "mlp", "epochs": 2, "data.test-part": "pooled"}
SLOW, FAST = (
    Candidate(name, {"strategy": "fedavg", "fedavg.local-epochs": 1}, {"training.lr": rates})
    for name, rates in (("slow", [1e-5]), ("fast", [0.003, 0.01]))
)
SETTINGS = (
    Setting("alike", KEYS, target=0.5),
    Setting("unlike", KEYS | {"partition.kind": "dirichlet"}, target=0.5, tuned_in="alike"),
)
SIZE = Size(SETTINGS, (SLOW, FAST), seeds=2)


def last_loss(run: Run) -> dict[str, float]:
    """What a claim may measure on the last models."""
    return {"loss": float(run.history["loss"].iloc[-1]), "models": float(len(run.models))}


CLAIM = Claim(
    question="Does a rate that is not tiny help?",
    about="Nobody doubts it.",
    quick=SIZE,
    full=SIZE,
    measures=(
        Measure("accuracy", "at the end", last()),
        Measure("loss", "of the last models", lambda record, _: record.final["loss"], False),
        Measure("after fast", "when fast is over", meanwhile("hours", 1), beside="fast"),
    ),
    judgements=(
        Judgement("More accurate", "accuracy", "fast", "slow"),
        Judgement("More accurate by more than there is", "accuracy", "fast", "slow", 5.0),
    ),
    final=last_loss,
)


def tell(folder: Path, claim: Claim = CLAIM, **changes: Any) -> Path:
    """The page."""
    keys: dict[str, Any] = {"data": "", "jobs": 1, "report": False, "command": "the command"}
    places = {"out": folder / "pages", "runs": folder / "runs"}
    return measure("tiny", claim, **{"size": claim.quick} | keys | places | changes)


def records(folder: Path) -> dict[str, int]:
    """When each run was kept."""
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("runs/records/*.json")}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("claim")
    tell(folder)
    return folder


def shown(values: NDArray[np.float64]) -> str:
    """Mean and standard error."""
    return f"{values.mean():.3f} ± {values.std(ddof=1) / len(values) ** 0.5:.3f}"


def test_page_says_what_the_numbers_say(done: Path) -> None:
    page = (done / "pages/claim-tiny.md").read_text()
    numbers = pd.read_csv(done / "pages/claim-tiny.csv")
    assert len(numbers) == 2 * 2 * 2 * 3  # settings, candidates, seeds, measures
    chosen = numbers.query("setting == 'unlike' and candidate == 'fast' and measure == 'accuracy'")
    assert f"| unlike | fast | 2 | {shown(chosen['value'].to_numpy(float))} |" in page
    others = numbers.query("setting == 'unlike' and candidate == 'fast'")["value"].to_numpy(float)
    assert list(others[0::3]) == list(others[2::3])  # fast is over when it is over
    both = numbers.query("setting == 'alike' and measure == 'loss'")
    wide = both.pivot(index="seed", columns="candidate", values="value")
    apart = wide["fast"] - wide["slow"]
    pattern = rf"\| alike \| fast \| 2 \|[^|]*\| {re.escape(shown(apart.to_numpy(float)))} \|"
    assert re.search(pattern, page)
    gain = numbers.query("measure == 'accuracy'").pivot_table(
        "value", ["setting", "seed"], "candidate"
    )
    ahead = (gain["fast"] - gain["slow"]).groupby("setting").mean()
    cells = [f"**does not hold**: {ahead[name]:+.3f} (" for name in ("alike", "unlike")]
    row = next(line for line in page.splitlines() if cells[0] in line)
    assert row.startswith("| fast against slow |")
    assert cells[1] in row
    assert "**More accurate by more than there is**: does not hold in 2 of 2." in page
    assert "Of all 4, 4 are decided; " in page
    assert "the command" in page
    assert runner.commit() in page
    assert "4 runs" not in page
    assert "8 runs, seeds 1 to 2" in page
    assert "Not finished" not in page


def test_what_was_tuned_is_stated_and_used(done: Path) -> None:
    page = (done / "pages/claim-tiny.md").read_text()
    assert "unlike: as alike." in page
    row = next(line for line in page.splitlines() if line.startswith("| alike | fast | `tr"))
    _, _, grid, trials, best, *_ = row.split(" | ")
    # The better of the rates was at the border: there are others beyond it.
    assert grid.startswith("`training.lr` 0.003, 0.01, 0.033")
    assert int(trials) == len(grid.split(", "))
    runs = [
        json.loads(file.read_text())["run"]["keys"] for file in done.glob("runs/records/*.json")
    ]
    assert {run["training.lr"] for run in runs} == {1e-5, float(best.split()[-1])}
    assert {run["data.validation"] for run in runs} == {0.0}  # on the test part


def test_pictures_are_there(done: Path) -> None:
    page = (done / "pages/claim-tiny.md").read_text()
    linked = re.findall(r"!\[[^]]+\]\(([^)]+)\.svg\)", page)
    assert linked == ["claim-tiny", "claim-tiny-round"]
    for name in linked:
        svg = (done / f"pages/{name}.svg").read_text()
        assert all(candidate.name in svg for candidate in SIZE.candidates)
        picture = imread(done / f"pages/{name}.png")
        assert picture[..., :3].std() > 0.01  # not empty


def test_finished_runs_are_never_made_again(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, page = records(done), (done / "pages/claim-tiny.md").read_text()

    def never(**_: Any) -> Run:
        raise AssertionError("run again")

    monkeypatch.setattr(runner, "simulate", never)
    monkeypatch.setattr("benchmarks.claims.tuning.search", never)
    assert tell(done).read_text() == page
    assert records(done) == before


def test_a_run_whose_file_is_not_whole_is_made_again(tmp_path: Path) -> None:
    untuned = (Candidate(SLOW.name, SLOW.keys, {}),)
    size = Size(SETTINGS[:1], untuned, 1)
    page = tell(tmp_path, size=size).read_text()
    (file,) = tmp_path.glob("runs/records/*.json")
    file.write_text(file.read_text()[:50])
    assert "Not finished: 1 runs" in tell(tmp_path, size=size, report=True).read_text()
    again = tell(tmp_path, size=size).read_text()
    assert [line for line in again.splitlines() if "hours of" not in line] == [
        line for line in page.splitlines() if "hours of" not in line
    ]


def test_sites_that_a_world_takes_away_do_not_fill_the_screen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run() -> None:
        world = World(offline={0: [(2, 400)]}, samples_per_s=50)
        setting = Setting("poor", KEYS | {"min-sites": 1}, world)
        tell(tmp_path, size=Size((setting,), (Candidate(SLOW.name, SLOW.keys, {}),), 1))

    run()
    assert not caplog.records
    (file,) = tmp_path.glob("runs/records/*.json")
    assert not json.loads(file.read_text())["failure"]
    file.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_quiet", nullcontext)
        run()
    assert "site 0 (site 0) is left out" in caplog.text


def test_another_claim_shares_runs_and_adds_its_own(done: Path) -> None:
    before = records(done)
    more = Size(SETTINGS[:1], (FAST,), seeds=3)
    question = Claim("Another?", "", more, more, CLAIM.measures, (), final=last_loss)
    tell(done, question, out=done / "others")
    after = records(done)
    assert len(after) == len(before) + 1  # seed 3
    assert before.items() <= after.items()


def test_a_run_that_fails_is_kept_with_its_reason_and_decides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate = laboratory.simulate

    def failing(**keys: Any) -> Run:
        if keys["training.lr"] > 0.02 and keys["seed"] == 2:
            raise RunError("sites are gone")
        return simulate(**keys)

    monkeypatch.setattr(runner, "simulate", failing)
    untuned = tuple(
        Candidate(name, {"strategy": "fedavg", "training.lr": lr}, {})
        for name, lr in (("slow", 1e-4), ("fast", 0.03))
    )
    size = Size(SETTINGS[:1], untuned, 2)
    page = tell(tmp_path, size=size).read_text()
    assert "alike, fast, 2: sites are gone" in page
    assert "Nothing was tuned." in page
    assert "**More accurate**: undecided in 1 of 1." in page
    assert "; 1 pairs lack a number" in page
    monkeypatch.setattr(runner, "simulate", simulate)
    assert tell(tmp_path, size=size).read_text() == page
    monkeypatch.setattr(runner, "commit", lambda: "mended")
    page = tell(tmp_path, size=size).read_text()
    assert "Failed" not in page
    assert "mended (1)" in page


def test_a_report_of_nothing_says_that_all_is_missing(tmp_path: Path) -> None:
    page = tell(tmp_path, report=True).read_text()
    assert "**Not finished: 8 runs are missing.**" in page
    assert page.count("not measured") == 2
    assert not list(tmp_path.glob("runs/**/*.json"))


def test_data_that_cannot_be_read_are_no_failures_of_runs(tmp_path: Path) -> None:
    size = Size((Setting("here", KEYS | FASHION),), (SLOW,), 1)
    with pytest.raises(SourceError, match="ubyte"):
        tell(tmp_path, size=size, data=str(tmp_path))
    assert not list(tmp_path.rglob("*.json"))


def test_ctrl_c_leaves_the_page_of_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate = laboratory.simulate

    def interrupted(**keys: Any) -> Run:
        if keys["seed"] == 2:
            raise KeyboardInterrupt
        return simulate(**keys)

    monkeypatch.setattr(runner, "simulate", interrupted)
    untuned = tuple(Candidate(each.name, each.keys, {}) for each in SIZE.candidates)
    file = tell(tmp_path, size=Size(SETTINGS, untuned, 2), out=None)
    assert file.parent == tmp_path / "runs"  # a page of less takes no committed page's place
    page = file.read_text()
    assert "**Not finished: 4 runs are missing.**" in page
    assert "**More accurate**: undecided in 2 of 2." in page  # one seed


def test_what_is_no_failure_of_a_run_is_raised_once_the_page_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate = laboratory.simulate

    def full(**keys: Any) -> Run:
        if keys["seed"] == 2:
            raise OSError("No space left on device")
        return simulate(**keys)

    monkeypatch.setattr(runner, "simulate", full)
    untuned = tuple(Candidate(each.name, each.keys, {}) for each in SIZE.candidates)
    with pytest.raises(OSError, match="No space left"):
        tell(tmp_path, size=Size(SETTINGS[:1], untuned, 2))
    assert "2 runs are missing" in (tmp_path / "pages/claim-tiny.md").read_text()


KILLED = """
from pathlib import Path
from tests.app.test_claims import tell
tell(Path({folder!r}), jobs=2)
"""


@pytest.mark.slow
def test_a_claim_that_is_killed_goes_on_where_it_was(tmp_path: Path, done: Path) -> None:
    script = KILLED.format(folder=str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL
    )
    try:
        while not records(tmp_path):  # an event, whenever it comes
            assert process.poll() is None
            time.sleep(0.1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    before = records(tmp_path)
    tell(tmp_path)
    after = records(tmp_path)
    assert len(after) == 8
    assert before.items() <= after.items()
    numbers, undisturbed = (pd.read_csv(each / "pages/claim-tiny.csv") for each in (tmp_path, done))
    pd.testing.assert_frame_equal(numbers, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FedAvg", "Co-learning", "centralized"])
def test_committed_numbers_come_out_again(name: str, tmp_path: Path) -> None:
    committed = pd.read_csv(ROOT / "docs/results/claim-co-learning.csv")
    where = "digits, 5 sites"
    committed = committed.query("setting == @where and candidate == @name")
    claim = claim_of("co-learning")
    size = part(claim.quick, [where])
    (cell,) = [each for each in cells(size, "") if each.candidate.name == name]
    (tuned,) = set(committed["tuned"])
    cell = dataclasses.replace(cell, keys={**cell.keys, **parsed(tuned)})
    runner.run_cells(claim, [cell], 2, tmp_path, 1)
    again, _ = runner.results(claim, [cell], 2, tmp_path)
    keys = ["measure", "seed"]
    both = committed.merge(again, on=keys, suffixes=("", " again")).set_index("measure")
    assert len(both) == 2 * len(claim.measures)
    for exact in ("rounds", "MB"):
        assert list(both["value"][exact]) == list(both["value again"][exact])
    apart = abs(both["value"]["accuracy"] - both["value again"]["accuracy"])
    # The same on the same kind of processor; elsewhere within four standard errors of a test part.
    accuracy = both["value"]["accuracy"].mean()
    assert apart.max() <= 4 * np.sqrt(2 * accuracy * (1 - accuracy) / 360)
