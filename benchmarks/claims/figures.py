"""Pictures of a claim: small multiples, one legend, axes that show the differences."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from benchmarks.claims.claim import Claim, Record, Size
from server_app.plots import COLOURS, Picture, style

MARKERS = "osD^vP*X"
LINES = ("-", "--", ":")
ACROSS = 3  # panels in a row
LABELS = {"round": "rounds, updates or exchanges", "megabytes": "sent and received (MB)"}
POINTS = 60
SPAN = 20  # a larger ratio is shown on a log scale


def points(claim: Claim, size: Size, results: pd.DataFrame) -> Figure:
    """A panel a measure, a column in it a setting: means over seeds, bars of one standard error."""
    panels = [measure for measure in claim.measures if measure.name in _measured(results)]
    settings = [each.name for each in size.settings if each.name in set(results["setting"])]
    looks = _looks(size)
    figure, grid = _panels(len(panels), len(settings) * 0.55 + 2.2)
    for axes, measure in zip(grid, panels, strict=False):
        chosen = results[results["measure"] == measure.name]
        groups = chosen.groupby(["candidate", "setting"])["value"]
        mean, error = groups.mean(), groups.sem()
        for place, setting in enumerate(settings):
            there = [name for name in looks if (name, setting) in mean.index]
            for number, name in enumerate(there):
                x = place + (number - (len(there) - 1) / 2) * 0.75 / len(there)
                bar = np.nan_to_num(error[name, setting])
                look = looks[name] | {"ls": ""}
                axes.errorbar(x, mean[name, setting], bar, elinewidth=1.2, ms=5, **look)
        if 0 < SPAN * mean.min() < mean.max():
            axes.set_yscale("log")
        style(axes, "", f"{measure.name} ({'more' if measure.larger else 'less'} is better)")
        axes.set_xticks(range(len(settings)), settings, rotation=35, ha="right", fontsize=8)
        axes.set_xlim(-0.6, len(settings) - 0.4)
        for border in range(1, len(settings)):
            axes.axvline(border - 0.5, color="#dddddd", lw=0.8, zorder=0)
    _legend(figure, looks)
    return figure


def curves(
    claim: Claim, size: Size, records: Mapping[tuple[str, str, int], Record], axis: str
) -> Figure:
    """A panel a setting: the headline, means over seeds, bands of one standard error."""
    there = [
        setting.name
        for setting in size.settings
        if any(key[0] == setting.name and not each.failure for key, each in records.items())
    ]
    looks = _looks(size)
    figure, grid = _panels(len(there), 4.2)
    for axes, setting in zip(grid, there, strict=False):
        late: list[float] = []
        for name, look in looks.items():
            runs = [
                (each.history[axis].to_numpy(float), each.history[each.headline].to_numpy(float))
                for key, each in records.items()
                if key[:2] == (setting, name) and not each.failure and len(each.history)
            ]
            if runs:
                late += _curve(axes, runs, look)
        headline = next(each.headline for key, each in records.items() if key[0] == setting)
        style(axes, LABELS.get(axis, axis), f"test {headline}")
        axes.set_title(setting, fontsize=9)
        if known := [value for value in late if math.isfinite(value)]:
            low, high = np.quantile(known, [0.02, 1.0])
            room = 0.08 * (high - low) or 0.01
            axes.set_ylim(low - room, high + room)
        axes.yaxis.set_major_locator(MaxNLocator(6))
    _legend(figure, looks)
    return figure


def _curve(
    axes: Axes, runs: Sequence[tuple[np.ndarray, np.ndarray]], look: Mapping[str, Any]
) -> list[float]:
    """Draw it; the values of its later three quarters, by which the scale is chosen."""
    start, stop = max(x[0] for x, _ in runs), min(x[-1] for x, _ in runs)
    x = np.linspace(start, stop, POINTS) if stop > start else np.array([stop])
    values = np.stack([np.interp(x, *run) for run in runs])
    mean = values.mean(0)
    error = values.std(0, ddof=1) / len(runs) ** 0.5 if len(runs) > 1 else 0.0 * mean
    axes.plot(x, mean, lw=1.6, markevery=max(1, len(x) // 6), ms=4, **look)
    axes.fill_between(x, mean - error, mean + error, color=look["color"], alpha=0.15, lw=0)
    return [float(value) for value in mean[len(mean) // 4 :]]


def _measured(results: pd.DataFrame) -> set[str]:
    return set(results.dropna()["measure"])


def _looks(size: Size) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of each candidate: hollow where colours begin again."""
    return {
        candidate.name: {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "ls": LINES[number // len(COLOURS) % len(LINES)],
            "mfc": "none" if number >= len(COLOURS) else COLOURS[number],
        }
        for number, candidate in enumerate(size.candidates)
    }


def _panels(count: int, width: float) -> tuple[Figure, list[Axes]]:
    across = max(1, min(count, ACROSS))
    down = max(1, math.ceil(count / across))
    figure = Picture(figsize=(max(4.2, width) * across, 3.6 * down + 0.8), layout="constrained")
    grid = list(figure.subplots(down, across, squeeze=False).flat)
    for empty in grid[count:]:
        empty.set_axis_off()
    return figure, grid


def _legend(figure: Figure, looks: Mapping[str, Mapping[str, Any]]) -> None:
    """One for all panels."""
    handles = [Line2D([], [], ms=5, label=name, **look) for name, look in looks.items()]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize="small"
    )


def save(figure: Figure, file: Path) -> None:
    """As PNG, and as SVG that is the same for the same numbers."""
    figure.savefig(file.with_suffix(".png"), dpi=90)
    with matplotlib.rc_context({"svg.hashsalt": "claims", "svg.fonttype": "none"}):
        figure.savefig(file.with_suffix(".svg"), metadata={"Date": None})
