"""Optimizers and warm-up: a run of one site is a plain loop of torch's own.

Everything that changes gradients goes with each.
"""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from client_app import training
from client_app.site import SiteId, site_data
from configuration.config import configuration
from configuration.errors import ConfigError
from configuration.network import network_of
from models.flat import FlatModel
from models.networks import build, hidden_matrices
from simulation.laboratory import simulate
from strategies.randomness import derive
from tests.networks import language

ONE: dict[str, Any] = {
    "num_sites": 1,
    "min_sites": 1,
    "epochs": 4,
    "strategy": "fedavg",
    "progress": False,
}


def plain_optimizers(name: str, network: nn.Module) -> list[torch.optim.Optimizer]:
    """As a researcher writes it for the networks below.

    A matrix of each hidden layer, then the head.
    """
    if name == "adamw":
        return [
            torch.optim.AdamW(
                network.parameters(), 0.01, (0.8, 0.999), weight_decay=0.01, fused=True
            )
        ]
    weights = [parameter for parameter in network.parameters() if parameter.dim() > 1]
    hidden = weights[:-1]
    rest = [
        parameter
        for parameter in network.parameters()
        if all(parameter is not each for each in hidden)
    ]
    return [
        torch.optim.Muon(hidden, 0.01, 0.01, 0.8, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, 0.01, (0.8, 0.999), weight_decay=0.01, fused=True),
    ]


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("shape", ["exponential", "cosine"])
def test_a_run_of_one_site_is_a_plain_loop(name: str, shape: str) -> None:
    keys = {
        "optimizer": name,
        "lr": 0.01,
        "lr_warmup": 0.25,
        "lr_shape": shape,
        "momentum": 0.8,
        "weight_decay": 0.01,
        "clip_norm": 0.5,
        "batch_size": 64,
    }
    run = simulate(**ONE, fedavg={"local_epochs": 2}, model={"name": "mlp"}, training=keys)
    data = site_data(run.config, SiteId(0, 1, ""), tuple("0123456789"), None)
    network = build("mlp", (1, 8, 8), 10, derive(run.config.seed, "model"))
    an_epoch, number = math.ceil(len(data.train.y) / 64), 0
    total = 4 * an_epoch
    for round_number in (1, 2):
        optimizers = plain_optimizers(name, network)
        order = torch.Generator().manual_seed(derive(run.config.seed, "order", 0, round_number))
        for _ in range(2):
            for x, y in training.batches(data.train, 64, order, None):
                u = (number / total - 0.25) / 0.75  # of what comes after the warm-up
                fall = (
                    0.25**u
                    if shape == "exponential"
                    else 0.25 + 0.75 * (1 + math.cos(math.pi * u)) / 2
                )
                for optimizer in optimizers:
                    optimizer.param_groups[0]["lr"] = 0.01 * (
                        (number + 1) / (0.25 * total) if u < 0 else fall
                    )
                    optimizer.zero_grad()
                F.cross_entropy(network(x), y).backward()
                # One norm over all: Muon computes in bfloat16, where another rounding of the norm
                # would show.
                norm = torch.cat(
                    [each.grad.flatten() for each in network.parameters() if each.grad is not None]
                ).norm()
                nn.utils.clip_grads_with_norm_(network.parameters(), 0.5, norm)
                for optimizer in optimizers:
                    optimizer.step()
                number += 1
    for key, value in network.state_dict().items():
        torch.testing.assert_close(run.model[key], value, rtol=1e-3, atol=1e-4)


def test_muon_gets_hidden_matrices_and_kernels_and_adamw_the_rest() -> None:
    gpt = language()
    names = {id(parameter): name for name, parameter in gpt.named_parameters()}
    assert {names[id(each)].split(".")[-2] for each in hidden_matrices(gpt)} == {
        "queries_keys_values",
        "attention_out",
        "mlp_in",
        "mlp_out",
    }
    # It has a head of one row, and matrices of one row in EvoNorm.
    model = FlatModel(build("resnet20", (3, 8, 8), 1, 1, norm="evonorm"))
    muon, adamw = training.optimizers("muon", model, 0.1, 0.9, False, 0.0)
    shapes = [tuple(each.shape) for each in muon.param_groups[0]["params"]]
    assert shapes[:2] == [(16, 27), (16, 144)]
    assert len(shapes) == 1 + 18 + 2
    each = [
        parameter
        for optimizer in (muon, adamw)
        for parameter in optimizer.param_groups[0]["params"]
    ]
    assert sum(parameter.numel() for parameter in each) == model.x.numel()
    before = model.x.clone()
    model.grad.normal_(generator=torch.Generator().manual_seed(1))
    for optimizer in (muon, adamw):
        optimizer.step()
    assert (model.x != before).all()  # all of them are views into the model


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "fedavg"},
        {"strategy": "fedavg", "training.sam-radius": 0.1},
        {"strategy": "FedProx", "flower.arguments": "proximal_mu=1.0"},
        {"strategy": "diloco"},
        {"strategy": "gsgm", "gsgm.local-steps": 4},
        {"strategy": "asgd"},
    ],
)
def test_muon_goes_with(changes: dict[str, Any]) -> None:
    common: dict[str, Any] = {
        "epochs": 2,
        "num_sites": 2,
        "model.name": "mlp",
        "training.optimizer": "muon",
        "training.lr": 0.01,
    }
    run = simulate(**common, **changes, progress=False)
    assert run.history["accuracy"].iloc[-1] > 0.4


def test_muon_where_it_would_change_nothing_is_refused() -> None:
    for strategy in ("dmsgd", "scaffold"):
        with pytest.raises(ConfigError, match=r"training.optimizer = 'muon': has no effect"):
            configuration(strategy=strategy, training={"optimizer": "muon"})
    # Only the head is trained.
    config = configuration(
        training={"optimizer": "muon"}, model={"name": "mlp", "trainable": "3.*"}
    )
    with pytest.raises(ValueError, match="no hidden matrix of this network is trained"):
        network_of(config, (8,), 3)


def test_peers_warm_up_as_their_batched_twins() -> None:
    changes: dict[str, Any] = {
        "strategy": "dmsgd",
        "num_sites": 3,
        "epochs": 2,
        "model": {"name": "mlp"},
        "training": {"lr": 0.05, "lr_warmup": 0.5},
        "results": {"evaluate_every": 1},
        "progress": False,
    }
    relay, batched = simulate(**changes), simulate(**changes, engine="batched")
    rates = [
        run.metrics.query("site == 'all' and split == 'train' and metric == 'lr-first'")[
            "value"
        ].tolist()
        for run in (relay, batched)
    ]
    assert rates[0] == pytest.approx(rates[1])
    assert rates[0][0] == pytest.approx(0.05 / (len(rates[0]) / 2), rel=0.1)
    assert max(rates[0]) == pytest.approx(0.05)
    for name, model in relay.models.items():
        torch.testing.assert_close(model, batched.models[name], rtol=1e-3, atol=1e-4)
