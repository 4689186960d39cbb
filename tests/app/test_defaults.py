"""With the shipped defaults every method learns, and every kind of data is learned.

That holds however unlike the sites are. The real data sets take longer: ``python -m
benchmarks.defaults``, docs/results/defaults.md.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_breast_cancer, load_digits

from benchmarks.defaults import NEEDED, SPLITS, reached
from configuration.config import configuration
from simulation.laboratory import simulate
from strategies.method import PeerPlan
from strategies.methods import METHODS
from tests.data import write_audio, write_texts

# These know no class but those of one site: they learn where all sites hold all classes.
ALONE = ("local", "Krum", "MultiKrum")
DRIVERS = ("co-learning", "gsgm", "dmsgd")


def learns(method: str, split: str, **keys: Any) -> bool:
    """Peers by the batched engine, which is the relay step for step, and faster, where it can."""
    common: dict[str, Any] = {"strategy": method, "data.test-part": "pooled"} | NEEDED.get(
        method, {}
    )
    peers = isinstance(configuration(**common).plan, PeerPlan) and method != "relaysgd"
    engine = "batched" if peers else "app"
    return reached(
        simulate(engine=engine, progress=False, **(common | SPLITS[split] | keys))
    ).learned


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(method: str) -> None:
    assert learns(method, "iid" if method in ALONE else "Dirichlet", epochs=6)


def write_table(folder: Path) -> None:
    """569 tumours with 30 measures each."""
    load_breast_cancer(as_frame=True).frame.to_csv(folder / "tumours.csv", index=False)


def write_pictures(folder: Path) -> None:
    """600 handwritten digits, a folder a class."""
    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images[:600], digits.target[:600], strict=True)):
        (folder / "pictures" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype(np.uint8)).save(
            folder / "pictures" / str(label) / f"{i}.png"
        )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_table(folder)
    write_pictures(folder)
    write_audio(folder / "audio")
    write_texts(folder / "texts.csv")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", DRIVERS)
@pytest.mark.parametrize(
    ("source", "keys"),
    [
        ("csv", {"data.path": "tumours.csv", "data.label": "target", "model.name": "mlp"}),
        ("image-folder", {"data.path": "pictures", "data.image-size": 16}),
        ("audio-folder", {"data.path": "audio"}),
        ("text-csv", {"data.path": "texts.csv", "model.name": "mlp"}),
    ],
)
def test_every_kind_of_data_is_learned(
    source: str, keys: dict[str, Any], method: str, data: Path
) -> None:
    path = str(data / keys["data.path"])
    assert learns(
        method, "Dirichlet", **(keys | {"data.source": source, "data.path": path}), epochs=12
    )
