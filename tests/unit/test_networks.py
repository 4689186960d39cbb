"""The networks: sizes from the literature, shapes, seeds, errors."""

import pytest
import torch
from torch import nn

from models.networks import build


def size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_sizes_are_those_of_the_literature() -> None:
    assert size(build("resnet20", (3, 32, 32), 10, "batch", 1)) == 272_474
    assert size(build("vgg11", (3, 32, 32), 10, "batch", 1)) == 579_786
    assert size(build("lenet5", (1, 28, 28), 10, "batch", 1)) == 61_706


@pytest.mark.parametrize("norm", ["batch", "group", "evonorm"])
def test_norm_of_resnet20_decides_what_there_is_to_average(norm: str) -> None:
    network = build("resnet20", (3, 32, 32), 10, norm, 1)
    kinds = {type(module).__name__ for module in network.modules()}
    assert (any(buffer.is_floating_point() for buffer in network.buffers())) == (norm == "batch")
    assert ("ReLU" in kinds) == (norm != "evonorm")


def test_evonorm_against_its_formula() -> None:
    from models.networks import EvoNormS0

    norm = EvoNormS0(16)
    x = torch.randn(2, 16, 4, 4)
    with torch.no_grad():
        norm.v.fill_(2.0)
        norm.gamma.fill_(3.0)
        norm.beta.fill_(0.5)
        y = norm(x)
    first = x[0, 0:2]  # 8 groups of two channels
    expected = 3 * first * torch.sigmoid(2 * first) / (first.var(correction=0) + 1e-5).sqrt() + 0.5
    torch.testing.assert_close(y[0, 0:2], expected)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("cnn", (1, 8, 8)),
        ("cnn", (3, 32, 32)),
        ("cnn", (1, 40, 63)),
        ("mlp", (13,)),
        ("mlp", (1, 8, 8)),
        ("lenet5", (3, 32, 32)),
        ("resnet20", (1, 28, 28)),
        ("vgg11", (3, 32, 32)),
        ("torchvision:resnet18", (1, 8, 8)),
        ("torchvision:mobilenet_v2", (3, 32, 32)),
        ("tests.unit.test_networks:linear", (2, 3, 3)),
    ],
)
def test_network_takes_its_examples(name: str, shape: tuple[int, ...]) -> None:
    network = build(name, shape, 7, "batch", 1)
    assert network.training
    assert network(torch.randn(4, *shape)).shape == (4, 7)


def linear(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), num_classes))


def wrong_output(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return linear(shape, num_classes + 1)


def no_network(shape: tuple[int, ...], num_classes: int) -> str:
    return "network"


def test_same_seed_same_network_and_nobody_elses_numbers_change() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    one, two, other = (build("cnn", (1, 8, 8), 10, "batch", seed) for seed in (1, 1, 2))
    assert torch.equal(torch.randn(3), expected)
    flat = [torch.cat([parameter.reshape(-1) for parameter in network.parameters()]) for network in (one, two, other)]
    assert torch.equal(flat[0], flat[1])
    assert not torch.equal(flat[0], flat[2])


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("cnn", (13,), "needs pictures"),
        ("lenet5", (1, 8, 8), "at least 12 x 12 pixels, these have 8 x 8"),
        ("vgg11", (3, 28, 28), "at least 32 x 32"),
        ("torchvision:densenet121", (1, 8, 8), r"cannot take examples of shape \(1, 8, 8\)"),
        ("tests.unit.test_networks:wrong_output", (4,), r"must return \[batch, 10\] for 10 classes, it returned \(2, 11\)"),
        ("tests.unit.test_networks:no_network", (4,), "must return a torch.nn.Module, it returned str"),
    ],
)
def test_network_that_does_not_fit_says_so(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, shape, 10, "batch", 1)
