"""The batched engine of methods with a server does what the app does, and says what it cannot."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from client_app.work import Training
from configuration.config import configuration
from configuration.errors import ConfigError
from models.flat import FlatModel
from models.networks import cnn, lenet5, vgg11
from server_app.discovery import RunError
from simulation import grid, together
from simulation.layers import layers_of
from simulation.vectorised import Networks, stacked
from simulation.world import Lognormal, World
from tests.app.peers import run


class Bent(nn.Module):
    """A network that is no sequence of layers: vmap computes it."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(features, 32), nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x.flatten(1)))
        found: Tensor = self.last(hidden + hidden.square())
        return found


def bent(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return Bent(math.prod(shape), num_classes)


SMOOTH = "tests.app.test_peers_engines:smooth"
SPEEDS = World(
    samples_per_s=Lognormal(median=500, sigma=1.0), bandwidth_mbps=20, latency_ms=30, jitter=0.2
)
UNEQUAL = {"partition.kind": "sizes"}

ALIKE: list[tuple[World | None, dict[str, Any]]] = [
    (None, {"strategy": "fedavg"}),
    (SPEEDS, {"strategy": "co-learning", **UNEQUAL}),
    (None, {"strategy": "fedavg", "training.nesterov": True, "training.clip-norm": 0.1}),
    (None, {"strategy": "fedavg", "training.weight-decay": 0.05, "sampling.fraction": 0.5}),
    (None, {"strategy": "fedavg", "training.sam-radius": 0.05, "data.augment": "flip-crop"}),
    (None, {"strategy": "fedavg", "training.optimizer": "adamw", **UNEQUAL}),
    (None, {"strategy": "fedavg", "model.name": f"{__name__}:bent", **UNEQUAL}),
    (SPEEDS, {"strategy": "diloco", "diloco.local-steps": 4, **UNEQUAL}),
    (None, {"strategy": "diloco", "diloco.local-steps": 4, "training.optimizer": "adamw"}),
    (None, {"strategy": "scaffold", **UNEQUAL}),
    (None, {"strategy": "FedProx", "flower.arguments": "proximal_mu=0.1"}),
    (None, {"strategy": "local"}),
    (None, {"strategy": "ensemble"}),
    (None, {"strategy": "fedavg", "results.personalise-epochs": 1}),
    (None, {"strategy": "fedavg", "wire.codec": "random-k", "wire.error-feedback": "deep-squeeze"}),
    (SPEEDS, {"strategy": "gsgm"}),
    (SPEEDS, {"strategy": "gsgm", "gsgm.schedule": "refill"}),
    (SPEEDS, {"strategy": "gsgm", "gsgm.schedule": "local", "gsgm.slack": 1.0}),
    (SPEEDS, {"strategy": "fedbuff", "fedbuff.local-steps": 3, **UNEQUAL}),
    (SPEEDS, {"strategy": "fedasync"}),
    (SPEEDS, {"strategy": "delayed-nesterov", "delayed-nesterov.by-speed": True}),
    (SPEEDS, {"strategy": "asgd", "wire.codec": "random-k", "wire.error-feedback": "deep-squeeze"}),
    (World(samples_per_s=100, mean_up_s=20, mean_down_s=2), {"strategy": "asgd"}),
]


@pytest.mark.parametrize(
    ("world", "changes"),
    ALIKE,
    ids=lambda each: "-".join(map(str, each.values())) if isinstance(each, dict) else "",
)
def test_batched_engine_is_the_app(
    world: World | None, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, original = [], together._stacked

    def counted(works: list[Training], networks: Networks) -> list[Any]:
        sizes.append(len(works))
        return original(works, networks)

    monkeypatch.setattr(together, "_stacked", counted)
    changes = {"model.name": SMOOTH, "epochs": 2} | changes
    app = run(world, "app", **changes)
    monkeypatch.setattr(grid, "IN_MEMORY", 0)  # and replies that wait on disk are as good
    batched = run(world, "batched", **changes)
    assert max(sizes) > 1
    assert app.models.keys() == batched.models.keys()
    for name, model in app.models.items():
        for key, value in model.items():
            torch.testing.assert_close(batched.models[name][key], value, rtol=0, atol=1e-6)
    index = ["round", "seconds", "bytes_up", "bytes_down", "site", "split", "metric"]
    pd.testing.assert_frame_equal(app.metrics[index], batched.metrics[index])
    np.testing.assert_allclose(app.metrics["value"], batched.metrics["value"], rtol=1e-4, atol=1e-5)


def test_all_contributions_under_way_are_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, answers = [], together.answers

    def counted(calls: Any) -> Any:
        sizes.append(sum(message.metadata.message_type == "train" for message, _ in calls))
        return answers(calls)

    monkeypatch.setattr(together, "answers", counted)
    speeds = World(samples_per_s=Lognormal(median=500, sigma=0.2))
    run(speeds, "batched", strategy="asgd", epochs=2, num_sites=8)
    assert np.mean([size for size in sizes if size]) > 3


def test_run_that_was_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what sites remember."""
    changes: dict[str, Any] = {"strategy": "diloco", "diloco.local-steps": 4, "model.name": SMOOTH}
    whole = run(None, "batched", **changes)
    rounds, original = iter(range(100)), together._stacked

    def interrupted(works: list[Training], networks: Networks) -> list[Any]:
        if next(rounds) == 3:
            raise KeyboardInterrupt
        return original(works, networks)

    monkeypatch.setattr(together, "_stacked", interrupted)
    with pytest.warns(UserWarning, match="was interrupted"):
        assert not run(None, "batched", folder=tmp_path, **changes).finished
    again = run(None, "batched", folder=tmp_path, **changes)
    assert again.finished
    assert next(rounds) == len(whole.history) + 1
    for key, value in whole.model.items():
        torch.testing.assert_close(again.model[key], value, rtol=0, atol=0)


def test_site_that_diverges_is_left_out_as_in_the_app() -> None:
    changes: dict[str, Any] = {"strategy": "fedavg", "epochs": 1, "model.name": SMOOTH}
    changes |= {"training.lr": 1e6, "training.clip-norm": 0.0, "training.weight-decay": 1.0}
    for engine in ("app", "batched"):
        with pytest.raises(RunError, match="training diverged: in round 1 this site's loss is"):
            run(None, engine, **changes)


def test_wide_convolutions_on_large_pictures_are_computed_a_site_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(works: list[Training], networks: Networks) -> list[Any]:
        raise AssertionError("it is slower")

    changes: dict[str, Any] = {"data.source": "tests.data:large", "model.name": "cnn", "epochs": 1}
    app = run(strategy="fedavg", **changes)
    monkeypatch.setattr(together, "_stacked", never)
    batched = run(engine="batched", strategy="fedavg", **changes)
    for key, value in app.model.items():
        torch.testing.assert_close(batched.model[key], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.name": "resnet20"}, r"norm = 'batch': engine = 'batched' takes no BatchNorm"),
        ({"training.optimizer": "muon"}, "training.optimizer = 'muon': not with engine"),
        ({"computing.checkpointing": True}, "checkpointing = True: not with engine = 'batched'"),
        ({"computing.compile": True}, "computing.compile = True: not with engine = 'batched'"),
        ({"computing.micro-batch": 8}, "micro-batch = 8: has no effect with engine = 'batched'"),
    ],
)
def test_what_it_cannot_is_said_before_any_site_works(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(together, "answers", None)
    with pytest.raises(ConfigError, match=message):
        run(engine="batched", strategy="fedavg", **changes)


NETWORKS: dict[str, tuple[tuple[int, ...], nn.Module]] = {
    "cnn": ((1, 8, 8), cnn((1, 8, 8), 10)),
    "lenet5": ((3, 28, 28), lenet5((3, 28, 28), 10)),
    "vgg11": ((3, 32, 32), vgg11((3, 32, 32), 10, "group")),
    "vectors": (
        (12,),
        nn.Sequential(
            nn.Linear(12, 8, bias=False), nn.GroupNorm(4, 8), nn.ReLU(), nn.Linear(8, 10)
        ),
    ),
    "partly frozen": (
        (12,),
        nn.Sequential(nn.Linear(12, 8).requires_grad_(False), nn.Tanh(), nn.Linear(8, 10)),
    ),
    "tied": (
        (8,),
        nn.Sequential(shared := nn.Linear(8, 8), nn.ReLU(), nn.ReLU(), shared, nn.Linear(8, 10)),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_of_several_networks_have_each_ones_gradients(name: str) -> None:
    shape, network = NETWORKS[name]
    assert layers_of(network)
    generator = torch.Generator().manual_seed(1)
    model, config = FlatModel(network), configuration(strategy="fedavg")
    networks = Networks(config, model, shape)
    networks.one_by_one = False
    x = model.x + 0.1 * torch.randn(3, len(model.x), generator=generator)
    examples = [
        (
            torch.randn(count, *shape, generator=generator),
            torch.randint(10, (count,), generator=generator),
        )
        for count in (5, 4, 5)
    ]
    losses, gradients, _ = networks.gradients(x, stacked(examples))
    for row, (inputs, labels) in enumerate(examples):
        model.load(x[row])
        loss = F.cross_entropy(network(inputs), labels)
        model.backward(loss)
        torch.testing.assert_close(losses[row], loss.detach())
        torch.testing.assert_close(gradients[row], model.grad, rtol=1e-4, atol=1e-5)


def test_network_with_a_hook_is_no_sequence_of_layers() -> None:
    network = nn.Sequential(nn.Linear(2, 2))
    network[0].register_forward_hook(lambda *_: None)
    assert not layers_of(network)
