"""Data larger than memory: the time that pictures take, and the memory that tokens take.

Our loop over streamed pictures is compared with a plain ``DataLoader`` loop.

    python -m benchmarks.data

The plain loop is what a careful engineer writes: Pillow, torchvision's ``resize``, a ``DataLoader``
whose workers stay, torch's SGD on the small CNN. Both read the same JPEGs with the same number of
workers, in turns. The token files are sparse: they have a size, and pages of zeros.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor, resize

from benchmarks.timing import in_turns
from client_app import training
from client_app.site import SiteId, site_data
from configuration.config import configuration
from datasets.examples import TOKEN
from datasets.folders import image_folder
from datasets.language import tokens
from datasets.lazy import read
from datasets.site import Part
from models.flat import FlatModel
from models.networks import build

SIZE, BATCH, CLASSES = 64, 32, 10


class Plain(Dataset[tuple[Tensor, int]]):
    """A plain PyTorch data set, which decodes the pictures one by one."""

    def __init__(self, files: list[Path], labels: list[int]) -> None:
        self.files, self.labels = files, labels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        with Image.open(self.files[i]) as picture:
            pixels = pil_to_tensor(picture.convert("RGB"))
        return resize(pixels, [SIZE, SIZE], antialias=True), self.labels[i]


def write_pictures(folder: Path, count: int) -> None:
    """Write JPEGs of 128 x 128 pixels."""
    generator = np.random.default_rng(1)
    for number in range(count):
        file = folder / str(number % CLASSES) / f"{number}.jpg"
        file.parent.mkdir(exist_ok=True)
        small = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(small).resize((128, 128), Image.Resampling.BICUBIC).save(file)


def plain_loop(folder: Path, workers: int) -> Callable[[], None]:
    """A function that runs an epoch of a plain PyTorch loop."""
    files = sorted(folder.rglob("*.jpg"))
    data = Plain(files, [int(file.parent.name) for file in files])
    loader = DataLoader(
        data, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    network = build("cnn", (3, SIZE, SIZE), CLASSES, 1)
    sgd = torch.optim.SGD(network.parameters(), 0.05, 0.9)

    def run() -> None:
        for x, y in loader:
            sgd.zero_grad()
            F.cross_entropy(network(x.float() / 63.75 - 2), y).backward()
            sgd.step()

    return run


def our_loop(folder: Path, workers: int) -> Callable[[], None]:
    """A function that runs an epoch of the ClientApp's loop."""
    examples = image_folder(folder, "", SIZE, 3, memory_gb=0)
    part = Part(replace(examples.x, workers=workers), examples.y)
    model = FlatModel(build("cnn", (3, SIZE, SIZE), CLASSES, 1), torch.device("cpu"))
    gradient = training.plain(
        model, lambda batch: F.cross_entropy(model.network(batch[0]), batch[1])
    )
    sgd = training.optimizers("sgd", model, 0.05, 0.9, False, 0.0)
    generator = torch.Generator().manual_seed(1)

    def run() -> None:
        training.train(
            model,
            gradient,
            sgd,
            training.batches(part, BATCH, generator, None),
            lambda _: 0.05,
            0.0,
        )

    return run


def compare(count: int, repeats: int, workers: int) -> None:
    """Print seconds an epoch and their ratio."""
    with TemporaryDirectory() as name:
        write_pictures(Path(name), count)
        runs = {"plain": plain_loop(Path(name), workers), "ours": our_loop(Path(name), workers)}
        times = in_turns(runs, repeats)
    plain, ours = (statistics.median(times[label]) for label in ("plain", "ours"))
    ratio = statistics.median(a / b for a, b in zip(times["ours"], times["plain"], strict=True))
    print(
        f"| {count} JPEGs, {workers} workers | {plain:.2f} s an epoch "
        f"| {ours:.2f} s | {ratio:.3f} |",
        flush=True,
    )


def memory(file: str, how: str) -> None:
    """Print this process's peak memory, in MB, after 200 batches of windows of a token file."""
    if how == "site":  # all that a run does: split into parts, put into a random order
        keys = {
            "training.task": "language",
            "data.source": "tokens",
            "data.path": file,
            "data.context": 1024,
            "num-sites": 2,
        }
        data = site_data(configuration(None, **keys), SiteId(0, None, file), TOKEN, None)
        for _, _ in zip(
            range(200),
            training.batches(data.train, BATCH, torch.Generator().manual_seed(1), None),
            strict=False,
        ):
            pass
    elif how == "reading":
        examples = tokens(file, "", 1024, 256)
        generator = torch.Generator().manual_seed(1)
        for _ in range(200):
            read(
                examples.x,
                examples.y,
                torch.randint(0, len(examples.y), (BATCH,), generator=generator),
            )
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def main() -> None:
    """Print tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=640)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--memory", nargs=2, metavar=("FILE", "HOW"), help="used by this program itself"
    )
    arguments = parser.parse_args()
    if arguments.memory:
        memory(*arguments.memory)
        return
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    print("| | plain loop | ours | ratio |\n|---|---|---|---|")
    for workers in (0, 2):
        compare(arguments.pictures, arguments.repeats, workers)
    print(
        "\n| token file | peak MB: imports | reading 6,400 windows "
        "| a site that trains on as many |\n|---|---|---|---|"
    )
    with TemporaryDirectory() as name:
        for size in (1, 10, 100):
            file = Path(name, "tokens.bin")
            file.touch()
            os.truncate(file, size * 10**9)
            command = [sys.executable, "-m", "benchmarks.data", "--memory", str(file)]
            found = [
                subprocess.run(
                    [*command, how], capture_output=True, text=True, check=True
                ).stdout.strip()
                for how in ("nothing", "reading", "site")
            ]
            print(f"| {size} GB | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    main()
