"""GSGM against ASGD on sites with few classes: accuracy and stability.

For equal updates and for equal virtual time.

    python -m benchmarks.gsgm fashion-mnist ROOT      torchvision's layout
    python -m benchmarks.gsgm cifar10 CIFAR10.npz     see benchmarks/cifar10_jpeg.py
    python -m benchmarks.gsgm speakers FOLDER         spoken digits, see conf/audio.toml

One mini-batch a contribution, LeNet-5 (speakers, with 60 classes, who says what: the small CNN,
clipped), the same learning rate, updates and seeds for all; the speed of a site is lognormal.
Printed for each experiment: the mean over seeds ± its standard error. Accuracy is the mean of the
last five tests; "at equal time" of the last five before the fastest method was done; sigma and jump
are those of ``Run.summary``, in brackets the part of ASGD's that is saved. Half an hour on two
cores for either of the larger two.
"""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.claims.data import labelled_by_speaker
from datasets.sources import Examples, audio_folder
from simulation.laboratory import Comparison, compare
from simulation.world import Lognormal, World

WORLD = World(samples_per_s=Lognormal(median=200, sigma=0.7))
PICTURES = {
    "model.name": "lenet5",
    "training.lr": 0.015,
    "training.clip-norm": 0.0,
    "epochs": 2,
    "results.evaluate-every": 125,
    "data.test-part": "official",
}
DATA_SETS: dict[str, dict[str, Any]] = {
    "fashion-mnist": {"data.source": "fashion-mnist", **PICTURES},
    "cifar10": {"data.source": "benchmarks.cifar10_jpeg:load", **PICTURES},
    "speakers": {
        "data.source": "benchmarks.gsgm:speakers",
        "training.lr": 0.05,
        "training.clip-norm": 1.0,
        "epochs": 30,
        "results.evaluate-every": 75,
    },
}
ASGD, GSGM = {"strategy": "asgd"}, {"strategy": "gsgm", "gsgm.schedule": "list"}
AGED = GSGM | {"gsgm.staleness": "polynomial"}  # with the exponent 1/2
CLASSES = {1: [10, 20, 30], 2: [10, 20, 30]}  # a site: numbers of sites
IID_FRACTIONS = (0.2, 0.5, 1.0)


def speakers(path: str) -> Examples:
    """Spoken digits, labelled by speaker and digit: 60 classes."""
    return labelled_by_speaker(audio_folder(Path(path), "_([a-z]+)_", 1.0))


def experiments(data: str) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """The experiments by name: the sites' data, and the methods."""
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    classes = {6: [10, 20, 30], 2: [30]} if data == "speakers" else CLASSES
    for per_site, sites in classes.items():
        for number in sites:
            methods = {"ASGD": ASGD, "GSGM": GSGM} | ({"GSGM, aged": AGED} if number > 10 else {})
            found[f"{number} sites, {per_site} classes each"] = (
                {"num-sites": number, "partition.classes-per-site": per_site},
                methods,
            )
    if data != "speakers":
        for fraction in IID_FRACTIONS:
            what = {
                "num-sites": 10,
                "partition.classes-per-site": 1,
                "partition.iid-fraction": fraction,
            }
            found[f"10 sites, 1 class each, {fraction:.0%} iid"] = (
                what,
                {"ASGD": ASGD, "GSGM": GSGM},
            )
    return found


def measure(comparison: Comparison) -> pd.DataFrame:
    """Run an experiment; a row for each method and seed."""
    rows = []
    for seed in range(min(map(len, comparison.runs.values()))):
        runs = {name: found[seed] for name, found in comparison.runs.items()}
        end = min(run.history["seconds"].max() for run in runs.values())
        for name, run in runs.items():
            table = run.history
            rows.append(
                {
                    "method": name,
                    "accuracy": table["accuracy"].tail(5).mean(),
                    "at equal time": table.loc[table["seconds"] <= end, "accuracy"].tail(5).mean(),
                    **run.summary[["sigma", "jump", "hours"]],
                }
            )
    return pd.DataFrame(rows)


def report(measured: pd.DataFrame) -> str:
    """Print a line for each method."""
    groups = measured.groupby("method", sort=False)
    mean, error = groups.mean(), groups.sem()
    lines = []
    for name in mean.index:
        saved = 1 - mean.loc[name] / mean.loc["ASGD"]
        lines.append(
            f"  {name:<12}"
            + "".join(
                f"{key} {mean.loc[name, key]:.3f} ± {error.loc[name, key]:.3f}   "
                for key in ("accuracy", "at equal time")
            )
            + "".join(
                f"{key} {mean.loc[name, key]:.4f} ± {error.loc[name, key]:.4f} "
                f"({saved[key]:+.0%})   "
                for key in ("sigma", "jump")
            )
            + f"{mean.loc[name, 'hours'] * 60:.1f} minutes"
        )
    return "\n".join(lines)


def main() -> None:
    """Print experiment after experiment."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", choices=DATA_SETS)
    parser.add_argument("path")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int)
    parser.add_argument(
        "--only", default="", help="experiments whose name holds this, such as '30 sites'"
    )
    parser.add_argument("--lr", type=float)
    parser.add_argument("--epochs", type=int)
    arguments = parser.parse_args()
    common = DATA_SETS[arguments.data] | {
        "data.path": arguments.path,
        "partition.kind": "classes",
        "training.lr-ratio": 1.0,
    }
    given = {"training.lr": arguments.lr, "epochs": arguments.epochs}
    common |= {key: value for key, value in given.items() if value is not None}
    for name, (what, methods) in experiments(arguments.data).items():
        if arguments.only not in name:
            continue
        comparison = compare(
            methods,
            seeds=arguments.seeds,
            world=WORLD,
            processes=arguments.processes,
            progress=False,
            **common,
            **what,
        )
        print(f"{arguments.data}, {name}\n{report(measure(comparison))}", flush=True)


if __name__ == "__main__":
    main()
