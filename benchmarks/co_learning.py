"""Co-learning against its baselines, at equal epochs.

Test accuracy, rounds and bytes over several seeds.

    python -m benchmarks.co_learning digits
    python -m benchmarks.co_learning fashion-mnist ROOT      torchvision's layout
    python -m benchmarks.co_learning cifar10 CIFAR10.npz     see benchmarks/cifar10_jpeg.py
    python -m benchmarks.co_learning heart FOLDER            likewise audio, text; see conf/

Each experiment is what ``make run`` does. Twenty minutes on two cores for either of the larger two.
"""

import argparse
import tomllib
from typing import Any

import numpy as np

from configuration.config import ROOT, flatten
from simulation.laboratory import compare

METHODS: dict[str, dict[str, Any]] = {
    "Co-learning (CLR + ILE)": {"strategy": "co-learning"},
    "CLR only": {"strategy": "co-learning", "co-learning.epsilon": 0.0},
    "ILE only": {"strategy": "co-learning", "training.lr-ratio": 1.0},
    "FedAvg, decaying rate": {"strategy": "fedavg"},
    "FedAvg, constant rate": {"strategy": "fedavg", "training.lr-ratio": 1.0},
    "ensemble": {"strategy": "ensemble"},
    "a site alone, on its own test part": {"strategy": "local"},
    "centralized": {"strategy": "centralized"},
}
LARGE = {
    "model.name": "lenet5",
    "training.batch-size": 64,
    "training.lr": 0.02,
    "epochs": 16,
    **{
        f"{name}.local-epochs": 1
        for name in ("co-learning", "fedavg", "ensemble", "local", "centralized")
    },
    "co-learning.epsilon": 0.1,
    "data.test-part": "official",
}
DATA_SETS: dict[str, dict[str, Any]] = {
    "digits": {},
    "fashion-mnist": {"data.source": "fashion-mnist", **LARGE},
    "cifar10": {
        "data.source": "benchmarks.cifar10_jpeg:load",
        **LARGE,
        "epochs": 10,
        "co-learning.epsilon": 0.13,
    },
    "audio": {"conf": "conf/audio.toml"},
    "text": {"conf": "conf/text.toml"},
    "heart": {"conf": "conf/heart.toml"},
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", choices=DATA_SETS)
    parser.add_argument("path", nargs="?", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int)
    arguments = parser.parse_args()
    common = {"training.clip-norm": 0.0} | DATA_SETS[arguments.data] | {"data.path": arguments.path}
    if conf := common.pop(
        "conf", None
    ):  # a file's section of Co-learning counts where Co-learning runs
        common = flatten(tomllib.loads((ROOT / conf).read_text())) | common
    comparison = compare(METHODS, seeds=arguments.seeds, processes=arguments.processes, **common)
    print(comparison.text().to_string())
    for name, runs in comparison.runs.items():
        if "accuracy-single" in runs[0].history:  # of the ensemble's models
            single = np.array([run.history["accuracy-single"].iloc[-1] for run in runs])
            error = single.std(ddof=1) / len(single) ** 0.5 if len(single) > 1 else float("nan")
            print(
                f"{name}: one of its models alone, "
                f"on everybody's test parts {single.mean():.4f} ± {error:.4f}"
            )


if __name__ == "__main__":
    main()
