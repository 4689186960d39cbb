"""Data sets of the claims, small enough for many runs, from a folder of them all.

That folder is described in docs/results/defaults.md. In a claim, ``data.path`` is relative to it,
and may lie in a zip file.
"""

import gzip
import os
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import joblib
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.datasets import FashionMNIST

from benchmarks import cifar10_jpeg
from configuration.config import ROOT
from datasets import sources
from datasets.errors import SourceError
from datasets.files import existing
from datasets.names import call_imported
from datasets.sources import Examples
from datasets.tables import csv

UNPACKED = ROOT / "runs/claims/data"
_KEPT = joblib.Memory(ROOT / "runs/claims/decoded", verbose=0)
TESTED = 4000  # pictures of the official test part

# Test parts are the same for all seeds: no trial with one sees a test example of another's.
OFFICIAL = {"data.path": ".", "data.test-part": "official"}
FASHION = OFFICIAL | {"data.source": "benchmarks.claims.data:fashion", "model.name": "mlp"}
FASHION_SMALL = FASHION | {"data.source": "benchmarks.claims.data:fashion_small"}
CIFAR = FASHION | {"data.source": "benchmarks.claims.data:cifar", "model.name": "cnn"}
DIGITS = OFFICIAL | {"data.source": "benchmarks.claims.data:digits", "model.name": "cnn"}
SPEECH = OFFICIAL | {
    "data.source": "benchmarks.claims.data:speech",
    "data.path": "fsdd.zip/train",
    "model.name": "cnn",
}
SPEAKERS = SPEECH | {"data.source": "benchmarks.claims.data:speakers"}
NEWS = OFFICIAL | {
    "data.source": "benchmarks.claims.data:news",
    "data.path": "ag_news_small.zip/train.csv",
    "model.name": "mlp",
}
HEART = OFFICIAL | {
    "data.source": "benchmarks.claims.data:heart",
    "data.path": "heart_disease.zip/",
    "model.name": "mlp",
}


def located(data: str, path: str) -> str:
    """Where a claim's ``data.path`` is, once it is unpacked."""
    archive, zipped, inside = path.partition(".zip/")
    return str(UNPACKED / archive / inside if zipped else Path(data) / path)


def make_ready(data: str, source: str, path: str) -> None:
    """Unpack the zip file in which a claim's ``data.path`` lies, once, and read what it needs.

    Raises:
        SourceError: it cannot be read: better now than as the failure of every run.
        FileNotFoundError: there is no such zip file.
    """
    unpack(data, path)
    if ":" in source:
        call_imported("data.source", source, SourceError, located(data, path))
    else:
        existing(located(data, path))


def unpack(data: str, path: str) -> None:
    """Unpack the zip file in which a claim's ``data.path`` lies, once.

    Raises:
        FileNotFoundError: there is none.
    """
    archive, zipped, _ = path.partition(".zip/")
    if not zipped or (folder := UNPACKED / archive).exists():
        return
    UNPACKED.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=UNPACKED) as partial:
        with zipfile.ZipFile(Path(data) / f"{archive}.zip") as file:
            file.extractall(f"{partial}/{archive}")
        os.replace(f"{partial}/{archive}", folder)


def fashion(path: str) -> Examples:
    """Fashion-MNIST at 14 x 14 pixels: 60,000 pictures to train on, 4,000 to test."""
    return _fashion(path, 60_000)


def fashion_small(path: str) -> Examples:
    """24,000 of them to train on."""
    return _fashion(path, 24_000)


def _fashion(path: str, count: int) -> Examples:
    raw = Path(path) / "FashionMNIST/raw"
    x, y = [], []
    for part, number in (("train", count), ("t10k", TESTED)):  # they come in random order
        pixels = _read(raw / f"{part}-images-idx3-ubyte", 16, number * 28 * 28)
        x.append(_halved(pixels.view(-1, 1, 28, 28)))
        y.append(_read(raw / f"{part}-labels-idx1-ubyte", 8, number).long())
    return _with_test_part(x, y, tuple(FashionMNIST.classes))


def cifar(path: str) -> Examples:
    """CIFAR-10 at 16 x 16 pixels: 50,000 pictures to train on, 4,000 to test."""
    whole = cifar10_jpeg.load(str(Path(path) / "cifar10.npz"))
    assert isinstance(whole.x, Tensor)
    assert isinstance(whole.y, Tensor)
    chosen = torch.randperm(int(whole.test.sum()), generator=torch.Generator().manual_seed(1))
    tested = whole.test.nonzero().squeeze(1)[chosen[:TESTED]]  # they come class by class
    trained = (~whole.test).nonzero().squeeze(1)
    x = [
        F.avg_pool2d(whole.x[part].float(), 2).round().to(torch.uint8) for part in (trained, tested)
    ]
    return _with_test_part(x, [whole.y[part] for part in (trained, tested)], whole.classes)


def digits(path: str) -> Examples:
    """scikit-learn's, with a test part that no seed changes."""
    return _held_out(sources.digits())


def speech(path: str) -> Examples:
    """Spoken digits, spectrograms of half the size; a speaker is a natural site."""
    clips = _KEPT.cache(sources.audio_folder)(path, "_([a-z]+)_", 1.0)
    return _held_out(clips._replace(x=F.avg_pool2d(clips.x.float(), 2)))


def speakers(path: str) -> Examples:
    """Spoken digits by speaker and digit: 60 classes of some 45 clips."""
    return labelled_by_speaker(speech(path))


def labelled_by_speaker(clips: Examples) -> Examples:
    """Clips whose class is who says what."""
    assert isinstance(clips.group, Tensor)
    names = tuple(f"{speaker} {digit}" for speaker in clips.groups for digit in clips.classes)
    return Examples(clips.x, clips.group * len(clips.classes) + clips.y, names, test=clips.test)


def news(path: str) -> Examples:
    """AG news in four classes, as bags of 4,096 words and pairs."""
    return _held_out(_KEPT.cache(sources.text_csv)(path, "label", "", 4096))


def heart(path: str) -> Examples:
    """Patients of four hospitals, the natural sites: ill or not."""
    return _held_out(csv(path, "target > 0", ""))


def _held_out(examples: Examples) -> Examples:
    """A fifth, drawn once, is the test part."""
    drawn = torch.rand(len(examples.y), generator=torch.Generator().manual_seed(1))
    return examples._replace(test=drawn < 0.2)


def _read(file: Path, header: int, count: int) -> Tensor:
    """The first bytes of a file in MNIST's format, packed or not."""
    packed = file.with_name(f"{file.name}.gz")
    with gzip.open(packed) if packed.exists() else file.open("rb") as whole:
        return torch.from_numpy(
            np.frombuffer(whole.read(header + count), np.uint8, offset=header).copy()
        )


def _halved(pictures: Tensor) -> Tensor:
    """Means of 2 x 2 pixels."""
    return F.avg_pool2d(pictures.float(), 2).round().to(torch.uint8)


def _with_test_part(x: list[Tensor], y: list[Tensor], classes: tuple[str, ...]) -> Examples:
    test = torch.arange(sum(map(len, y))) >= len(y[0])
    return Examples(torch.cat(x), torch.cat(y), classes, test=test)
