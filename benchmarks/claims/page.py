"""The page of a claim, and beside it the numbers as CSV and the pictures."""

import math
import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.claims import figures
from benchmarks.claims.claim import (
    CONFIDENCE,
    Claim,
    Judgement,
    Measure,
    Record,
    Size,
    Verdict,
    judge,
)
from benchmarks.claims.tuning import Choice

SEEN = " (these may be in the test part of another seed)"
WORDS = ("holds", "does not hold", "undecided")
Records = Mapping[tuple[str, str, int], Record]
Choices = Mapping[tuple[str, str], Choice]


def write(
    folder: Path,
    name: str,
    claim: Claim,
    size: Size,
    results: pd.DataFrame,
    records: Records,
    choices: Choices,
    command: str,
    missing: int,
) -> Path:
    """Write ``claim-NAME.md``, ``.csv`` and the pictures.

    Args:
        folder: of the pages.
        name: of the claim.
        claim: what was asked.
        size: what was run.
        results: see :func:`benchmarks.claims.runner.results`.
        records: see there.
        choices: tuned keys by setting and candidate.
        command: that makes the page.
        missing: runs that are not finished.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"claim-{name}"
    results.to_csv(folder / f"{stem}.csv", index=False)
    drawn = {stem: figures.points(claim, size, results)}
    for axis in claim.axes:
        drawn[f"{stem}-{axis}"] = figures.curves(claim, size, records, axis)
    for each, figure in drawn.items():
        figures.save(figure, folder / each)
    verdicts = [
        verdict
        for judgement in claim.judgements
        for verdict in judge(judgement, _measure(claim, judgement), results)
    ]
    parts = [
        f"# {claim.question}",
        claim.about.strip(),
        *([f"**Not finished: {missing} runs are missing.**"] if missing else []),
        "## Verdict",
        _in_words(claim.judgements, verdicts),
        _verdict_table(verdicts),
        *([claim.reading.strip()] if claim.reading else []),
        "## Numbers",
        "Mean ± standard error over seeds. " + " ".join(_explained(claim.measures)),
        *_numbers(claim, size, results),
        *(f"![{_caption(claim, each, stem)}]({each}.svg)" for each in drawn),
        "## What was tuned",
        _tuning(size, choices),
        "## How it was measured",
        _conditions(size, records, command),
    ]
    page = folder / f"{stem}.md"
    page.write_text("\n\n".join(part for part in parts if part) + "\n")
    return page


def _measure(claim: Claim, judgement: Judgement) -> Measure:
    return next(measure for measure in claim.measures if measure.name == judgement.measure)


def _in_words(judgements: Sequence[Judgement], verdicts: Sequence[Verdict]) -> str:
    """A line a statement, below it one for each pair that it is said of."""
    lines = []
    for says in dict.fromkeys(judgement.says for judgement in judgements):
        lines.append(f"* {says}:")
        for judgement in judgements:
            if judgement.says != says:
                continue
            own = [verdict for verdict in verdicts if verdict.judgement is judgement]
            said = []
            for word in WORDS:
                where = [verdict.where for verdict in own if verdict.word == word]
                if len(where) == len(own) > 1:
                    said.append(f"**{word}** everywhere")
                elif where:
                    said.append(f"**{word}** ({'; '.join(where)})")
            pair = f"{judgement.better} against {judgement.than}"
            lines.append(f"    * {pair}: {', '.join(said) or 'not measured'}")
    return "\n".join(lines)


def _verdict_table(verdicts: Sequence[Verdict]) -> str:
    rows = []
    for verdict in verdicts:
        judgement, by = verdict.judgement, verdict.by
        show = _share if judgement.relative else _signed
        away = abs(by.mean - judgement.by) / by.error if by.error else math.inf
        rows.append(
            [
                f"{judgement.better} against {judgement.than}",
                judgement.measure,
                verdict.where,
                show(judgement.by),
                f"{show(by.mean)} ({show(by.low)} to {show(by.high)})",
                f"{away:.1f}" if math.isfinite(away) else "-",
                f"{by.seeds}" + (f", {verdict.missing} without a number" * bool(verdict.missing)),
                verdict.word,
            ]
        )
    head = ["", "measure", "where", "at least", "found", "standard errors from it", "seeds", ""]
    note = (
        f"Found: how far the first is ahead, paired over seeds, with its {CONFIDENCE:.0%} interval "
        "(Student's t): it holds, or does not, where the interval is wholly on one side. "
        "Shares are of geometric means. "
    )
    if len(verdicts) > 1:
        wrong = len(verdicts) * (1 - CONFIDENCE)
        note += f"Of {len(verdicts)} intervals {wrong:.1f} are expected to miss the true value."
    return f"{markdown(head, rows)}\n\n{note.strip()}"


def _explained(measures: Iterable[Measure]) -> list[str]:
    return [f"{measure.name}: {measure.what}." for measure in measures]


def _numbers(claim: Claim, size: Size, results: pd.DataFrame) -> list[str]:
    """Two tables: means, and differences from the first candidate, paired over seeds."""
    rows, differences = [], []
    first = size.candidates[0].name
    wide = results.pivot(index=["setting", "candidate", "seed"], columns="measure", values="value")
    for setting in size.settings:
        reference = _of(wide, setting.name, first)
        for candidate in size.candidates:
            own = _of(wide, setting.name, candidate.name)
            if own.empty:
                continue
            where = [setting.name, candidate.name, str(len(own))]
            rows.append([*where, *(_mean(own[each.name], each) for each in claim.measures)])
            pairs = own.index.intersection(reference.index)
            if candidate.name != first and len(pairs):
                apart = own.loc[pairs] - reference.loc[pairs]
                where[2] = str(len(pairs))
                shown = [_mean(apart[each.name], each, sign="+") for each in claim.measures]
                differences.append([*where, *shown])
    head = ["", "", "seeds", *(measure.name for measure in claim.measures)]
    found = [markdown(head, rows)]
    if differences:
        found += [f"Differences from {first}, paired over seeds:", markdown(head, differences)]
    return found


def _of(wide: pd.DataFrame, setting: str, candidate: str) -> pd.DataFrame:
    """A row a seed."""
    levels = wide.index.get_level_values
    chosen = (levels("setting") == setting) & (levels("candidate") == candidate)
    return wide[chosen].droplevel(["setting", "candidate"])


def _mean(values: "pd.Series[float]", measure: Measure, sign: str = "") -> str:
    known = values.dropna()
    if known.empty:
        return "-"
    shown = f"{np.mean(known):{sign}{measure.format}}"
    if len(known) > 1:
        shown += f" ± {known.sem():{measure.format}}"
    return shown + (f" ({len(known)} of {len(values)})" if len(known) < len(values) else "")


def _tuning(size: Size, choices: Choices) -> str:
    if not any(choice.trials for choice in choices.values()):
        return "Nothing was tuned."
    rows = []
    for (setting, candidate), choice in choices.items():
        if not choice.trials:
            rows.append([setting, candidate, "nothing is tuned", "", "", "", ""])
            continue
        grid = "; ".join(f"`{key}` {', '.join(map(str, v))}" for key, v in choice.grid.items())
        best = ", ".join(f"`{key}` {value}" for key, value in choice.keys.items())
        found = "every trial failed" if math.isnan(choice.value) else f"{choice.value:.3f}"
        border = ", ".join(f"`{key}`" for key in choice.border)
        rows.append([setting, candidate, grid, str(choice.trials), best, found, border])
    unseen = all(each.keys.get("data.test-part") == "official" for each in size.settings)
    elsewhere = [
        f"{setting.name}: as {setting.tuned_in}" for setting in size.settings if setting.tuned_in
    ]
    note = (
        f"For each {size.trials} trials on a grid (seeds of each: {size.tuning_seeds}, other than "
        "those of the runs), judged by the end of a run on a fifth of the training "
        f"examples, on which trials do not train{'' if unseen else SEEN}. A best value at the "
        "border of its grid got one beyond it, in further trials, where that is allowed."
    )
    head = ["", "", "grid", "trials", "best", "validation", "at the border"]
    return "\n\n".join([note, markdown(head, rows), *(f"{each}." for each in elsewhere)])


def _conditions(size: Size, records: Records, command: str) -> str:
    made = Counter(record.commit for record in records.values())
    failed = [key for key, record in records.items() if record.failure]
    seconds = sum(record.seconds for record in records.values())
    lines = [
        f"* `{command}`",
        f"* {len(records)} runs, seeds 1 to {size.seeds}; runs of the same seed meet the same "
        "split, the same start and the same world.",
        "* Commit: "
        + ", ".join(f"{commit} ({count} runs)" for commit, count in made.items())
        + " (+: with changes that were not committed).",
        f"* {hardware()}; one thread a run, {seconds / 3600:.2f} hours of a core for the runs "
        "(the searches are not in it).",
    ]
    if failed:
        lines.append(
            "* Failed: "
            + "; ".join(f"{', '.join(map(str, key))}: {records[key].failure}" for key in failed)
        )
    return "\n".join(lines)


def hardware() -> str:
    """Of this machine."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        model = next(line for line in text.splitlines() if line.startswith("model name"))
        processor = model.partition(":")[2].strip()
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    return f"{processor}, {os.cpu_count()} cores, torch {torch.__version__}"


def _caption(claim: Claim, each: str, stem: str) -> str:
    axis = each.removeprefix(stem).lstrip("-")
    if not axis:
        return "The same numbers: a column a setting, means and standard errors over seeds."
    return f"Test results of a run against {figures.LABELS.get(axis, axis)}, a panel a setting."


def _share(value: float) -> str:
    return f"{value:+.0%}"


def _signed(value: float) -> str:
    return f"{value:+.3g}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
