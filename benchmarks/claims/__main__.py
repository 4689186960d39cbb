r"""What the papers claim, measured: a claim runs, is judged, and gets its page.

    python -m benchmarks.claims saddle --data FOLDER                a quarter of an hour, two cores
    python -m benchmarks.claims saddle --data FOLDER --size full    a night
    python -m benchmarks.claims saddle --report                     the page of what is finished
    python -m benchmarks.claims co-learning --only "digits, 5 sites" \
        --change Co-learning "co-learning.epsilon=0.3"              a row of one's own, some minutes

FOLDER holds the data sets as docs/results/defaults.md says. A claim that was killed goes on with
the same command; what is finished is kept in ``runs/claims/``.
"""

import argparse
import dataclasses
import importlib
import shlex
from collections.abc import Sequence
from pathlib import Path

from click import ClickException

from benchmarks.claims import page, runner
from benchmarks.claims.claim import Candidate, Cell, Claim, Size, cells
from benchmarks.claims.data import make_ready
from benchmarks.claims.tuning import Choice, known, tuned
from configuration.__main__ import parsed
from configuration.config import ROOT, flatten
from configuration.errors import ConfigError
from datasets.errors import SourceError

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
    parser.add_argument("--only", nargs="+", default=[], metavar="SETTING")
    parser.add_argument(
        "--change",
        nargs=2,
        action="append",
        default=[],
        metavar=("CANDIDATE", "KEYS"),
        help="one more candidate: this one with other keys, KEY=VALUE ..., tuned as it is",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="for the page: docs/results, of a part of a claim or with a change runs/claims",
    )
    parser.add_argument("--runs", type=Path, default=runner.FOLDER, help="what is finished")
    parser.add_argument("--report", action="store_true", help="run nothing, write the page")
    arguments = parser.parse_args()
    said = f"python -m benchmarks.claims {arguments.name} --size {arguments.size}"
    if arguments.seeds:
        said += f" --seeds {arguments.seeds}"
    if arguments.only:
        said += f" --only {shlex.join(arguments.only)}"
    for change in arguments.change:
        said += f" --change {shlex.join(change)}"
    claim = claim_of(arguments.name)
    try:
        size = part(claim.size(arguments.size), arguments.only)
        for name, text in arguments.change:
            size = changed(size, name, text)
        whole = not (arguments.only or arguments.change or arguments.seeds)
        told = whole and arguments.size == "full"
        written = measure(
            arguments.name,
            claim if told else dataclasses.replace(claim, reading=""),
            dataclasses.replace(size, seeds=arguments.seeds or size.seeds),
            data=arguments.data,
            jobs=arguments.jobs,
            out=arguments.out or (None if whole else arguments.runs),
            runs=arguments.runs,
            report=arguments.report,
            command=said,
        )
    except (ConfigError, SourceError, FileNotFoundError, ClickException) as wrong:
        parser.error(str(wrong))
    print(written)


def part(size: Size, only: Sequence[str]) -> Size:
    """The settings of these names; all where there are none.

    Raises:
        ConfigError: there is no such setting, or one is tuned in another that is left out.
    """
    if not only:
        return size
    named = {setting.name: setting for setting in size.settings}
    for name in only:
        if name not in named:
            raise ConfigError(f"--only: {name!r}: allowed: {', '.join(map(repr, named))}")
        if (where := named[name].tuned_in) and where not in only:
            raise ConfigError(f"--only: {name!r} is tuned in {where!r}: name that, too")
    return dataclasses.replace(size, settings=tuple(named[name] for name in dict.fromkeys(only)))


def changed(size: Size, name: str, text: str) -> Size:
    """With one more candidate: that of this name, with the keys of a text.

    Raises:
        ConfigError: there is no such candidate, the text is none of ``key=value``, or that
            candidate is there already.
    """
    named = {candidate.name: candidate for candidate in size.candidates}
    if name not in named:
        raise ConfigError(f"--change: {name!r}: allowed: {', '.join(map(repr, named))}")
    old, keys = named[name], parsed(text)
    space = {key: values for key, values in old.space.items() if key not in keys}
    own = Candidate(f"{name}, {text}", {**flatten(old.keys), **keys}, space, old.below)
    if own.name in named:
        raise ConfigError(f"--change: {own.name!r} is there already")
    settings = tuple(
        dataclasses.replace(setting, candidates=(*setting.candidates, own.name))
        if name in setting.candidates
        else setting
        for setting in size.settings
    )
    return dataclasses.replace(size, settings=settings, candidates=(*size.candidates, own))


def measure(
    name: str,
    claim: Claim,
    size: Size,
    *,
    data: str,
    jobs: int | None,
    out: Path | None,
    runs: Path,
    report: bool,
    command: str,
) -> Path:
    """Tune, run what is not finished, write the page; interrupted, of what is finished.

    So it does when a run raises what is no failure of its own, before it raises that.

    Args:
        name: of the claim.
        claim: what is asked.
        size: what is run.
        data: folder of the data sets.
        jobs: processes; None: one a core.
        out: folder of the page; None: that of the documentation if everything is finished, else
            ``runs``.
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
    try:
        if not report:
            runner.run_cells(claim, chosen, size.seeds, runs, jobs)
    except KeyboardInterrupt:
        pass
    finally:
        results, records = runner.results(claim, chosen, size.seeds, runs)
        missing = len(plan) * size.seeds - len(records)
        folder = out or (runs if missing else ROOT / "docs/results")
        file = page.write(folder, name, claim, size, results, records, choices, command, missing)
    return file


def _tuned_as(cell: Cell, plan: Sequence[Cell]) -> Cell:
    """The cell whose search a cell's keys are of."""
    where = cell.setting.tuned_in or cell.setting.name
    key = (where, cell.candidate.name)
    return next(each for each in plan if (each.setting.name, each.candidate.name) == key)


if __name__ == "__main__":
    main()
