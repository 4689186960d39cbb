"""A network as one vector."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.flat import FlatModel


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)
        )


def test_parameters_and_gradients_are_views() -> None:
    model = FlatModel(network())
    parameters = list(model.network.parameters())
    assert model.x.numel() == sum(parameter.numel() for parameter in parameters)
    model.x.copy_(torch.arange(model.x.numel()))
    assert torch.equal(
        torch.cat([parameter.detach().reshape(-1) for parameter in parameters]), model.x
    )
    model.backward(
        F.cross_entropy(model.network(torch.randn(5, 1, 8, 8)), torch.tensor([0, 1, 2, 0, 1]))
    )
    assert torch.equal(
        torch.cat(
            [parameter.grad.reshape(-1) for parameter in parameters if parameter.grad is not None]
        ),
        model.grad,
    )
    assert model.grad.abs().sum() > 0


def test_binding_does_not_change_what_the_network_computes() -> None:
    batch = torch.randn(5, 1, 8, 8)
    assert torch.equal(FlatModel(network()).network.eval()(batch), network().eval()(batch))


def test_statistics_are_the_floating_buffers() -> None:
    model = FlatModel(network())
    assert model.num_stats == 8
    assert model.stats.tolist() == [0.0] * 4 + [1.0] * 4  # running mean, running variance
    model.load(model.x, torch.arange(8.0))
    norm = model.network[1]  # type: ignore[index]
    assert norm.running_mean.tolist() == [0, 1, 2, 3]
    assert norm.running_var.tolist() == [4, 5, 6, 7]


def test_loading_forgets_the_count_of_batches() -> None:
    model = FlatModel(network())
    model.network(torch.randn(5, 1, 8, 8))
    assert model.network[1].num_batches_tracked == 1  # type: ignore[index]
    model.load(model.x.clone(), model.stats)
    assert model.network[1].num_batches_tracked == 0  # type: ignore[index]


def test_frozen_parameters_are_not_part_of_the_model() -> None:
    frozen = network()
    frozen[0].weight.requires_grad = False  # type: ignore[index]
    assert FlatModel(frozen).x.numel() == FlatModel(network()).x.numel() - 36


def test_network_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameters"):
        FlatModel(nn.ReLU())


def test_vectors_of_another_size_are_refused() -> None:
    model = FlatModel(network())
    with pytest.raises(ValueError, match=r"expected x .* got \(3,\)"):
        model.load(torch.zeros(3), model.stats)
    with pytest.raises(ValueError, match=r"and \(9,\)"):
        model.load(model.x, torch.zeros(9))


def test_state_dict_is_that_of_the_network_and_leaves_it_alone() -> None:
    model = FlatModel(network())
    x, stats = torch.randn_like(model.x), torch.rand(8)
    before, before_stats = model.x.clone(), model.stats
    state = model.state_dict(x, stats)
    assert torch.equal(model.x, before)
    assert torch.equal(model.stats, before_stats)
    other = network()
    other.load_state_dict(state)
    assert torch.equal(FlatModel(other).x, x)
    assert torch.equal(FlatModel(other).stats, stats)
