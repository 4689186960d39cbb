"""Co-learning against what it is compared with, at equal epochs: test accuracy, rounds and bytes over several seeds.

    python -m benchmarks.co_learning digits
    python -m benchmarks.co_learning fashion-mnist ROOT      torchvision's layout
    python -m benchmarks.co_learning cifar10 CIFAR10.npz     see benchmarks/cifar10_jpeg.py

Each experiment is what ``make run`` does, in this process. Half an hour on one core for either of the larger two.
"""

import argparse
import contextlib
import io
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from client_app.app import app as client_app
from server_app.app import app as server_app
from simulation.grid import run_in_process

DEFAULTS = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
METHODS: dict[str, dict[str, Any]] = {
    "Co-learning (CLR + ILE)": {"strategy": "co-learning"},
    "CLR only": {"strategy": "co-learning", "epsilon": 0.0},
    "ILE only": {"strategy": "co-learning", "lr-ratio": 1.0},
    "FedAvg, decaying rate": {"strategy": "fedavg"},
    "FedAvg, constant rate": {"strategy": "fedavg", "lr-ratio": 1.0},
    "ensemble": {"strategy": "ensemble"},
    "centralized": {"strategy": "centralized"},
}
LARGE = {
    "model": "lenet5",
    "batch-size": 64,
    "lr": 0.02,
    "epochs": 16,
    "local-epochs": 1,
    "epsilon": 0.1,
    "test-part": "official",
}
DATA_SETS: dict[str, dict[str, Any]] = {
    "digits": {},
    "fashion-mnist": {"data": "fashion-mnist", **LARGE},
    "cifar10": {"data": "benchmarks.cifar10_jpeg:load", **LARGE, "epochs": 10, "epsilon": 0.13},
}


def run(changes: dict[str, Any]) -> dict[str, float]:
    """One run: accuracy of all sites after the last round, rounds, megabytes to the server and back for training."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = DEFAULTS | changes | {"results-dir": folder}
        run_in_process(server_app, client_app, config["num-sites"], config)
        metrics = pd.read_csv(next(Path(folder).glob("*/metrics.csv")))
    tested = metrics.query("split == 'test' and site == 'all'")
    last = tested[tested["round"] == tested["round"].max()].set_index("metric")
    accuracy = last["value"]["accuracy"]
    single = last["value"].get("accuracy-single", float("nan"))
    return {"accuracy": accuracy, "one site": single, "rounds": tested["round"].max(), "MB up": last["bytes_up"].iloc[0] / 1e6}


def main() -> None:
    """Print the table after each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=DATA_SETS)
    parser.add_argument("path", nargs="?", default="")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    base = DATA_SETS[arguments.data] | {"data-path": arguments.path}

    for name, changes in METHODS.items():
        found = pd.DataFrame([run(base | changes | {"seed": 1 + seed}) for seed in range(arguments.seeds)])
        mean, error = found.mean(), found.sem()
        spread = f"{mean['accuracy']:.4f} ± {error['accuracy']:.4f}"
        print(
            f"{name:<25}{spread}   rounds {mean['rounds']:.1f}   {mean['MB up']:.1f} MB up   one site {mean['one site']:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
