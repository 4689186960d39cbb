"""Pictures of a run, for a slide or a report.

Axes have labels and units; colour-blind people can tell the colours apart.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from strategies.schedules import decay
from strategies.topology import Topology, spectral_gap

# Okabe and Ito.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"
MARKERS, LINES = "osD^vP*X", ("-", "--", ":")
COLOURS = (BLUE, ORANGE, GREEN, RED, "#CC79A7", "#56B4E9", "#000000", GREY)


class Picture(Figure):
    """A figure that a notebook shows, with pyplot or without."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.savefig(buffer, format="png", dpi=90, bbox_inches="tight")
        return buffer.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    partial = path.with_suffix(".partial")
    figure.savefig(partial, format="png", dpi=120, bbox_inches="tight")
    partial.replace(path)


def style(axes: Axes, x_label: str, y_label: str) -> None:
    """Labels, no frame above and at the right, a faint grid."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(alpha=0.25)


def log_scale(axes: Axes, axis: str) -> None:
    """A log scale of x or y, once all is drawn, whose labels are plain numbers.

    1, 2 and 5 of each decade; of more than three decades 1 only.
    """
    axes.set(**{f"{axis}scale": "log"})
    ticks = axes.xaxis if axis == "x" else axes.yaxis
    low, high = ticks.get_view_interval()
    ticks.set_major_locator(LogLocator(subs=(1, 2, 5) if high <= 1000 * low else (1,)))
    ticks.set_major_formatter("{x:g}")
    ticks.set_minor_formatter(NullFormatter())


def looks_of(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of each; hollow where colours begin again."""
    return {
        name: {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "ls": LINES[number // len(COLOURS) % len(LINES)],
            "mfc": "none" if number >= len(COLOURS) else COLOURS[number],
        }
        for number, name in enumerate(names)
    }


def legend(figure: Figure, looks: Mapping[str, Mapping[str, Any]], columns: int = 1) -> None:
    """One for all panels: at their right, or in some columns below."""
    handles = [Line2D([], [], ms=5, label=name, **look) for name, look in looks.items()]
    figure.legend(
        handles=handles,
        loc="outside right center" if columns == 1 else "outside lower center",
        ncols=columns,
        frameon=False,
        fontsize="small",
    )


def show_differences(axes: Axes, lines: Sequence[NDArray[np.float64]]) -> None:
    """A scale for the later three quarters of lines: what is before may lie outside of it."""
    late = [line[len(line) // 4 :] for line in lines]
    if known := [line for line in late if np.isfinite(line).all()]:
        ends = [line[-1] for line in known]
        low, high = np.quantile(np.concatenate(known), [0.02, 0.98])  # without single spikes
        low, high = min(low, *ends), max(high, *ends)
        room = 0.08 * (high - low) or 0.01
        axes.set_ylim(low - room, high + room)
    axes.yaxis.set_major_locator(MaxNLocator(6))


def curves(metrics: pd.DataFrame, title: str, unit: str, headline: str = "accuracy") -> Figure:
    """A metric and the loss on the sites' test parts, against ``unit``, seconds and bytes.

    The band spans the sites.
    """
    tested = metrics[metrics["split"] == "test"].copy()
    tested["megabytes"] = (tested["bytes_up"] + tested["bytes_down"]) / 1e6
    figure = Picture(figsize=(12, 6.5), layout="constrained")
    grid = figure.subplots(2, 3, sharey="row")
    means = tested[tested["site"] == "all"]
    each = tested[tested["site"] != "all"]
    axis = {"round": unit, "seconds": "time (s)", "megabytes": "sent and received (MB)"}
    for row, (metric, label) in zip(
        grid, ((headline, f"test {headline}"), ("loss", "test loss")), strict=True
    ):
        mean = means[means["metric"] == metric]
        spread = each[each["metric"] == metric].groupby("round")["value"].agg(["min", "max"])
        trained = metrics[
            (metrics["metric"] == metric)
            & (metrics["site"] == "all")
            & (metrics["split"] == "train")
        ]
        for axes, (column, unit) in zip(row, axis.items(), strict=True):
            axes.fill_between(
                mean[column],
                spread["min"],
                spread["max"],
                color=BLUE,
                alpha=0.15,
                lw=0,
                label="worst to best site",
            )
            axes.plot(
                mean[column], mean["value"], color=BLUE, marker="o", ms=3, label="all sites, test"
            )
            if not trained.empty and column == "round":
                axes.plot(
                    trained[column], trained["value"], color=ORANGE, ls="--", label="training"
                )
            style(axes, unit, label if column == "round" else "")
        row[0].xaxis.set_major_locator(MaxNLocator(integer=True))
        if not mean.empty:
            last = mean.iloc[-1]
            row[2].annotate(
                f"{last['value']:.3f}",
                (last["megabytes"], last["value"]),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                color=BLUE,
                annotation_clip=False,
            )
        row[0].legend(frameon=False, fontsize="small")
    figure.suptitle(title)
    return figure


def schedule(metrics: pd.DataFrame, title: str, shape: str, epsilon: float) -> Figure:
    """Learning rate (of ``shape``), local epochs and how far the model moved, by round.

    ``epsilon`` is drawn as a line.
    """
    trained = metrics[(metrics["split"] == "train") & (metrics["site"] == "all")]
    table = trained.pivot_table(index="round", columns="metric", values="value", aggfunc="last")
    figure = Picture(figsize=(8, 7), layout="constrained")
    rates, epochs, change = figure.subplots(3, 1, sharex=True)
    for number, first, last in zip(table.index, table["lr-first"], table["lr-last"], strict=True):
        done = np.linspace(0, 1, 21)
        rates.plot(
            number - 0.5 + done, [first * decay(shape, last / first, u) for u in done], color=BLUE
        )
    rates.set_ylim(bottom=0)
    style(rates, "", "learning rate")
    epochs.bar(table.index, table["local-epochs"], color=GREEN, width=0.9)
    epochs.yaxis.set_major_locator(MaxNLocator(integer=True))
    style(epochs, "", "local epochs")
    if "model-change" in table:
        change.plot(table.index, table["model-change"], color=RED, marker="o", ms=3)
        largest = float(table["model-change"].max())
        if 0 < epsilon < 2 * largest:  # a line far above would flatten the curve
            change.axhline(epsilon, color=GREY, ls="--", lw=1)
            change.annotate(
                "epsilon",
                (1, epsilon),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                color=GREY,
            )
        change.set_ylim(bottom=0)
    figure.suptitle(title)
    style(change, "round", "relative change\nof the model")
    change.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def arrivals(metrics: pd.DataFrame, title: str) -> Figure:
    """Plot the staleness of contributions, and how often each site contributed."""
    trained = metrics[metrics["split"] == "train"]
    stale = trained[(trained["site"] == "all") & trained["metric"].str.startswith("staleness-")]
    counts = stale.groupby(stale["metric"].str.removeprefix("staleness-").astype(int))[
        "value"
    ].sum()
    each = (
        trained[(trained["site"] != "all") & (trained["metric"] == "updates")]
        .groupby("site")["value"]
        .sum()
    )
    each = each.reindex(sorted(each.index, key=int))
    figure = Picture(figsize=(11, 4), layout="constrained")
    histogram, bars = figure.subplots(1, 2)
    histogram.bar(counts.index, counts, color=BLUE, width=0.9)
    style(histogram, "staleness (updates since the site was sent its model)", "contributions")
    histogram.xaxis.set_major_locator(MaxNLocator(integer=True))
    bars.bar(each.index, each, color=GREEN, width=0.9)
    style(bars, "site", "contributions")
    figure.suptitle(title)
    return figure


def graph(topology: Topology, name: str, labels: Sequence[str]) -> Figure:
    """Plot the communication graph; lines are as wide as their weights."""
    figure = Picture(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    links = topology.graph
    n = links.number_of_nodes()
    around = (
        name in ("ring", "circulant", "complete", "exponential", "one-peer-exponential") or n < 4
    )
    places = nx.circular_layout(links) if around else nx.kamada_kawai_layout(links)
    mean = torch.stack(topology.matrices).mean(0)
    widths = [1 + 6 * float(mean[j, i]) for i, j in links.edges]
    nx.draw_networkx_edges(links, places, ax=axes, width=widths, edge_color=GREY, node_size=600)
    nx.draw_networkx_nodes(links, places, ax=axes, node_color=BLUE, node_size=600)
    nx.draw_networkx_labels(links, places, ax=axes, font_color="white", font_size=9)
    given = [label for number, label in enumerate(labels) if label != f"site {number}"]
    if given:
        names = "   ".join(f"{number} {label}" for number, label in enumerate(labels))
        axes.set_xlabel(names, fontsize=8, parse_math=False)  # sites choose them: a $ is a $
    axes.set_title(
        f"{name}: {n} peers, {links.number_of_edges()} links, "
        f"spectral gap {spectral_gap(*topology.matrices):.3g}"
    )
    axes.spines[:].set_visible(False)
    return figure


def plot_class_counts(counts: pd.DataFrame) -> Figure:
    """``counts``, a row a site and a column a class: the darker, the more examples."""
    table = counts.to_numpy()
    num_sites, num_classes = table.shape
    figure = Picture(
        figsize=(max(4, 1.5 + 0.55 * min(num_classes, 40)), max(2.6, 1.6 + 0.35 * num_sites)),
        layout="constrained",
    )
    axes = figure.subplots()
    image = axes.imshow(table, cmap="Blues", aspect="auto", vmin=0)
    axes.set_yticks(range(num_sites), [str(name) for name in counts.index], parse_math=False)
    step = max(1, num_classes // 40)
    labels = [
        str(name) if len(str(name)) <= 12 else f"{str(name)[:11]}…" for name in counts.columns
    ]
    turned = 45 if max(map(len, labels)) > 3 else 0
    axes.set_xticks(range(0, num_classes, step), labels[::step], rotation=turned, parse_math=False)
    if num_classes <= 20:
        for (site, label), count in np.ndenumerate(table):
            colour = "white" if count > 0.6 * table.max() else "black"
            axes.text(
                label,
                site,
                f"{count:,}" if count else "·",
                ha="center",
                va="center",
                color=colour,
                fontsize=8,
            )
    axes.set_xlabel("class")
    figure.colorbar(image, label="examples", shrink=0.9)
    axes.set_title("Who has what (training and test examples)")
    return figure
