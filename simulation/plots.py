"""Pictures that compare strategies: the same style as a run's own."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from server_app.plots import (
    COLOURS,
    GREY,
    Picture,
    legend,
    log_scale,
    looks_of,
    show_differences,
    style,
)

AXES = {"round": "round", "seconds": "time", "megabytes": "sent and received (MB)"}
MOST_TICKS = 8
UNITS = {"hours": 3600.0, "minutes": 60.0, "seconds": 1.0}
POINTS = 200
SPAN = 10  # a larger ratio is shown on a log scale


def comparison(histories: Mapping[str, Sequence[pd.DataFrame]], metric: str, step: str) -> Figure:
    """The metric by round, by hour and by megabyte.

    A line a strategy, with a band of one standard error; one legend, in the order of the lines'
    ends. The scale is that of the later three quarters: what is before may lie outside of it.

    Args:
        histories: of each strategy, one table a seed, with the columns round, seconds, megabytes
            and the metric.
        metric: such as accuracy or loss.
        step: what the column round counts.

    Raises:
        ValueError: nobody measured the metric.
    """
    known = {
        column for tables in histories.values() for table in tables for column in table.columns
    }
    if metric not in known:
        raise ValueError(
            f"metric = {metric!r}: measured were {', '.join(sorted(known - set(AXES)))}"
        )
    figure = Picture(figsize=(15, 4.6), layout="constrained")
    longest = max(
        table["seconds"].iloc[-1] for tables in histories.values() for table in tables if len(table)
    )
    unit = next(unit for unit, length in UNITS.items() if longest >= 2 * length or length == 1)
    labels = AXES | {"round": step, "seconds": f"time ({unit})"}
    looks = looks_of(list(histories))
    ends: dict[str, float] = {}
    lines = []
    for axes, (column, label) in zip(
        figure.subplots(1, len(AXES), sharey=True), labels.items(), strict=True
    ):
        for name, tables in histories.items():
            used = [table for table in tables if metric in table and len(table)]
            if not used:
                continue
            x, mean, error = _mean_curve(used, column, metric)
            x = x / UNITS[unit] if column == "seconds" else x
            axes.plot(x, mean, lw=1.8, ms=5, markevery=max(1, len(x) // 6), **looks[name])
            axes.fill_between(
                x, mean - error, mean + error, color=looks[name]["color"], alpha=0.15, lw=0
            )
            ends[name] = float(mean[-1])
            lines += [mean - error, mean + error]
        style(axes, label, f"test {metric}" if column == "round" else "")
        if column == "round":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    show_differences(axes, lines)
    ordered = sorted(ends, key=lambda name: -ends[name])
    legend(figure, {name: looks[name] for name in ordered})
    return figure


def cost(table: pd.DataFrame, x: str, y: str) -> Figure:
    """What it takes on two scales, a point a strategy: see :func:`draw_cost`."""
    figure = Picture(figsize=(7.5, 5), layout="constrained")
    looks = looks_of(list(map(str, table.index)))
    there = draw_cost(figure.subplots(), table, x, y, looks)
    legend(figure, {name: looks[name] for name in there})
    return figure


def draw_cost(
    axes: Axes, table: pd.DataFrame, x: str, y: str, looks: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Draw what it takes on two scales: less is better on both.

    Bars are one standard error; a line joins those than which no other one is better on both (the
    Pareto front).

    Args:
        axes: to draw in.
        table: a row a strategy, with the columns (x, "mean"), (x, "s.e.") and so for y; NaN where
            it never got there.
        x: a column, and the label of its axis.
        y: the other one.
        looks: of each strategy.

    Returns:
        the strategies that got there.
    """
    there = table[table[x, "mean"].notna() & table[y, "mean"].notna()]
    means = there[[(x, "mean"), (y, "mean")]].to_numpy(float)
    better = (means[:, None] <= means).all(-1) & (means[:, None] < means).any(-1)
    front = means[~better.any(0)]
    axes.plot(*front[front[:, 0].argsort()].T, color=GREY, lw=1, ls="--", zorder=0)
    for name, row in there.iterrows():
        axes.errorbar(
            row[x, "mean"],
            row[y, "mean"],
            xerr=np.nan_to_num(row[x, "s.e."]),
            yerr=np.nan_to_num(row[y, "s.e."]),
            ms=8,
            elinewidth=1.2,
            **{**looks[str(name)], "ls": ""},
        )
    style(axes, x, y)
    for axis, values in (("x", means[:, 0]), ("y", means[:, 1])):
        if len(values) and 0 < SPAN * values.min() < values.max():
            log_scale(axes, axis)
    return list(map(str, there.index))


def search(table: pd.DataFrame, space: Mapping[str, Sequence[Any]], metric: str) -> Figure:
    """The metric by each key of a search: a point a trial, the best one filled.

    Args:
        table: a row a trial, the best first: the keys, the metric and "s.e.".
        space: of each key a list of values, or a tuple, whose third element says "log".
        metric: such as accuracy.
    """
    figure = Picture(figsize=(4 * len(space), 3.6), layout="constrained")
    panels = figure.subplots(1, len(space), sharey=True, squeeze=False)[0]
    for axes, (key, values) in zip(panels, space.items(), strict=True):
        numbers = [value for value in values if type(value) in (int, float)]
        ranged = isinstance(values, tuple)
        named = not ranged and len(numbers) < len(values)
        x = [str(value) for value in table[key]] if named else table[key]
        axes.errorbar(
            x, table[metric], table["s.e."].fillna(0), fmt="o", color=COLOURS[0], mfc="none"
        )
        axes.plot(x[:1], table[metric][:1], "o", color=COLOURS[0])
        if "log" in values or (
            not (named or ranged) and min(numbers) > 0 and max(numbers) >= 10 * min(numbers)
        ):
            log_scale(axes, "x")
        if not (named or ranged) and len(numbers) <= MOST_TICKS:  # what was tried, nothing between
            axes.set_xticks(numbers, [f"{number:g}" for number in numbers])
        style(axes, key, f"validation {metric}" if axes is panels[0] else "")
    return figure


def _mean_curve(
    tables: Sequence[pd.DataFrame], column: str, metric: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """``x`` [points], the mean over the seeds and its standard error.

    A seed that ends early keeps its last value.
    """
    start, stop = (
        max(table[column].iloc[0] for table in tables),
        max(table[column].iloc[-1] for table in tables),
    )
    x = np.linspace(start, stop, POINTS) if stop > start else np.array([start], dtype=np.float64)
    values = np.stack([np.interp(x, table[column], table[metric]) for table in tables])
    error = values.std(0, ddof=1) / np.sqrt(len(tables)) if len(tables) > 1 else np.zeros_like(x)
    return x, values.mean(0), error
