"""Whether every method learns with the shipped defaults.

Final test accuracy of each, on small parts of every built-in kind of data.

    python -m benchmarks.defaults DATA      the folder that docs/results/defaults.md describes
    python -m benchmarks.defaults DATA --only fedbuff --data digits sms --set fedbuff.buffer-size=5

Nothing is set but the data, the epochs, and ``model.name = "mlp"`` where the examples are no
pictures. Test parts are pooled: every model is tested on all classes, whatever its site holds.
"""

import argparse
import gzip
import math
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from configuration.flower import parse_config_args
from server_app.discovery import RunError
from server_app.results import class_counts
from simulation.laboratory import Run, simulate
from strategies.methods import METHODS

EPOCHS = 12
SPLITS: dict[str, dict[str, Any]] = {
    "iid": {},
    "Dirichlet": {"partition.kind": "dirichlet", "partition.alpha": 0.1},
}
# What has no default, or none that suits: a method on trees.
NEEDED = {
    "QFedAvg": {"flower.arguments": "client_learning_rate=0.05"},
    "relaysgd": {"topology.name": "path"},
}
GAIN = 0.1  # of the way from the most frequent class's share to 1


class Reached(NamedTuple):
    """What a run reached, beside what one reaches who knows nothing but the classes' shares."""

    accuracy: float
    loss: float
    chance: float
    entropy: float

    @property
    def learned(self) -> bool:
        """Whether it is better by more than chance would explain."""
        return self.accuracy > self.chance + GAIN * (1 - self.chance) and self.loss < self.entropy


def reached(run: Run) -> Reached:
    """At the end: where all classes are equal, chance is 1 / classes and entropy log(classes)."""
    last, counts = run.history.iloc[-1], class_counts(run.sites).sum()
    shares = [float(count / counts.sum()) for count in counts if count]
    entropy = -sum(share * math.log(share) for share in shares)
    return Reached(float(last["accuracy"]), float(last["loss"]), max(shares), entropy)


def parts(shared: Path, folder: Path, examples: int) -> dict[str, dict[str, Any]]:
    """Write so many ``examples`` of each data set into ``folder``; return what reads each."""
    generator = np.random.default_rng(1)
    tables = {"data.test-part": "pooled", "model.name": "mlp"}
    found: dict[str, dict[str, Any]] = {"digits": {"data.test-part": "pooled"}}
    _fashion(shared / "FashionMNIST/raw", folder / "fashion/FashionMNIST/raw", examples)
    found["fashion-mnist"] = {"data.source": "fashion-mnist", "data.path": str(folder / "fashion")}
    _cifar(shared / "cifar10.npz", folder / "cifar10.npz", examples, generator)
    found["cifar10"] = {
        "data.source": "benchmarks.cifar10_jpeg:load",
        "data.path": str(folder / "cifar10.npz"),
    }
    with zipfile.ZipFile(shared / "fsdd.zip") as archive:
        sounds = sorted(
            name
            for name in archive.namelist()
            if name.startswith("train/") and name.endswith(".wav")
        )
        archive.extractall(folder, generator.permutation(sounds)[: examples // 2].tolist())
    found["audio"] = {
        "data.source": "audio-folder",
        "data.path": str(folder / "train"),
        "data.group": "_([a-z]+)_",
    }
    for name, file in (("ag-news", "ag_news_small"), ("sms", "sms_spam")):
        with zipfile.ZipFile(shared / f"{file}.zip") as archive, archive.open("train.csv") as table:
            pd.read_csv(table).sample(examples, random_state=1).to_csv(
                folder / f"{name}.csv", index=False
            )
        found[name] = {
            "data.source": "text-csv",
            "data.path": str(folder / f"{name}.csv"),
            **tables,
        }
    with zipfile.ZipFile(shared / "heart_disease.zip") as archive:
        archive.extractall(
            folder / "heart", [name for name in archive.namelist() if name.endswith(".csv")]
        )
    found["heart"] = {
        "data.source": "csv",
        "data.path": str(folder / "heart"),
        "data.label": "target > 0",
        "epochs": 32,
        **tables,
    }
    return {name: found["digits"] | each for name, each in found.items()}


def _fashion(raw: Path, to: Path, examples: int) -> None:
    """Write the first examples (they come in random order), in MNIST's format.

    Of the official test part, which is not used, it writes ten.
    """
    to.mkdir(parents=True)
    for file in raw.glob("*.gz"):
        count = examples if file.name.startswith("train") else 10
        header, size = (16, 28 * 28) if "images" in file.name else (8, 1)
        with gzip.open(file) as whole:
            start = whole.read(header)
            (to / file.stem).write_bytes(
                start[:4] + count.to_bytes(4, "big") + start[8:] + whole.read(count * size)
            )


def _cifar(file: Path, to: Path, examples: int, generator: np.random.Generator) -> None:
    """Write randomly chosen examples (they come class by class).

    Of the official test part, which is not used, it writes ten.
    """
    with np.load(file) as whole:
        arrays = {"classes": whole["classes"]}
        for part, count in (("train", examples), ("test", 10)):
            data, offsets, labels = (
                whole[f"{part}_{name}"] for name in ("data", "offsets", "labels")
            )
            chosen = generator.permutation(len(labels))[:count]
            pictures = [data[offsets[i] : offsets[i + 1]] for i in chosen]
            arrays[f"{part}_data"], arrays[f"{part}_labels"] = (
                np.concatenate(pictures),
                labels[chosen],
            )
            arrays[f"{part}_offsets"] = np.cumsum([0, *map(len, pictures)])
    np.savez(to, **arrays)


def cells(
    methods: list[str], data: dict[str, dict[str, Any]], changes: dict[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """Method, column and accuracy, as each run ends."""
    for method in methods:
        for name, keys in data.items():
            for split, partition in SPLITS.items():
                common: dict[str, Any] = {
                    "epochs": EPOCHS,
                    "progress": False,
                    "strategy": method,
                    **NEEDED.get(method, {}),
                }
                start = time.monotonic()
                try:
                    found = reached(simulate(**(common | keys | partition | changes)))
                    text = f"{found.accuracy:.2f}" + (
                        "" if found.learned else f" (loss {found.loss:.2f})"
                    )
                except (RunError, ValueError) as error:
                    text = str(error)
                print(
                    f"{method:<18}{name:<14}{split:<10}{text}   {time.monotonic() - start:.0f} s",
                    flush=True,
                )
                yield method, f"{name}, {split}", text


def main() -> None:
    """Print line after line, then the table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path)
    parser.add_argument("--examples", type=int, default=1200)
    parser.add_argument(
        "--only", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD"
    )
    parser.add_argument("--data", nargs="+", metavar="DATA")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        data = parts(arguments.path, Path(folder), arguments.examples)
        data = {name: data[name] for name in arguments.data or data}
        table = pd.DataFrame(
            cells(arguments.only, data, parse_config_args([" ".join(arguments.set)])),
            columns=["method", "", "v"],
        )
    wide = table.pivot(index="method", columns="", values="v").loc[
        arguments.only, table[""].unique()
    ]
    rows = [
        ["method", *wide.columns],
        ["---"] * (len(wide.columns) + 1),
        *([name, *row] for name, *row in wide.itertuples()),
    ]
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


if __name__ == "__main__":
    main()
