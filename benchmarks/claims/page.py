"""The page of a claim, and beside it the numbers as CSV and the pictures."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd
from scipy import stats

from benchmarks.claims import figures
from benchmarks.claims.claim import (
    CONFIDENCE,
    Claim,
    Judgement,
    Measure,
    Record,
    Setting,
    Size,
    Verdict,
    interval,
    judge,
)
from benchmarks.claims.tuning import WIDER, Choice

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
    reached = figures.reached(results)
    drawn = {stem: figures.points(claim, size, reached)}
    for axis in claim.axes:
        drawn[f"{stem}-{axis}"] = figures.curves(claim, size, records, axis)
    if claim.costs:
        drawn[f"{stem}-costs"] = figures.costs(size, reached, *claim.costs)
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
        *_verdicts(claim.judgements, verdicts),
        *([] if missing else [claim.reading.strip()]),
        "## Numbers",
        " ".join(["Mean ± standard error over seeds.", *_explained(claim.measures, size.settings)]),
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


def _verdicts(judgements: Sequence[Judgement], verdicts: Sequence[Verdict]) -> Iterator[str]:
    """Of each statement how often it holds, and a table: a row a pair, a column a setting."""
    yield (
        "In a cell is how far the first is ahead of the second, paired over seeds, with the "
        f"{CONFIDENCE:.0%} interval (Student's t). A statement holds, or does not, where the "
        "interval is wholly on one side of what is stated; else it is undecided, and in brackets "
        "is how many standard errors there are between. Shares are of geometric means. Seeds give "
        "other splits, starts and worlds; the test part and what was tuned are the same for all: "
        "what these may bring is not in the intervals. Where a target was not reached, what the "
        "run had cost at its end is a bound, with which nothing is decided in favour of that run."
    )
    tested = [verdict for verdict in verdicts if not math.isnan(verdict.p)]
    if decided := [each.word != "undecided" for each in tested]:
        rates = stats.false_discovery_control([verdict.p for verdict in tested])
        kept = sum(word and p <= 1 - CONFIDENCE for word, p in zip(decided, rates, strict=True))
        yield (
            f"Each interval is of one comparison. Of all {len(tested)}, {sum(decided)} are "
            f"decided; {kept} stay so where the share of false ones among the decided is held at "
            f"{1 - CONFIDENCE:.0%} (Benjamini and Hochberg)."
        )
    for says in dict.fromkeys(judgement.says for judgement in judgements):
        pairs = [judgement for judgement in judgements if judgement.says == says]
        own = [verdict for verdict in verdicts if verdict.judgement in pairs]
        count = Counter(verdict.word for verdict in own)
        said = ", ".join(f"{word} in {count[word]}" for word in WORDS if count[word])
        yield f"**{says}**: {f'{said} of {len(own)}' if own else 'not measured'}."
        columns = list(dict.fromkeys(verdict.where for verdict in own))
        rows = []
        for judgement in pairs:
            cells = {each.where: _cell(each) for each in own if each.judgement is judgement}
            if cells:
                pair = f"{judgement.better} against {judgement.than}"
                rows.append([pair, *(cells.get(where, "") for where in columns)])
        if rows:
            yield markdown([pairs[0].measure, *columns], rows)


def _cell(verdict: Verdict) -> str:
    by, judgement = verdict.by, verdict.judgement
    kind = "+.0%" if judgement.relative else "+.3f"
    shown = f"**{verdict.word}**"
    if by.seeds:
        shown += f": {by.mean:{kind}}"
        shown += f" ({by.low:{kind}} to {by.high:{kind}})" if by.seeds > 1 else " (one pair)"
    if verdict.word == "undecided" and not math.isnan(verdict.apart):
        shown += f" [{verdict.apart:.1f}]"
    if verdict.bounds:
        shown += f"; a bound in {verdict.bounds} of {by.seeds}"
    return shown + (f"; {verdict.missing} pairs lack a number" if verdict.missing else "")


def _explained(measures: Iterable[Measure], settings: Iterable[Setting]) -> list[str]:
    names = dict[str, list[str]]()
    for measure in measures:
        names.setdefault(measure.what, []).append(measure.name)
    said = [f"{', '.join(own)}: {what}." for what, own in names.items()]
    targets = [f"{each.name} {each.target:g}" for each in settings if not math.isnan(each.target)]
    return [*said, f"Targets: {'; '.join(targets)}."] if targets else said


def _numbers(claim: Claim, size: Size, results: pd.DataFrame) -> list[str]:
    """Two tables: means, and differences from the first candidate, paired over seeds."""
    rows, differences = [], []
    first = size.candidates[0].name
    known = results.assign(value=results["value"].mask(results["censored"]))
    wide = known.pivot(index=["setting", "candidate", "seed"], columns="measure", values="value")
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
    found = interval(known)
    shown = f"{found.mean:{sign}{measure.format}}"
    if len(known) > 1:
        shown += f" ± {found.error:{measure.format}}"
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
        "For each the same number of trials on a grid at first (seeds of each: "
        f"{size.tuning_seeds}, other than those of the runs), judged by the last test of a run, on "
        "a fifth of the training examples, on which trials do not train"
        f"{'' if unseen else SEEN}: of values that are nearly as good chance takes one. A best "
        "value at the border of its grid got one beyond it, in further trials, where that is "
        f"allowed, {WIDER} times at most."
    )
    head = ["", "", "grid", "trials", "best", "validation", "at the border"]
    return "\n\n".join([note, markdown(head, rows), *(f"{each}." for each in elsewhere)])


def _conditions(size: Size, records: Records, command: str) -> str:
    made = Counter(record.commit for record in records.values())
    failed = [key for key, record in records.items() if record.failure]
    commits = ", ".join(f"{commit} ({count})" for commit, count in made.items())
    seconds = sum(record.seconds for record in records.values())
    machines = sorted({record.machine for record in records.values()})
    lines = [
        f"* `{command}`",
        f"* {len(records)} runs, seeds 1 to {size.seeds}; runs of the same seed meet the same "
        "split, the same start and the same world.",
        f"* Commits of the runs: {commits or '-'} (+: with changes that were not committed).",
        f"* {', '.join(machines)}; one thread a run, {seconds / 3600:.2f} hours of a core for the "
        "runs (the searches are not in it).",
    ]
    if failed:
        lines.append(
            "* Failed: "
            + "; ".join(f"{', '.join(map(str, key))}: {records[key].failure}" for key in failed)
        )
    return "\n".join(lines)


def _caption(claim: Claim, each: str, stem: str) -> str:
    axis = each.removeprefix(stem).lstrip("-")
    if not axis:
        return (
            "The same numbers: a column a setting, means and standard errors over seeds; "
            "what a target took, of those who reached it with every seed."
        )
    if axis == "costs" and claim.costs:
        return (
            f"{' and '.join(claim.costs)}, of those who got there with every seed; the dashed "
            "line: nobody is better in both."
        )
    return (
        f"Test results of a run against {figures.LABELS.get(axis, axis)}, a panel a setting; "
        "a line goes as far as all its seeds do."
    )


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
