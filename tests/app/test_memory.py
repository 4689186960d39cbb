"""Memory of the server does not grow with the number of sites."""

import ctypes
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.server_memory import SHAPE, WIRES, peak, short

NETWORK = f"{__name__}:network"


def network(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Two million parameters, 8 MB."""
    inputs, width = torch.Size(shape).numel(), 2_000_000 // 7
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, num_classes)
    )


SIZES = tuple(parameter.numel() for parameter in network(SHAPE, 2).parameters())


def most(strategy: str, sites: int, wire: dict[str, Any]) -> float:
    """What :func:`benchmarks.server_memory.peak` says, of a run that is made in this process."""
    return peak(short(strategy, sites, NETWORK, wire=wire), SIZES)


def begin() -> None:
    """Have the C library hand vectors back as soon as they are freed, and load what is loaded once.

    Without its threshold, it keeps ever larger ones for the next.
    """
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
    most("fedavg", 3, {})


@pytest.fixture(scope="module")
def alone() -> Iterator[ProcessPoolExecutor]:
    """A process that did nothing before."""
    with ProcessPoolExecutor(1, get_context("spawn"), begin) as pool:
        yield pool


@pytest.mark.parametrize("wire", WIRES.values(), ids=["exact", "coded"])
@pytest.mark.parametrize("strategy", ["fedavg", "fedbuff"])
def test_as_many_models_with_many_sites_as_with_few(
    strategy: str, wire: dict[str, Any], alone: ProcessPoolExecutor
) -> None:
    few, many = (alone.submit(most, strategy, sites, wire).result() for sites in (3, 9))
    assert many < few + 1
    assert many < 9
