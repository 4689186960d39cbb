"""Pictures that compare strategies: the same style as a run's own."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy.typing import NDArray

from server_app.plots import COLOURS, Picture, style

AXES = {"round": "round", "seconds": "time", "megabytes": "sent and received (MB)"}
MOST_TICKS = 8
UNITS = {"hours": 3600.0, "minutes": 60.0, "seconds": 1.0}
POINTS = 200
LABEL_GAP = 0.045  # between two direct labels, as a share of the height


def comparison(histories: Mapping[str, Sequence[pd.DataFrame]], metric: str, step: str) -> Figure:
    """The metric by round, by hour and by megabyte.

    A line a strategy, labelled at its end, with a band of one standard error.

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
    for axes, (column, label) in zip(
        figure.subplots(1, len(AXES), sharey=True), labels.items(), strict=True
    ):
        ends = []
        for (name, tables), colour in zip(
            histories.items(), COLOURS * (1 + len(histories) // len(COLOURS)), strict=False
        ):
            used = [table for table in tables if metric in table and len(table)]
            if not used:
                continue
            x, mean, error = _mean_curve(used, column, metric)
            x = x / UNITS[unit] if column == "seconds" else x
            # One test is no line.
            axes.plot(x, mean, color=colour, lw=1.8, marker="o" if len(x) == 1 else "")
            axes.fill_between(x, mean - error, mean + error, color=colour, alpha=0.2, lw=0)
            ends.append((float(mean[-1]), name, colour))
        style(axes, label, f"test {metric}" if column == "round" else "")
        if column == "round":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _label_ends(axes, ends)
    return figure


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
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
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


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write each line's name to the right of the axes, as near to its end as there is room."""
    low, high = axes.get_ylim()
    ordered = sorted(ends)
    places: list[float] = []
    for value, *_ in ordered:
        places.append(max((value - low) / (high - low), places[-1] + LABEL_GAP if places else 0.0))
    limit = 1.0
    for index in reversed(range(len(places))):  # not above the axes: the names below make room
        places[index] = min(places[index], limit)
        limit = places[index] - LABEL_GAP
    for place, (_, name, colour) in zip(places, ordered, strict=True):
        axes.annotate(
            name,
            (1.01, place),
            xycoords="axes fraction",
            color=colour,
            va="center",
            fontsize=9,
            annotation_clip=False,
        )
