"""The networks: sizes from the literature, shapes, seeds, errors."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from models.networks import build, num_parameters
from tests.networks import language


def size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_sizes_are_those_of_the_literature() -> None:
    assert size(build("resnet20", (3, 32, 32), 10, 1, norm="batch")) == 272_474
    assert size(build("vgg11", (3, 32, 32), 10, 1, norm="batch")) == 579_786
    assert size(build("lenet5", (1, 28, 28), 10, 1, norm="batch")) == 61_706


@pytest.mark.parametrize(
    "name",
    [
        "resnet20",
        "lenet5",
        "torchvision:resnet18",
        "torchvision:regnet_y_400mf",
        "tests.unit.test_networks:linear",
    ],
)
def test_parameters_are_counted_without_memory_and_random_numbers(name: str) -> None:
    before = torch.random.get_rng_state()
    expected = (
        0
        if name.startswith("tests.") or "regnet" in name
        else size(build(name, (1, 28, 28), 10, 1, norm="group"))
    )
    assert num_parameters(name, (1, 28, 28), 10, norm="group") == expected
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("norm", ["batch", "group", "evonorm"])
def test_norm_of_resnet20_decides_what_there_is_to_average(norm: str) -> None:
    network = build("resnet20", (3, 32, 32), 10, 1, norm=norm)
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
    network = build(name, shape, 7, 1, norm="batch")
    assert network.training
    assert network(torch.randn(4, *shape)).shape == (4, 7)


def test_torchvisions_transformers_take_the_pictures_size_and_segmentation_every_pixel() -> None:
    with pytest.raises(
        ValueError, match=r"needs square pictures, the examples are of shape \(3, 32, 48\)"
    ):
        build("torchvision:vit_b_16", (3, 32, 48), 10, 1)
    network = build("torchvision:lraspp_mobilenet_v3_large", (3, 32, 32), 5, 1, output=(5, 32, 32))
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 5, 32, 32)
    assert "backbone.0.0.weight" in network.state_dict()  # torchvision's names


@pytest.mark.slow
def test_large_networks_of_torchvision() -> None:
    assert build("torchvision:vit_b_16", (1, 32, 32), 5, 1)(torch.randn(2, 1, 32, 32)).shape == (
        2,
        5,
    )
    build("torchvision:fcn_resnet50", (3, 32, 32), 5, 1, output=(5, 32, 32))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 21, 13), (1, 3, 1)])
def test_unet_says_something_of_each_pixel(shape: tuple[int, ...]) -> None:
    network = build("unet", shape, 5, 1, output=(5, *shape[1:]))
    assert 400_000 < size(network) < 600_000
    x = torch.randn(2, *shape)
    network(x)[:, 0, 0, 0].sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_gpt_has_the_parameters_of_gpt_2() -> None:
    large = build(
        "gpt", (64,), 1000, 1, output=(64, 1000), tokens=True, layers=2, width=96, heads=4
    )
    assert size(large) == (1000 + 64) * 96 + 2 * (12 * 96**2 + 13 * 96) + 2 * 96
    deviation = {
        name: float(value.detach().std())
        for name, value in large.named_parameters()
        if value.dim() == 2
    }
    for name, value in deviation.items():
        assert value == pytest.approx(0.01 if name.endswith("_out.weight") else 0.02, rel=0.05), (
            name
        )
    first = nn.functional.cross_entropy(large(torch.arange(64)[None])[0], torch.arange(1, 65))
    assert first.item() == pytest.approx(math.log(1000), abs=0.1)


def test_no_token_of_gpt_knows_those_after_it() -> None:
    network, x = (
        language().eval(),
        torch.randint(31, (2, 16), generator=torch.Generator().manual_seed(1)),
    )
    other = x.clone()
    other[:, 9] = (other[:, 9] + 1) % 31
    before, after = network(x), network(other)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.isclose(before[:, 9:], after[:, 9:]).all(2).any()
    torch.testing.assert_close(network(x[:, :5]), before[:, :5])  # shorter texts are taken, too


def test_attention_of_gpt_against_its_formula() -> None:
    layer: Any = language(5, layers=1, width=8, heads=2).get_submodule("layers.0")
    h = torch.randn(1, 5, 8)
    with torch.no_grad():
        q, k, v = layer.queries_keys_values(layer.attention_norm(h))[0].split(8, 1)
        rows = []
        for head in (slice(0, 4), slice(4, 8)):
            scores = (q[:, head] @ k[:, head].T / 2).masked_fill(
                torch.ones(5, 5).triu(1).bool(), -math.inf
            )
            rows.append(scores.softmax(1) @ v[:, head])
        y = h[0] + layer.attention_out(torch.cat(rows, 1))
        expected = y + layer.mlp_out(nn.functional.gelu(layer.mlp_in(layer.mlp_norm(y))))
        torch.testing.assert_close(layer(h)[0], expected)


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
    one, two, other = (build("cnn", (1, 8, 8), 10, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.randn(3), expected)
    flat = [
        torch.cat([parameter.reshape(-1) for parameter in network.parameters()])
        for network in (one, two, other)
    ]
    assert torch.equal(flat[0], flat[1])
    assert not torch.equal(flat[0], flat[2])


@pytest.mark.parametrize(
    ("name", "shape", "tokens", "message"),
    [
        (
            "gpt",
            (3, 8, 8),
            False,
            (
                r"'gpt' needs tokens, the examples are of shape \(3, 8, 8\); allowed: "
                r"'mlp' or your own"
            ),
        ),
        (
            "cnn",
            (8,),
            True,
            (
                r"'cnn' needs pictures, the examples are tokens, of shape \(8,\); allowed: "
                r"'gpt' or your own"
            ),
        ),
        ("gpt", (8,), True, "model.heads = 3: must divide model.width, which is 8"),
        (
            "mlp",
            (8,),
            True,
            (
                r"'mlp' needs pictures or numbers, the examples are tokens, of shape \(8,\); "
                r"allowed: 'gpt'"
            ),
        ),
    ],
)
def test_tokens_are_for_networks_that_take_them(
    name: str, shape: tuple[int, ...], tokens: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, shape, 10, 1, output=(8, 10), tokens=tokens, layers=1, width=8, heads=3)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("cnn", (13,), "needs pictures"),
        ("lenet5", (1, 8, 8), "at least 12 x 12 pixels, these have 8 x 8"),
        ("vgg11", (3, 28, 28), "at least 32 x 32"),
        (
            "unet",
            (1, 8, 8),
            r"it returned \(2, 10, 8, 8\); it is for training.task = 'segmentation'",
        ),
        (
            "torchvision:vit_b_16",
            (3, 20, 20),
            r"cannot take examples of shape \(3, 20, 20\): Input shape indivisible by patch size",
        ),
        ("torchvision:densenet121", (1, 8, 8), r"cannot take examples of shape \(1, 8, 8\)"),
        (
            "tests.unit.test_networks:wrong_output",
            (4,),
            r"must return \[batch, 10\] for 10 classes, it returned \(2, 11\)",
        ),
        (
            "tests.unit.test_networks:no_network",
            (4,),
            "must return a torch.nn.Module, it returned str",
        ),
    ],
)
def test_network_that_does_not_fit_says_so(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, shape, 10, 1, norm="batch")
