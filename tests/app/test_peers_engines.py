"""The batched engine of peers does what the relay does, and says what it cannot."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from configuration.checks import kind_of
from configuration.config import configuration
from configuration.errors import ConfigError
from server_app.discovery import RunError
from simulation.world import World
from strategies.methods import METHODS
from tests.app.peers import run

NOLOCO = "strategies.peer.noloco:METHOD"


ALIKE: list[dict[str, Any]] = [
    {"strategy": "d-psgd"},
    {"strategy": "cdsgd", "topology.name": "star"},
    {"strategy": "cdmsgd", "cdmsgd.nesterov": True, "topology.lazy": True},
    {"strategy": "dsgdm", "partition.kind": "sizes", "dsgdm.local-steps": 2},
    {"strategy": "dmsgd", "topology.name": "path", "dmsgd.form": "velocity"},
    {
        "strategy": "dmsgd",
        "topology.name": "torus",
        "num_sites": 9,
        "dmsgd.consensus-weight": 1.0,
        "topology.averaging-rate": 0.7,
    },
    {"strategy": "qgm", "topology.name": "one-peer-exponential", "training.clip-norm": 0.5},
    {"strategy": "q-saddle", "topology.name": "exponential", "partition.kind": "dirichlet"},
    {
        "strategy": "q-saddle",
        "wire.codec": "random-k",
        "wire.share": 0.3,
        "wire.error-feedback": "choco",
        "topology.averaging-rate": 0.4,
    },
    {
        "strategy": "q-saddle",
        "wire.codec": "random-k",
        "wire.error-feedback": "deep-squeeze",
        "topology.averaging-rate": 0.2,
    },
    {"strategy": "gradient-tracking"},
    {"strategy": "dfedsam", "dfedsam.local-steps": 3},
    {"strategy": "ngm"},
    {"strategy": "ngm", "wire.cross-codec": "random-k", "wire.share": 0.5},
    {"strategy": "ngm", "ngm.gradients": "model", "training.weight-decay": 0.01},
    {"strategy": "n-saddle", "topology.name": "complete", "training.weight-decay": 0.01},
    {"strategy": "n-saddle", "n-saddle.perturbed-by": "none"},
    {"strategy": "n-saddle", "n-saddle.perturbed-by": "none", "n-saddle.gradients": "model"},
    {"strategy": "n-saddle", "n-saddle.perturbed-by": "owner-of-model"},
    {
        "strategy": "n-saddle",
        "wire.codec": "random-k",
        "wire.share": 0.5,
        "wire.error-feedback": "choco",
        "topology.averaging-rate": 0.5,
    },
    # Whoever mixes up w_ij and w_ji is found out where they differ.
    {"strategy": "ngm", "ngm.gradients": "model", "topology.name": "exponential"},
    {
        "strategy": "n-saddle",
        "n-saddle.perturbed-by": "owner-of-model",
        "training.weight-decay": 0.1,
    },
    {"strategy": "d-psgd", "data.augment": "flip-crop"},
    {"strategy": NOLOCO, "topology.name": "matching", "num_sites": 5, "noloco.local-steps": 3},
    {"strategy": "d-psgd", "topology.name": "examples.my_topology:cities"},
]


def smooth(shape: tuple[int, ...], num_classes: int) -> torch.nn.Module:
    """A network without kinks: at one, a rounding error of one engine would grow by far."""
    hidden = 64
    return torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(math.prod(shape), hidden),
        torch.nn.Tanh(),
        torch.nn.Linear(hidden, num_classes),
    )


JUMPING: list[dict[str, Any]] = [
    *(
        {"wire.codec": codec, "wire.error-feedback": "choco", "topology.averaging-rate": 0.5}
        for codec in ("qsgd", "sign", "top-k", "fp16", "bf16")
    ),
    {"wire.codec": "examples.my_codec:few_digits", "wire.error-feedback": "deep-squeeze"},
    {"strategy": "d-psgd"},
    {"strategy": "d-psgd", "model.name": "cnn"},
]


def test_every_method_of_peers_is_compared() -> None:
    peers = {name for name in METHODS if kind_of(METHODS[name]) == "peers"}
    linked = {"relaysgd"}  # the batched engine refuses it
    assert {configuration(**row).method.name for row in ALIKE} == peers - linked


@pytest.mark.parametrize("changes", ALIKE, ids=lambda changes: "-".join(map(str, changes.values())))
def test_batched_engine_is_the_relay_step_for_step(changes: dict[str, Any]) -> None:
    changes = {"model.name": f"{__name__}:smooth"} | changes
    relay, batched = (run(engine=engine, epochs=3, **changes) for engine in ("app", "batched"))
    assert relay.models.keys() == batched.models.keys()
    for name, model in relay.models.items():
        for key, value in model.items():
            torch.testing.assert_close(batched.models[name][key], value, rtol=0, atol=1e-6)
    assert list(relay.history["round"]) == list(batched.history["round"])
    np.testing.assert_allclose(relay.history["accuracy"], batched.history["accuracy"], atol=1e-9)
    trained = (
        found.metrics.query("metric == 'loss' and split == 'train'") for found in (relay, batched)
    )
    own, other = (each.set_index(["round", "site"])["value"].sort_index() for each in trained)
    pd.testing.assert_series_equal(own, other, rtol=1e-4)
    # The relay's messages hold more than payloads: headers, metrics, what sites are told.
    assert 1 < relay.history["megabytes"].iloc[-1] / batched.history["megabytes"].iloc[-1] < 1.3
    distance = batched.metrics.query("metric == 'consensus-distance'")["value"].iloc[-1]
    assert relay.metrics.query("metric == 'consensus-distance'")["value"].iloc[-1] == pytest.approx(
        distance, rel=1e-4, abs=1e-6
    )


@pytest.mark.parametrize("changes", JUMPING, ids=lambda changes: next(iter(changes.values())))
def test_what_jumps_is_close_in_both_engines(changes: dict[str, Any]) -> None:
    """A rounding error of one engine can grow to far more than itself, but seldom does.

    It can move a number to a codec's next level, or past the kink of a ReLU or of max-pooling.
    """
    changes = {"strategy": "q-saddle"} | changes
    relay, batched = (run(engine=engine, epochs=2, **changes) for engine in ("app", "batched"))
    for name, model in relay.models.items():
        for key, value in model.items():
            torch.testing.assert_close(batched.models[name][key], value, rtol=0, atol=5e-3)


def test_slow_peer_gets_all_that_its_neighbours_offered() -> None:
    """On a directed graph these may be several exchanges ahead."""
    changes: dict[str, Any] = {
        "strategy": "d-psgd",
        "topology.name": "exponential",
        "num_sites": 8,
        "training.batch-size": 16,
        "epochs": 2,
    }
    slow, batched = (
        run(World(samples_per_s=[5.0, *[1000.0] * 7]), **changes),
        run(engine="batched", **changes),
    )
    for name, model in slow.models.items():
        for key, value in model.items():
            torch.testing.assert_close(batched.models[name][key], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("engine", ["app", "batched"])
def test_epochs_add_up_whenever_peers_are_tested(engine: str) -> None:
    found = run(
        engine=engine, strategy="d-psgd", num_sites=3, epochs=1, results={"evaluate_every": 7}
    )
    rows = found.metrics.query("metric == 'local-epochs'")
    assert list(rows["value"]) == pytest.approx([7 / 15, 7 / 15, 1 / 15])
    with pytest.raises(
        RunError, match="local-steps = 1000: epochs = 1 have 15 batches; at most these"
    ):
        run(engine=engine, strategy="d-psgd", num_sites=3, epochs=1, d_psgd={"local_steps": 1000})


def test_training_is_reported_alike_by_both_engines() -> None:
    relay, batched = (
        run(engine=engine, strategy="dmsgd", epochs=3).metrics for engine in ("app", "batched")
    )
    for metric in ("loss", "lr-first", "lr-last"):
        one, two = (
            each.query(f"metric == '{metric}' and site == 'all' and split == 'train'")["value"]
            for each in (relay, batched)
        )
        np.testing.assert_allclose(one, two, rtol=1e-5)


def test_batched_run_that_diverges_says_so() -> None:
    with pytest.raises(
        RunError,
        match=r"exchange \d+: training diverged: the models of the sites "
        r"\[0, 1, 2, 3\] are not finite",
    ):
        run(engine="batched", strategy="d-psgd", training={"lr": 1e6})


def test_engine_of_the_laboratory_is_checked() -> None:
    with pytest.raises(ConfigError, match="engine = 'batched': knows no world"):
        run(World(), strategy="dmsgd", engine="batched")
    with pytest.raises(ConfigError, match="engine = 'ray': allowed: 'app', 'batched'"):
        run(strategy="dmsgd", engine="ray")
    with pytest.raises(ConfigError, match=r"norm = 'batch': engine = 'batched' takes no BatchNorm"):
        run(
            strategy="dmsgd",
            engine="batched",
            model={"name": "resnet20"},
            data={"source": "tests.data:few"},
        )
