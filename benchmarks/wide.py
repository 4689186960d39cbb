"""Networks of given sizes, to measure what size costs."""

import math

import torch
from torch import nn


def _wide(parameters: int, shape: tuple[int, ...], num_classes: int) -> nn.Module:
    inputs = torch.Size(shape).numel()
    width = round(
        (math.sqrt((inputs + num_classes) ** 2 + 4 * parameters) - inputs - num_classes) / 2
    )
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, num_classes),
    )


def ten_thousand(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A network of ten thousand parameters."""
    return _wide(10**4, shape, num_classes)


def million(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A network of one million parameters."""
    return _wide(10**6, shape, num_classes)


def ten_million(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A network of ten million parameters."""
    return _wide(10**7, shape, num_classes)


def hundred_million(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A network of a hundred million parameters."""
    return _wide(10**8, shape, num_classes)


def deep(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A network of fifty million parameters in 24 equal layers."""
    width, layers = 1448, list[nn.Module]()
    for _ in range(24):
        layers += [nn.Linear(width, width), nn.ReLU()]
    inputs = torch.Size(shape).numel()
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), *layers, nn.Linear(width, num_classes)
    )
