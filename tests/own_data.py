"""Torch data sets as somebody's own.

A module of its own, so that processes that read them import little.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from datasets import lazy
from datasets.examples import Examples
from datasets.lazy import Items

CLASSES = ("dark", "light")


class Numbers(Dataset[Any]):
    """Example i has the features (i mod 2, random, i / length).

    Its class comes with it if asked for; examples from 60 on are lost.
    """

    def __init__(self, length: int, labelled: bool) -> None:
        self.length, self.labelled = length, labelled

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Any:
        if i >= 60:
            raise KeyError("lost")
        x = torch.tensor([i % 2, float(torch.rand(())), i / self.length])
        return (x, i % 2) if self.labelled else x


class Stuck(Numbers):
    """Example 9 never comes."""

    def __getitem__(self, i: int) -> Any:
        while i == 9:
            time.sleep(0.1)
        return super().__getitem__(i)


class Flow(IterableDataset[Any]):
    """Like :class:`Numbers`, one after the other."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for i in range(self.length):
            yield torch.tensor([i % 2, 0.5, i / self.length]), i % 2


class Endless(Flow):
    """Nobody knows its length."""

    __len__ = None  # type: ignore[assignment]


def labelled(path: str) -> Examples:
    """Labels come with the items."""
    return Examples(Numbers(60, labelled=True), None, CLASSES)


def with_labels(path: str) -> Examples:
    """Labels are in memory."""
    return Examples(Numbers(60, labelled=False), torch.arange(60) % 2, CLASSES)


def beyond(path: str) -> Examples:
    """There are classes that have no name."""
    return Examples(Numbers(60, labelled=True), None, CLASSES[:1])


def lost(path: str) -> Examples:
    """The last 20 cannot be read."""
    return Examples(Numbers(80, labelled=False), torch.arange(80) % 2, CLASSES)


def flow(path: str) -> Examples:
    """An IterableDataset."""
    return Examples(Flow(48), None, CLASSES, test=Numbers(12, labelled=True))


def untested(path: str) -> Examples:
    """One without a test part."""
    return Examples(Flow(48), None, CLASSES)


def endless(path: str) -> Examples:
    """One without a length."""
    return Examples(Endless(48), None, CLASSES, test=Numbers(12, labelled=True))


def read_ahead(pipe: Connection) -> None:
    """Begin to read, say by whom, and wait."""
    x = replace(lazy.whole(Items(Numbers(60, labelled=False), labelled=False), (3,)), workers=2)
    batches = lazy.stream(x, torch.zeros(60), torch.arange(60).split(4))
    next(batches)
    pipe.send([process.pid for process in multiprocessing.active_children()])
    pipe.recv()


def deadly(path: str) -> Examples:
    """As many bytes as a file has, so often it kills the process that reads it; then few examples.

    Without one: always.
    """
    file = Path(path)
    if not file.exists() or file.stat().st_size:
        if file.exists():
            file.write_bytes(file.read_bytes()[1:])
        os.kill(os.getpid(), signal.SIGKILL)
    return few(path)


def few(path: str) -> Examples:
    """96 small pictures of ten classes, each brightest in a place of its own."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(96) % 10
    x = torch.randint(0, 128, (96, 1, 8, 8), dtype=torch.uint8, generator=generator)
    x.view(96, 64)[torch.arange(96), y] = 255
    return Examples(x, y, tuple("0123456789"))
