"""Memory of the server does not grow with the number of sites."""

import ctypes
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


@pytest.fixture(scope="module", autouse=True)
def handed_back() -> None:
    """The C library returns freed vectors at once, and what is loaded only once is loaded."""
    # M_MMAP_THRESHOLD: unless it is set, it grows with what is freed.
    ctypes.CDLL(None).mallopt(-3, 1 << 20)
    peak(short("fedavg", 3, NETWORK), SIZES)


@pytest.mark.parametrize("wire", WIRES.values(), ids=["exact", "coded"])
@pytest.mark.parametrize("strategy", ["fedavg", "fedbuff"])
def test_as_many_models_with_many_sites_as_with_few(strategy: str, wire: dict[str, Any]) -> None:
    few, many = (peak(short(strategy, sites, NETWORK, wire=wire), SIZES) for sites in (3, 9))
    assert many < few + 1
    assert many < 9
