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
TRAINED, TESTED = 24_000, 4_000  # pictures of the official parts

# Test parts are the same for all seeds: no trial with one sees a test example of another's.
OFFICIAL = {"data.path": ".", "data.test-part": "official"}
FASHION = OFFICIAL | {"data.source": "benchmarks.claims.data:fashion_small", "model.name": "mlp"}
CIFAR = OFFICIAL | {
    "data.source": "benchmarks.claims.data:cifar_small",
    "data.path": "cifar10.npz",
    "model.name": "cnn",
}
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
        try:
            os.replace(f"{partial}/{archive}", folder)
        except OSError:
            if not folder.exists():  # else another process was first
                raise


def fashion_small(path: str) -> Examples:
    """Fashion-MNIST at 14 x 14 pixels: 24,000 pictures to train on, 4,000 to test."""
    raw = Path(path) / "FashionMNIST/raw"
    x, y = [], []
    for part, count in (("train", TRAINED), ("t10k", TESTED)):  # they come in random order
        pixels = _read(raw / f"{part}-images-idx3-ubyte", 16, count * 28 * 28).view(-1, 1, 28, 28)
        x.append(F.avg_pool2d(pixels.float(), 2).round().to(torch.uint8))
        y.append(_read(raw / f"{part}-labels-idx1-ubyte", 8, count).long())
    test = torch.arange(TRAINED + TESTED) >= TRAINED
    return Examples(torch.cat(x), torch.cat(y), tuple(FashionMNIST.classes), test=test)


def cifar_small(path: str) -> Examples:
    """CIFAR-10 at 16 x 16 pixels: 6,000 pictures to train on, 4,000 to test."""
    found: Examples = _KEPT.cache(_halved)(path, TRAINED // 4, TESTED)
    return found


def _halved(path: str, trained: int, tested: int) -> Examples:
    """So many pictures of each part, drawn: they come class by class."""
    whole = cifar10_jpeg.load(path)
    order = torch.randperm(len(whole.y), generator=torch.Generator().manual_seed(1))
    test = whole.test[order]
    kept = torch.cat([order[~test][:trained], order[test][:tested]])
    x = F.avg_pool2d(whole.x[kept].float(), 2).round().to(torch.uint8)
    return whole._replace(x=x, y=whole.y[kept], test=whole.test[kept])


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
