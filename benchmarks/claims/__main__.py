"""What the papers claim, measured: a claim runs, is judged, and gets its page.

    python -m benchmarks.claims saddle --data FOLDER                a quarter of an hour, two cores
    python -m benchmarks.claims saddle --data FOLDER --size full    a night
    python -m benchmarks.claims saddle --report                     the page of what is finished

(gsgm takes more than half an hour: its updates come one after the other.)

FOLDER holds the data sets as docs/results/defaults.md says. A claim that was killed goes on with
the same command; what is finished is kept in ``runs/claims/``.
"""

import argparse
import contextlib
import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path

from benchmarks.claims import page, runner
from benchmarks.claims.claim import Cell, Claim, Size, cells
from benchmarks.claims.data import make_ready
from benchmarks.claims.tuning import Choice, known, tuned
from configuration.config import ROOT

CLAIMS = ("gsgm", "co-learning", "dmsgd", "saddle", "networks", "language")


def claim_of(name: str) -> Claim:
    """A claim by its name."""
    found = importlib.import_module(f"benchmarks.claims.{name.replace('-', '_')}").CLAIM
    assert isinstance(found, Claim)
    return found


def main() -> None:
    """Tune, run, write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=CLAIMS)
    parser.add_argument("--data", default="data", help="folder of the data sets")
    parser.add_argument("--size", choices=("quick", "full"), default="quick")
    parser.add_argument("--seeds", type=int, help="by default those of the size")
    parser.add_argument("--jobs", type=int, help="processes; by default one a core")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results", help="for the page")
    parser.add_argument("--runs", type=Path, default=runner.FOLDER, help="what is finished")
    parser.add_argument("--report", action="store_true", help="run nothing, write the page")
    arguments = parser.parse_args()
    said = f"python -m benchmarks.claims {arguments.name} --size {arguments.size}"
    if arguments.seeds:
        said += f" --seeds {arguments.seeds}"
    claim = claim_of(arguments.name)
    size = claim.size(arguments.size)
    size = dataclasses.replace(size, seeds=arguments.seeds or size.seeds)
    written = measure(
        arguments.name,
        claim,
        size,
        data=arguments.data,
        jobs=arguments.jobs,
        out=arguments.out,
        runs=arguments.runs,
        report=arguments.report,
        command=said,
    )
    print(written)


def measure(
    name: str,
    claim: Claim,
    size: Size,
    *,
    data: str,
    jobs: int | None,
    out: Path,
    runs: Path,
    report: bool,
    command: str,
) -> Path:
    """Tune, run what is not finished, write the page; interrupted, of what is finished.

    Args:
        name: of the claim.
        claim: what is asked.
        size: what is run.
        data: folder of the data sets.
        jobs: processes; None: one a core.
        out: folder of the page.
        runs: folder of what is finished.
        report: run nothing.
        command: that the page names.

    Raises:
        ConfigError: before anything runs.
        SourceError: before anything runs.
    """
    plan = cells(size, data)
    runner.check(plan, size.seeds)
    choices: dict[tuple[str, str], Choice] = {}
    chosen: list[Cell] = []
    needed = {
        (each.keys["data.source"], each.keys["data.path"])
        for each in size.settings
        if "data.path" in each.keys
    }
    for source, path in needed if not report else ():
        make_ready(data, source, path)
    try:
        for cell in plan if not report else []:
            if not cell.setting.tuned_in:
                tuned(cell, size, runs, jobs)
    except KeyboardInterrupt:
        report = True
    for cell in plan:
        choice = known(_tuned_as(cell, plan), size, runs)
        if choice is None:
            continue
        chosen.append(Cell(cell.setting, cell.candidate, {**cell.keys, **choice.keys}))
        if not cell.setting.tuned_in:
            choices[cell.setting.name, cell.candidate.name] = choice
    with contextlib.suppress(KeyboardInterrupt):
        if not report:
            runner.run_cells(claim, chosen, size.seeds, runs, jobs)
    results, records = runner.results(claim, chosen, size.seeds, runs)
    missing = len(plan) * size.seeds - len(records)
    return page.write(out, name, claim, size, results, records, choices, command, missing)


def _tuned_as(cell: Cell, plan: Sequence[Cell]) -> Cell:
    """The cell whose search a cell's keys are of."""
    where = cell.setting.tuned_in or cell.setting.name
    key = (where, cell.candidate.name)
    return next(each for each in plan if (each.setting.name, each.candidate.name) == key)


if __name__ == "__main__":
    main()
