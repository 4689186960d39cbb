"""Peer methods on unlike data: accuracy, convergence, consensus, flatness, compression.

    python -m benchmarks.peer_methods fashion-mnist ROOT      torchvision's layout
    python -m benchmarks.peer_methods cifar10 CIFAR10.npz     see benchmarks/cifar10_jpeg.py

``peer_methods.toml`` beside this file says what is run: LeNet-5, one exchange a mini-batch of 32 a
peer, in the batched engine, the same seeds and epochs for all. Printed for each method: mean over
seeds ± standard error of the accuracy of the peers' own models on the official test part, the worst
peer's, that of the mean model; the consensus distance; iterations to the target (and how many seeds
reached it); lambda_max, the largest eigenvalue of the Hessian of the training loss at the mean
model, by power iteration on 2,000 examples.
"""

import argparse
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.claims.flatness import largest_eigenvalue
from configuration.config import flatten
from simulation.laboratory import Comparison, compare

SETTINGS: dict[str, Any] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
TARGETS = {"fashion-mnist": 0.7, "cifar10": 0.3}


def measure(comparison: Comparison, target: float) -> pd.DataFrame:
    """Run an experiment; a row for each method and seed."""
    rows = []
    for name, runs in comparison.runs.items():
        for run in runs:
            table, trained = run.history, run.metrics.query("metric == 'consensus-distance'")
            reached = table.loc[table["accuracy"] >= target, "round"]
            last = table.iloc[-1]
            rows.append(
                {
                    "method": name,
                    "accuracy": last["accuracy"],
                    "worst": last["accuracy-worst"],
                    "of the mean": last["accuracy-of-mean"],
                    "distance": trained["value"].iloc[-1],
                    "iterations": reached.iloc[0] if len(reached) else np.nan,
                    "lambda": largest_eigenvalue(run),
                    "MB": last["megabytes"],
                }
            )
    return pd.DataFrame(rows)


def report(measured: pd.DataFrame, target: float) -> str:
    """Print a line for each method."""
    groups = measured.groupby("method", sort=False)
    mean, error = groups.mean(), groups.sem()
    reached = groups["iterations"].count()
    lines = []
    for name in mean.index:
        shown = [
            f"{key} {mean.loc[name, key]:.3f} ± {error.loc[name, key]:.3f}"
            for key in ("accuracy", "worst", "of the mean")
        ]
        shown.append(f"distance {mean.loc[name, 'distance']:.2f}")
        shown.append(f"{target:g} after {mean.loc[name, 'iterations']:.0f} ({reached[name]})")
        shown.append(f"lambda {mean.loc[name, 'lambda']:.0f} ± {error.loc[name, 'lambda']:.0f}")
        shown.append(f"{mean.loc[name, 'MB']:.0f} MB")
        lines.append(f"  {name:<18}" + "   ".join(shown))
    return "\n".join(lines)


def main() -> None:
    """Print experiment after experiment."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", choices=SETTINGS["data"])
    parser.add_argument("path")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=SETTINGS["common"]["epochs"])
    parser.add_argument("--processes", type=int)
    parser.add_argument(
        "--only", default="", help="experiments whose name holds this, such as 'torus'"
    )
    arguments = parser.parse_args()
    common = flatten(SETTINGS["common"]) | flatten(SETTINGS["data"][arguments.data])
    common |= {"data.path": arguments.path, "epochs": arguments.epochs}
    for name, experiment in SETTINGS["experiments"].items():
        if arguments.only not in name:
            continue
        what = {key: value for key, value in experiment.items() if key != "methods"}
        comparison = compare(
            {
                method: common | flatten(what) | flatten(SETTINGS["methods"][method])
                for method in experiment["methods"]
            },
            engine="batched",
            seeds=arguments.seeds,
            processes=arguments.processes,
            progress=False,
        )
        target = TARGETS[arguments.data]
        print(
            f"{arguments.data}, {name}\n{report(measure(comparison, target), target)}", flush=True
        )


if __name__ == "__main__":
    main()
