"""Data sets of the claims, small enough for many runs; ``data.path`` is the folder of them all.

That folder is described in docs/results/defaults.md.
"""

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import cifar10_jpeg
from datasets.sources import Examples

FASHION = (
    "T-shirt Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Boot"  # in this order
).split()
TESTED = 4000  # pictures of the official test part; they come in random order


def fashion(path: str) -> Examples:
    """Fashion-MNIST at 14 x 14 pixels: 60,000 pictures to train on, 4,000 to test."""
    raw = Path(path) / "FashionMNIST/raw"
    x, y = [], []
    for part, count in (("train", 60_000), ("t10k", TESTED)):
        pictures = _read(raw / f"{part}-images-idx3-ubyte.gz", 16).view(-1, 1, 28, 28)[:count]
        x.append(_halved(pictures))
        y.append(_read(raw / f"{part}-labels-idx1-ubyte.gz", 8)[:count].long())
    return _with_test_part(x, y, tuple(FASHION))


def cifar(path: str) -> Examples:
    """CIFAR-10 at 16 x 16 pixels: 50,000 pictures to train on, 4,000 to test."""
    whole = cifar10_jpeg.load(str(Path(path) / "cifar10.npz"))
    assert isinstance(whole.x, Tensor) and isinstance(whole.y, Tensor)
    chosen = torch.randperm(int(whole.test.sum()), generator=torch.Generator().manual_seed(1))
    tested = whole.test.nonzero().squeeze(1)[chosen[:TESTED]]  # they come class by class
    trained = (~whole.test).nonzero().squeeze(1)
    parts = (trained, tested)
    return _with_test_part(
        [_halved(whole.x[part]) for part in parts], [whole.y[part] for part in parts], whole.classes
    )


def _read(file: Path, header: int) -> Tensor:
    with gzip.open(file) as whole:
        return torch.from_numpy(np.frombuffer(whole.read(), np.uint8, offset=header).copy())


def _halved(pictures: Tensor) -> Tensor:
    """Means of 2 x 2 pixels, in parts: as floats a data set takes four times the memory."""
    parts = [F.avg_pool2d(part.float(), 2).round().to(torch.uint8) for part in pictures.split(5000)]
    return torch.cat(parts)


def _with_test_part(x: list[Tensor], y: list[Tensor], classes: tuple[str, ...]) -> Examples:
    test = torch.arange(sum(map(len, y))) >= len(y[0])
    return Examples(torch.cat(x), torch.cat(y), classes, test=test)
