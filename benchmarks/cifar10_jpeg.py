"""CIFAR-10 from one .npz of JPEG files, as an example of a source of one's own.

It is chosen by ``data = "benchmarks.cifar10_jpeg:load"``.
"""

import itertools

import numpy as np
import torch
from torchvision.io import decode_jpeg

from datasets.sources import Examples


def load(path: str) -> Examples:
    """Read arrays ``{train,test}_{data,offsets,labels}`` and ``classes``.

    Picture i is ``data[offsets[i]:offsets[i + 1]]``.
    """
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    pictures, labels = [], []
    for part in ("train", "test"):
        data, offsets = torch.from_numpy(arrays[f"{part}_data"]), arrays[f"{part}_offsets"]
        pictures.append(
            torch.stack([decode_jpeg(data[a:b]) for a, b in itertools.pairwise(offsets)])
        )
        labels.append(torch.from_numpy(arrays[f"{part}_labels"]).long())
    test = torch.arange(sum(map(len, labels))) >= len(labels[0])
    return Examples(
        torch.cat(pictures),
        torch.cat(labels),
        tuple(str(name) for name in arrays["classes"]),
        test=test,
    )
