"""Activation checkpointing, and precision by operator.

The same gradients, statistics and random numbers, less in memory.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from client_app import training
from configuration.errors import ConfigError
from models.checkpointing import blocks, checkpoint_blocks
from models.flat import FlatModel
from models.networks import build
from simulation.laboratory import simulate
from tests.networks import language

PICTURES: dict[str, dict[str, Any]] = {
    "resnet20": {"norm": "batch"},
    "torchvision:resnet18": {},
    "torchvision:mobilenet_v2": {},
}


def dropping(shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Two blocks, each with dropout and a BatchNorm without a momentum.

    The mean of such a BatchNorm counts the batches.
    """
    layers = [
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=None), nn.Dropout(0.3), nn.Tanh())
        for _ in range(2)
    ]
    return nn.Sequential(
        nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 8), *layers, nn.Linear(8, num_outputs)
    )


def network_and_batch(name: str) -> tuple[nn.Module, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name == "gpt":
        return language(), torch.randint(31, (4, 16), generator=generator)
    if name == "unet":
        return build(name, (3, 12, 9), 5, 1, output=(5, 12, 9)), torch.randn(
            2, 3, 12, 9, generator=generator
        )
    shape = (3, 32, 32) if name in PICTURES else (8,)
    return build(name, shape, 10, 1, **PICTURES.get(name, {})), torch.randn(
        4, *shape, generator=generator
    )


@pytest.mark.parametrize(
    "name", ["gpt", "unet", *PICTURES, "tests.unit.test_checkpointing:dropping"]
)
def test_gradients_statistics_and_random_numbers_are_the_same(name: str) -> None:
    found = []
    for checkpointed in (False, True):
        network, x = network_and_batch(name)
        if checkpointed:
            checkpoint_blocks(network)
        model = FlatModel(network)
        torch.manual_seed(3)
        each: list[Tensor] = []
        for _ in range(2):  # the second pass begins with the statistics of the first
            loss = network(x).square().mean()
            model.backward(loss)
            each += [
                loss.detach(),
                model.grad.clone(),
                *(buffer.clone() for buffer in model.all_buffers()),
            ]
        found.append([*each, torch.rand(1)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_blocks_are_what_stands_in_a_list() -> None:
    each = {
        name: [type(block).__name__ for block in blocks(network_and_batch(name)[0])]
        for name in ("gpt", *PICTURES, "unet")
    }
    assert each["gpt"] == ["_Layer"] * 3
    assert each["resnet20"] == ["_Block"] * 9
    assert each["torchvision:resnet18"] == ["BasicBlock"] * 8
    assert each["unet"] == ["Sequential"] * 5


def test_graph_of_a_checkpointed_network_holds_a_fraction() -> None:
    def held(network: nn.Module, x: Tensor) -> int:
        sizes: dict[int, int] = {}

        def pack(value: Tensor) -> Tensor:
            sizes[value.data_ptr()] = value.numel()
            return value

        parameters = {parameter.data_ptr() for parameter in network.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            network(x)
        return sum(size for where, size in sizes.items() if where not in parameters)

    network, x = language(layers=6), torch.randint(31, (4, 16))
    plain = held(network, x)
    checkpoint_blocks(network)
    assert held(network, x) < plain / 5


def test_run_with_checkpointing_is_the_run_without() -> None:
    common: dict[str, Any] = {
        "num_sites": 2,
        "epochs": 2,
        "strategy": "fedavg",
        "training.sam-radius": 0.05,
        "progress": False,
    }
    plain, checkpointed = (
        simulate(
            **common,
            model={"name": "tests.unit.test_checkpointing:dropping"},
            computing={"checkpointing": on},
        )
        for on in (False, True)
    )
    for name, value in plain.model.items():
        assert torch.equal(value, checkpointed.model[name]), name


def test_where_it_cannot_be_it_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"computing.checkpointing = True: this network has no blocks"
    ):
        simulate(
            num_sites=2,
            epochs=2,
            model={"name": "mlp"},
            computing={"checkpointing": True},
            progress=False,
        )
    with pytest.raises(ValueError, match=r"not with computing.compile and BatchNorm"):
        checkpoint_blocks(build("resnet20", (3, 8, 8), 10, 1, norm="batch"), compiled=True)
    checkpoint_blocks(build("resnet20", (3, 8, 8), 10, 1, norm="group"), compiled=True)
    with pytest.raises(ConfigError, match=r"not with engine = 'batched'"):
        simulate(strategy="dmsgd", computing={"checkpointing": True}, engine="batched")


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_bfloat16_is_of_operators_and_weights_of_gpt_stay_float32(
    name: str, checkpointed: bool
) -> None:
    network, x = network_and_batch("gpt")
    kinds: dict[str, torch.dtype] = {}
    for part in ("layers.0.mlp_in", "layers.1", "layers.1.attention_norm"):
        network.get_submodule(part).register_forward_hook(
            lambda _m, _x, y, part=part: kinds.__setitem__(part, y.dtype)
        )
    if checkpointed:
        checkpoint_blocks(network)
    model = FlatModel(network)

    def loss(batch: training.Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(batch[0])
        assert logits.dtype == torch.bfloat16
        return F.cross_entropy(logits.float().flatten(0, 1), batch[1].flatten())

    before = model.x.clone()
    optimizers = training.optimizers(name, model, 0.01, 0.9, False, 0.0)
    first, _ = training.train(
        model, training.plain(model, loss), optimizers, [(x, x.roll(-1, 1))], lambda _: 0.01, 1.0
    )
    last, _ = training.train(
        model,
        training.plain(model, loss),
        optimizers,
        [(x, x.roll(-1, 1))] * 20,
        lambda _: 0.01,
        1.0,
    )
    assert last < first
    assert kinds == {
        "layers.0.mlp_in": torch.bfloat16,
        "layers.1": torch.float32,
        "layers.1.attention_norm": torch.float32,
    }
    assert {each.dtype for each in (model.x, model.grad, *network.parameters())} == {torch.float32}
    moved = (model.x - before)[model.x != before]
    assert len(moved) > 0.9 * len(before)
    assert (moved != moved.bfloat16().float()).any()  # steps that bfloat16 could not hold
