"""Where examples come from: every source decodes a data set once, into tensors.

Pictures stay bytes (uint8) until a batch is made of them; tables keep NaN where a value is missing,
for the site to fill.
"""

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from datasets import cache
from datasets.errors import SourceError
from datasets.examples import Examples, check
from datasets.files import existing, reading_as
from datasets.folders import audio_folder, image_folder, log_mel
from datasets.language import text_bytes, tokens
from datasets.lazy import adopted
from datasets.names import call_imported, shown
from datasets.tables import csv, parquet, text_csv

__all__ = [
    "SOURCES",
    "Examples",
    "Source",
    "SourceError",
    "audio_folder",
    "check",
    "csv",
    "digits",
    "fingerprint",
    "image_folder",
]
__all__ += ["load", "log_mel", "text_csv", "torchvision_set"]


def digits() -> Examples:
    """scikit-learn's handwritten digits: 1,797 grey pictures of 8 x 8, without a download."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    return Examples(
        x, torch.from_numpy(bunch.target).long(), tuple(str(name) for name in bunch.target_names)
    )


def torchvision_set(name: str, path: str) -> Examples:
    """A data set of torchvision by the ``name`` of its class, with the official test part marked.

    Looked for under ``path`` (by default ``~/.cache/archipelago``); downloaded there if missing.

    Raises:
        SourceError: it cannot be downloaded, or what is there is damaged.
    """
    from torchvision import datasets as known
    from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor

    build = getattr(known, name)
    folder = _root(path)
    # Where MNIST and Fashion-MNIST are.
    for file in sorted((folder / name / "raw").glob("*-ubyte")):
        with reading_as(file, f"a part of {name}"):
            read_sn3_pascalvincent_tensor(str(file))
    try:
        try:
            parts = [build(folder, train=train, download=False) for train in (True, False)]
        except RuntimeError:
            parts = [build(folder, train=train, download=True) for train in (True, False)]
        pictures = [torch.as_tensor(part.data) for part in parts]
        x = torch.cat(
            [
                each.unsqueeze(1) if each.dim() == 3 else each.permute(0, 3, 1, 2)
                for each in pictures
            ]
        )
    except Exception as error:  # of the network, the disk and what is read from it
        raise SourceError(
            f"{name} is not under {shown(str(folder))} as it should be, and could not be "
            f"downloaded ({type(error).__name__}: {error}): copy it there in torchvision's layout, "
            "or name its folder with data.path"
        ) from error
    y = torch.cat([torch.as_tensor(part.targets) for part in parts]).long()
    test = torch.arange(len(y)) >= len(pictures[0])
    return Examples(x.contiguous(), y, tuple(parts[0].classes), test=test)


def _root(path: str) -> Path:
    return Path(path or "~/.cache/archipelago").expanduser()


class Source(NamedTuple):
    """A named source.

    Attributes:
        read: takes some of the run configuration's keys and returns the examples.
        pictures: whether these are pictures.
        official_test: whether they have an official test part, or may have one: files or folders
            named so.
        folder: of a data set of torchvision, below the root.
        cached: whether what was decoded stays on disk.
        targets: what y can be (:data:`datasets.examples.TARGETS`).
    """

    read: Callable[..., Examples]
    pictures: bool = False
    official_test: bool = False
    folder: str = ""
    cached: bool = True
    targets: tuple[str, ...] = ("class",)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that it takes."""
        return tuple(inspect.signature(self.read).parameters)

    @property
    def lazy(self) -> bool:
        """Whether it may leave examples where they are until a batch needs them."""
        return not self.cached or "memory_gb" in self.keys

    def files(self, path: str) -> Path | None:
        """The file or folder that it reads; None for data of a package.

        Raises:
            SourceError: there is none.
        """
        if "path" not in self.keys:
            return None
        return _root(path) / self.folder if self.folder else existing(path)


SOURCES = {
    "digits": Source(digits, pictures=True),
    "mnist": Source(
        partial(torchvision_set, "MNIST"), pictures=True, official_test=True, folder="MNIST/raw"
    ),
    "fashion-mnist": Source(
        partial(torchvision_set, "FashionMNIST"),
        pictures=True,
        official_test=True,
        folder="FashionMNIST/raw",
    ),
    "cifar10": Source(
        partial(torchvision_set, "CIFAR10"),
        pictures=True,
        official_test=True,
        folder="cifar-10-batches-py",
    ),
    "cifar100": Source(
        partial(torchvision_set, "CIFAR100"),
        pictures=True,
        official_test=True,
        folder="cifar-100-python",
    ),
    "image-folder": Source(image_folder, pictures=True, official_test=True),
    "audio-folder": Source(audio_folder, official_test=True),
    "csv": Source(csv, targets=("class", "labels", "numbers")),
    "parquet": Source(parquet, targets=("class", "labels", "numbers")),
    "text-csv": Source(text_csv),
    "text-bytes": Source(text_bytes, official_test=True, cached=False, targets=("tokens",)),
    "tokens": Source(tokens, official_test=True, cached=False, targets=("tokens",)),
}


def load(
    source: str,
    path: str,
    *,
    label: str,
    group: str,
    image_size: int,
    channels: int = 0,
    audio_seconds: float,
    text_buckets: int,
    context: int = 128,
    vocabulary: int = 256,
    memory_gb: float = 4.0,
    target: str = "class",
) -> Examples:
    """Read a data set by the name of its source, or by the import path of a function of ``path``.

    The arguments are the run configuration's of the same names, and the target of its task
    (:data:`datasets.examples.TARGETS`). What a named source decoded is kept on disk
    (:mod:`datasets.cache`); a function may read anything, so that nobody knows when it would return
    something else.

    Raises:
        SourceError: what is missing, and where it was looked for.
    """
    if ":" in source:
        own = call_imported("data.source", source, SourceError, path)
        if isinstance(own, Examples):
            own = own._replace(
                **adopted(
                    own.x, own.y, own.test, len(own.classes) if target in ("class", "map") else 0
                )
            )
        return check(own, source, target)
    if source not in SOURCES:
        raise SourceError(
            f"data.source = {shown(source)}: allowed: {', '.join(SOURCES)}, package.module:function"
        )
    keys = {
        "path": path,
        "label": label,
        "group": group,
        "image_size": image_size,
        "channels": channels,
        "audio_seconds": audio_seconds,
        "text_buckets": text_buckets,
        "context": context,
        "vocabulary": vocabulary,
        "target": target,
        "memory_gb": memory_gb,
    }
    found = SOURCES[source]
    keys = {key: keys[key] for key in found.keys}

    def decode() -> Examples:
        examples = found.read(**keys)
        try:
            return check(examples, source, target)
        except SourceError as error:
            raise SourceError(f"{path}: {error}" if path else str(error)) from None

    if not found.cached:
        return decode()
    options = {key: value for key, value in keys.items() if key != "path"}
    return cache.cached(source, found.files(path), options, decode)


def fingerprint(source: str, path: str) -> str:
    """The fingerprint of the files that :func:`load` would read (:mod:`datasets.cache`).

    A function of one's own is taken to read ``path``, where there is such a file or folder.

    Raises:
        SourceError: a named source's path is missing.
    """
    if source in SOURCES:
        return cache.fingerprint(SOURCES[source].files(path))
    try:
        return cache.fingerprint(existing(path))
    except SourceError:
        return ""
