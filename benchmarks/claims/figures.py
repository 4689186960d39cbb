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
from numpy.typing import NDArray

from benchmarks.claims.claim import Claim, Record, Size
from server_app.plots import Picture, legend, log_scale, looks_of, show_differences, style
from simulation.plots import SPAN, draw_cost

ACROSS = 3  # panels in a row
# Black and white change places; colours stay.
DARK = """@media (prefers-color-scheme: dark) {
 text { fill: #e9eff5 }
 [style*="stroke: #000000"] { stroke: #e9eff5 !important }
 [style*="fill: #000000"] { fill: #e9eff5 !important }
 [style*="fill: #ffffff"] { fill: #151c24 !important }
}"""
LABELS = {"round": "rounds, updates or exchanges", "megabytes": "sent and received (MB)"}
COLUMN = 2.5  # of the legend, in inches
POINTS = 60


def reached(results: pd.DataFrame) -> pd.DataFrame:
    """Without what a candidate did not reach with every seed: the mean of others is no cost."""
    never = results.groupby(["setting", "candidate", "measure"])["censored"].transform("any")
    return results.assign(value=results["value"].mask(never))


def points(claim: Claim, size: Size, results: pd.DataFrame) -> Figure:
    """A panel a measure, a column in it a setting: means over seeds, bars of one standard error."""
    panels = [measure for measure in claim.measures if measure.name in _measured(results)]
    settings = [each.name for each in size.settings if each.name in set(results["setting"])]
    looks = looks_of([candidate.name for candidate in size.candidates])
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
            log_scale(axes, "y")
        style(axes, "", f"{measure.name} ({'more' if measure.larger else 'less'} is better)")
        axes.set_xticks(range(len(settings)), settings, rotation=35, ha="right", fontsize=8)
        axes.set_xlim(-0.6, len(settings) - 0.4)
        for border in range(1, len(settings)):
            axes.axvline(border - 0.5, color="#dddddd", lw=0.8, zorder=0)
    legend(figure, looks, int(figure.get_figwidth() / COLUMN))
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
    looks = looks_of([candidate.name for candidate in size.candidates])
    figure, grid = _panels(len(there), 4.2)
    for axes, setting in zip(grid, there, strict=False):
        lines: list[NDArray[np.float64]] = []
        ends = []
        for name, look in looks.items():
            runs = [
                (each.history[axis].to_numpy(float), each.history[each.headline].to_numpy(float))
                for key, each in records.items()
                if key[:2] == (setting, name) and not each.failure and len(each.history)
            ]
            if runs:
                lines.append(_curve(axes, runs, look))
                ends.append(min(float(x[-1]) for x, _ in runs))
        if ends and 0 < SPAN * min(ends) < max(ends):
            log_scale(axes, "x")
        headline = next(each.headline for key, each in records.items() if key[0] == setting)
        style(axes, LABELS.get(axis, axis), f"test {headline}")
        axes.set_title(setting, fontsize=9)
        show_differences(axes, lines)
    legend(figure, looks, int(figure.get_figwidth() / COLUMN))
    return figure


def costs(size: Size, results: pd.DataFrame, x: str, y: str) -> Figure:
    """A panel a setting: two measures of which less is better, who is best, who is not there."""
    there = [each.name for each in size.settings if each.name in set(results["setting"])]
    looks = looks_of([candidate.name for candidate in size.candidates])
    figure, grid = _panels(len(there), 4.2)
    drawn = set[str]()
    for axes, setting in zip(grid, there, strict=False):
        own = results[(results["setting"] == setting) & results["measure"].isin((x, y))]
        table = own.pivot_table(
            index="candidate", columns="measure", values="value", aggfunc=["mean", "sem"]
        )
        table = table.rename(columns={"sem": "s.e."}, level=0).swaplevel(axis=1)
        shown = (
            draw_cost(axes, table, x, y, looks) if {(x, "mean"), (y, "mean")} <= set(table) else []
        )
        drawn |= {*shown}
        absent = ", ".join(name for name in looks if name in set(own["candidate"]) - {*shown})
        axes.set_title(f"{setting}; not there: {absent}" if absent else setting, fontsize=9)
    looks = {name: look for name, look in looks.items() if name in drawn}
    legend(figure, looks, int(figure.get_figwidth() / COLUMN))
    return figure


def _curve(
    axes: Axes, runs: Sequence[tuple[np.ndarray, np.ndarray]], look: Mapping[str, Any]
) -> NDArray[np.float64]:
    """Draw it; the means."""
    start, stop = max(x[0] for x, _ in runs), min(x[-1] for x, _ in runs)
    x = np.linspace(start, stop, POINTS) if stop > start else np.array([stop])
    values = np.stack([np.interp(x, *run) for run in runs])
    mean = values.mean(0)
    error = values.std(0, ddof=1) / len(runs) ** 0.5 if len(runs) > 1 else 0.0 * mean
    axes.plot(x, mean, lw=1.6, markevery=max(1, len(x) // 6), ms=4, **look)
    axes.fill_between(x, mean - error, mean + error, color=look["color"], alpha=0.15, lw=0)
    return np.asarray(mean)


def _measured(results: pd.DataFrame) -> set[str]:
    return set(results.dropna()["measure"])


def _panels(count: int, width: float) -> tuple[Figure, list[Axes]]:
    across = max(1, min(count, 2 if count == 4 else ACROSS))
    down = max(1, math.ceil(count / across))
    width = max(4.2 if across > 1 else 2.5 * COLUMN, width)
    figure = Picture(figsize=(width * across, 3.6 * down + 0.8), layout="constrained")
    grid = list(figure.subplots(down, across, squeeze=False).flat)
    for empty in grid[count:]:
        empty.set_axis_off()
    return figure, grid


def save(figure: Figure, file: Path) -> None:
    """As PNG, and as SVG, the same for the same numbers, that goes dark where its reader's page is.

    The suffix is put behind the file's name.
    """
    figure.savefig(file.with_suffix(".png"), dpi=90)
    with matplotlib.rc_context({"svg.hashsalt": "claims", "svg.fonttype": "none"}):
        figure.savefig(file.with_suffix(".svg"), metadata={"Date": None})
    drawn = file.with_suffix(".svg").read_text()
    file.with_suffix(".svg").write_text(
        drawn.replace("<defs>", f"<style>{DARK}</style>\n <defs>", 1)
    )
