"""What a claim declares: who is compared, in what, what is measured, and how that is judged.

A claim is a module beside this one with a value ``CLAIM``; :mod:`benchmarks.claims.runner` runs
it, :mod:`benchmarks.claims.page` writes what came out.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from benchmarks.claims.data import located
from configuration.checks import unused
from configuration.config import Config, configuration, flatten
from simulation.laboratory import Run
from simulation.world import World
from strategies.method import PeerPlan

Keys = Mapping[str, Any]
CONFIDENCE = 0.95
TINY = 1e-12  # what a relative difference takes a 0 for


@dataclass(frozen=True)
class Candidate:
    """One way to train.

    Attributes:
        name: in tables and pictures.
        keys: of the run configuration.
        space: of each key that is tuned, the values that are tried.
        below: what a tuned key stays below when its grid gets wider: there another method begins.
    """

    name: str
    keys: Keys
    space: Mapping[str, list[Any]]
    below: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What candidates are compared in.

    Attributes:
        name: in tables and pictures.
        keys: of the run configuration: data, sites, partition, budget, with dots; a candidate's
            come after, and what has no effect with its method is left out.
        world: of the sites; all but peers in one run in the batched engine.
        target: of the task's headline, where something is measured until it is reached.
        tuned_in: another setting whose tuned keys are taken; empty: tuned here.
        candidates: their names; empty: all.
    """

    name: str
    keys: Keys
    world: World | None = None
    target: float = math.nan
    tuned_in: str = ""
    candidates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Size:
    """How much of a claim is run.

    Attributes:
        settings: in the order of tables and pictures.
        candidates: the first is the one that the others' differences are taken from.
        seeds: runs of each candidate in each setting, with the seeds 1, 2, ...
        tuning_seeds: runs of each trial, with seeds that are not those of the runs.
    """

    settings: tuple[Setting, ...]
    candidates: tuple[Candidate, ...]
    seeds: int
    tuning_seeds: int = 1


@dataclass(frozen=True)
class Record:
    """What is kept of a run.

    Attributes:
        history: :attr:`simulation.laboratory.Run.history`.
        final: what the claim measured on the last models.
        headline: the task's, a column of the history.
        larger: whether more of it is better.
        failure: why there is no history; empty where there is one.
        commit: of the code that ran.
        seconds: that the run took.
        machine: on which it ran.
    """

    history: pd.DataFrame
    final: Mapping[str, float]
    headline: str
    larger: bool
    failure: str
    commit: str
    seconds: float
    machine: str = "unknown hardware"


class Censored(float):
    """What a run had cost when it ended, its target not reached: a lower bound of the cost."""


class Measure(NamedTuple):
    """A number of a run.

    Attributes:
        name: in tables.
        what: it is, in words.
        of: a run in a setting; :class:`Censored` where only a lower bound is known.
        larger: whether more is better.
        format: of a mean.
        beside: a candidate whose run with the same seed ``of`` gets, too; NaN where there is none.
    """

    name: str
    what: str
    of: Callable[..., float]
    larger: bool = True
    format: str = ".3f"
    beside: str = ""


class Judgement(NamedTuple):
    """A statement that numbers decide: ``better`` is ahead of ``than`` by at least ``by``.

    Attributes:
        says: it in words.
        measure: name of what is compared.
        better, than: candidates.
        by: the least difference; negative: it may be so much worse. A share of ``than``'s value
            where ``relative``.
        relative: whether ratios are compared (of geometric means) and not differences.
        settings: where; empty: everywhere where both are.
        over: each: a verdict a setting; range: one, of the difference between the largest and the
            smallest over these settings, of which less is better.
    """

    says: str
    measure: str
    better: str
    than: str
    by: float = 0.0
    relative: bool = False
    settings: tuple[str, ...] = ()
    over: Literal["each", "range"] = "each"


@dataclass(frozen=True)
class Claim:
    """A question, and what answers it.

    Attributes:
        question: of the page's title.
        about: what is claimed, by whom, and what is ours.
        quick, full: what is run.
        measures: columns of the tables; the first is also drawn over time.
        judgements: see :class:`Judgement`.
        axes: columns of a run's history over which the headline is drawn.
        costs: two measures of which less is better, drawn against each other.
        final: measures the last models of a run; its numbers are :attr:`Record.final`.
        reading: what a person makes of the numbers of the full size.
    """

    question: str
    about: str
    quick: Size
    full: Size
    measures: tuple[Measure, ...]
    judgements: tuple[Judgement, ...]
    axes: tuple[str, ...] = ("round",)
    costs: tuple[str, str] | None = None
    final: Callable[[Run], dict[str, float]] | None = None
    reading: str = ""

    def size(self, name: str) -> Size:
        """By name: quick or full."""
        return {"quick": self.quick, "full": self.full}[name]


@dataclass(frozen=True)
class Cell:
    """A candidate in a setting: a run for each seed.

    Attributes:
        keys: of the run configuration, the tuned ones too.
    """

    setting: Setting
    candidate: Candidate
    keys: Keys

    def config(self, seed: int) -> Config:
        """Of the run with this seed.

        Raises:
            ConfigError: what is wrong with it.
        """
        return configuration(**self.keys, seed=seed)

    @property
    def engine(self) -> str:
        """Of the laboratory."""
        peers = isinstance(self.config(1).plan, PeerPlan)
        return "app" if peers and self.setting.world else "batched"


def cells(size: Size, data: str) -> list[Cell]:
    """Every candidate in every setting that has it, with nothing tuned yet.

    Args:
        size: of the claim.
        data: folder of the data sets.
    """
    found = []
    for setting in size.settings:
        for candidate in size.candidates:
            if setting.candidates and candidate.name not in setting.candidates:
                continue
            own = flatten(candidate.keys)
            without = unused(own["strategy"])
            shared = {k: v for k, v in flatten(setting.keys).items() if k not in without}
            if "data.path" in shared:
                shared["data.path"] = located(data, shared["data.path"])
            found.append(Cell(setting, candidate, shared | own))
    return found


# Measures that several claims have.


def last(column: str = "", tests: int = 1) -> Callable[[Record, Setting], float]:
    """The mean of a column of the history, by default the headline, over the last tests."""
    return lambda record, _: float(
        record.history[column or record.headline].to_numpy(float)[-tests:].mean()
    )


def meanwhile(column: str, tests: int) -> Callable[[Record, Setting, Record], float]:
    """The mean of the headline over the last tests before another run is over, by a column."""

    def of(record: Record, _: Setting, beside: Record) -> float:
        until_then = record.history[column] <= beside.history[column].iloc[-1]
        return float(record.history.loc[until_then, record.headline].iloc[-tests:].mean())

    return of


def final(name: str) -> Callable[[Record, Setting], float]:
    """What the claim measured on the last models."""
    return lambda record, _: record.final[name]


def sigma(record: Record, _: Setting) -> float:
    """The standard deviation of the headline over the second half of a run."""
    return float(_second_half(record).std(ddof=0))


def jump(record: Record, _: Setting) -> float:
    """The mean step of the headline from test to test over the second half of a run."""
    return float(_second_half(record).diff().abs().mean())


def _second_half(record: Record) -> "pd.Series[float]":
    return record.history[record.headline].iloc[len(record.history) // 2 :]


def until(
    column: str, scale: float = 1.0, target: float | None = None
) -> Callable[[Record, Setting], float]:
    """A column of the history, scaled, at the first test that reaches a target.

    By default the setting's.
    """

    def of(record: Record, setting: Setting) -> float:
        values, aim = record.history[record.headline], setting.target if target is None else target
        reached = values >= aim if record.larger else values <= aim
        costs = scale * record.history[column].to_numpy(float)
        return float(costs[reached][0]) if reached.any() else Censored(costs[-1])

    return of


def steps(low: float, high: float, count: int) -> list[float]:
    """A grid of so many values from ``low`` to ``high``, evenly on a log scale, two digits each."""
    return [float(f"{value:.2g}") for value in np.geomspace(low, high, count)]


OF_PEERS = (
    Measure("accuracy", "test accuracy, mean of the peers' own models", last()),
    Measure("worst peer", "the worst peer's", last("accuracy-worst")),
    Measure("mean model", "that of the mean of all models", last("accuracy-of-mean")),
)


# Statistics.


class Interval(NamedTuple):
    """A mean over seeds, its standard error, and where the true one is with ``CONFIDENCE``."""

    mean: float
    error: float
    low: float
    high: float
    seeds: int


def interval(values: "pd.Series[float]") -> Interval:
    """By Student's t, of independent values; NaN where there are fewer than two."""
    n, mean = len(values), float(values.mean())
    if n < 2:
        return Interval(mean, math.nan, math.nan, math.nan, n)
    error = float(stats.sem(values))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
    return Interval(mean, error, mean - reach, mean + reach, n)


class Verdict(NamedTuple):
    """Of a judgement in a setting.

    Attributes:
        where: the setting, or all of them.
        by: how far ``better`` is ahead, paired over seeds: a share where the judgement is relative.
        apart: standard errors between what was found and what is stated; of logarithms, where the
            judgement is relative.
        word: holds, does not hold, undecided.
        missing: pairs of runs of which one has no such number, or both have only a bound.
        bounds: pairs of which one has only a bound.
    """

    judgement: Judgement
    where: str
    by: Interval
    apart: float
    word: str
    missing: int
    bounds: int

    @property
    def p(self) -> float:
        """Of the two-sided t test of what is stated; NaN where there is none."""
        return float(2 * stats.t.sf(self.apart, self.by.seeds - 1))


def judge(judgement: Judgement, measure: Measure, results: pd.DataFrame) -> Iterator[Verdict]:
    """The verdicts that the numbers give.

    Args:
        judgement: what is to be decided.
        measure: of the judgement's name.
        results: see :func:`benchmarks.claims.runner.results`.
    """
    chosen = results[results["measure"] == judgement.measure]
    names = [judgement.better, judgement.than]
    if not set(names) <= set(chosen["candidate"]):
        return
    chosen = chosen[chosen["candidate"].isin(names)]
    twice = chosen.groupby(["setting", "seed"])["value"].transform("size") == len(names)
    table = (
        chosen[twice]
        .pivot(index=["setting", "seed"], columns="candidate", values=["value", "censored"])
        .astype(float)
    )
    both = {setting: group.droplevel(0) for setting, group in table.groupby(level=0)}
    order = [name for name in judgement.settings or chosen["setting"].unique() if name in both]
    if judgement.over == "each":
        parts = {name: both[name] for name in order}
    elif len(order) > 1:
        stack = pd.concat({name: both[name] for name in order}).groupby(level=1)
        whole = stack.apply(lambda g: g.max(skipna=False) - g.min(skipna=False))
        whole["censored"] = stack.max()["censored"]
        whole[stack.size() < len(order)] = math.nan  # a seed that is not through with all settings
        parts = {f"range over {'; '.join(order)}": whole}
    else:
        parts = {}
    sign = 1.0 if measure.larger and judgement.over != "range" else -1.0
    for where, pair in parts.items():
        yield _verdict(judgement, where, pair, sign)


def _verdict(judgement: Judgement, where: str, pair: pd.DataFrame, sign: float) -> Verdict:
    better, than = (pair["value", each] for each in (judgement.better, judgement.than))
    bound, bounded = (pair["censored", each] == 1 for each in (judgement.better, judgement.than))
    better = better.mask(bound & bounded)  # nothing is known of such a pair
    if judgement.relative:
        # A ratio's logarithm is what errors are symmetric in; it is told as a share: exp - 1.
        ratio = (better.clip(lower=TINY) / than.clip(lower=TINY)).dropna()
        found, stated = interval(ratio.map(math.log)), math.log1p(sign * judgement.by)
        mean, *ends = (
            sign * math.expm1(each) + 0.0 for each in (found.mean, found.low, found.high)
        )
        by = Interval(mean, found.error, min(ends), max(ends), found.seeds)
    else:
        by = found = interval((sign * (better - than)).dropna())
        stated = judgement.by
    apart = abs(found.mean - stated) / found.error if found.error > 0 else math.nan
    missing = len(better) - found.seeds
    if missing or math.isnan(by.low) or by.low < judgement.by <= by.high:
        word = "undecided"
    elif by.low == by.high == judgement.by == 0:  # alike to the bit: not ahead
        word = "does not hold"
    else:
        word = "holds" if by.low >= judgement.by else "does not hold"
    # Who has only a bound is farther behind than it looks.
    if (word == "holds" and bound.any()) or (word == "does not hold" and bounded.any()):
        word = "undecided"
    return Verdict(judgement, where, by, apart, word, missing, int((bound ^ bounded).sum()))
