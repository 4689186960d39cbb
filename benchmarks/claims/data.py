"""Data sets of the claims, small enough for many runs, from a folder of them all.

That folder is described in docs/results/defaults.md. In a claim, ``data.path`` is relative to it,
and may lie in a zip file.
"""

import gzip
import os
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import cifar10_jpeg
from configuration.config import ROOT
from datasets.sources import Examples, audio_folder

UNPACKED = ROOT / "runs/claims/data"
NAMES = [
    "T-shirt",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Boot",
]  # in this order
TESTED = 4000  # pictures of the official test part

FASHION = {
    "data.source": "benchmarks.claims.data:fashion",
    "data.path": ".",
    "data.test-part": "official",
    "model.name": "mlp",
}
FASHION_SMALL = FASHION | {"data.source": "benchmarks.claims.data:fashion_small"}
CIFAR = FASHION | {"data.source": "benchmarks.claims.data:cifar", "model.name": "cnn"}
SPEAKERS = {
    "data.source": "benchmarks.claims.data:speakers",
    "data.path": "fsdd.zip/train",
    "model.name": "cnn",
}


def located(data: str, path: str) -> str:
    """Where a claim's ``data.path`` is, once it is unpacked."""
    archive, _, inside = path.partition(".zip/")
    return str(UNPACKED / archive / inside if inside else Path(data) / path)


def unpack(data: str, path: str) -> None:
    """Unpack the zip file in which a claim's ``data.path`` lies, once."""
    archive, _, inside = path.partition(".zip/")
    if not inside or (folder := UNPACKED / archive).exists():
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
    return _with_test_part(x, y, NAMES)


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


def speakers(path: str) -> Examples:
    """Spoken digits by speaker and digit: 60 classes of some 45 clips."""
    clips = audio_folder(Path(path), "_([a-z]+)_", 1.0)
    assert clips.group is not None
    names = tuple(f"{speaker} {digit}" for speaker in clips.groups for digit in clips.classes)
    return Examples(clips.x, clips.group * len(clips.classes) + clips.y, names)


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
