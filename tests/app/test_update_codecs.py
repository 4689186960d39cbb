"""Updates that sites send a server in fewer bytes."""

from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, Message, RecordDict

from configuration.config import configuration
from configuration.errors import ConfigError
from simulation.laboratory import Run, simulate
from strategies.peer.channel import Channel, channel
from strategies.protocol import read_order
from strategies.records import config_of
from tests.app.stubs import NETWORK, Answer, Outcome, outcome

SHORT: dict[str, Any] = {"num_sites": 4, "epochs": 4, "model": {"name": "mlp"}, "progress": False}
STRATEGIES = ["co-learning", "scaffold", "FedAdam", "gsgm"]


@cache
def exact(strategy: str) -> Run:
    """A run with nothing in a codec."""
    return simulate(**SHORT, strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("wire", "share"),
    [
        ({"codec": "bf16"}, 0.5),
        ({"codec": "qsgd"}, 0.25),
        ({"codec": "qsgd", "bits": 4, "error_feedback": "deep-squeeze"}, 0.125),
    ],
    ids=["bf16", "qsgd", "qsgd 4"],
)
def test_fewer_bytes_go_up_and_as_much_is_learned(
    strategy: str, wire: dict[str, Any], share: float
) -> None:
    coded = simulate(**SHORT, strategy=strategy, wire=wire)
    up = [run.metrics["bytes_up"].max() / run.summary["rounds"] for run in (exact(strategy), coded)]
    beside = 0.5 if strategy == "scaffold" else 0.0  # its control variates go beside, whole
    assert abs(up[1] / up[0] - (beside + (1 - beside) * share)) < 0.03
    assert coded.summary["accuracy"] > exact(strategy).summary["accuracy"] - 0.03


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_half_the_bytes_go_down(strategy: str) -> None:
    """But for the last test, and what goes beside the model."""
    coded = simulate(**SHORT, strategy=strategy, wire={"down_codec": "bf16", "codec": "qsgd"})
    down = [
        run.metrics["bytes_down"].max() / run.summary["rounds"] for run in (exact(strategy), coded)
    ]
    assert 0.45 < down[1] / down[0] < 0.85
    assert coded.summary["accuracy"] > exact(strategy).summary["accuracy"] - 0.03


def test_rounding_on_the_way_down_is_no_part_of_the_update() -> None:
    """A site that learns next to nothing leaves the server's model as it is, not as it was sent."""
    keys: dict[str, Any] = {"training": {"lr": 1e-20, "weight_decay": 0.0}, "strategy": "fedavg"}
    still = simulate(**SHORT, **keys, wire={"down_codec": "bf16"})
    start = simulate(**SHORT, **keys)
    assert all(torch.equal(value, start.model[name]) for name, value in still.model.items())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in still.model.values())


def test_what_the_codec_loses_is_made_up_for() -> None:
    """A sign for each number, and the mean magnitude of its layer."""
    one = SHORT | {
        "num_sites": 1,
        "min_sites": 1,
        "epochs": 12,
        "strategy": "fedavg",
        "fedavg.local-epochs": 1,
    }
    keys = {"codec": "sign", "error_feedback": "deep-squeeze"}
    assert simulate(**one, wire=keys).summary["accuracy"] > 0.85
    with pytest.raises(ConfigError, match="loses what it leaves out"):
        configuration(strategy="fedavg", wire={"codec": "sign"})


def test_each_update_goes_on_with_what_the_one_before_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[torch.Tensor, ...]] = []

    def watched(*arguments: Any) -> Channel:
        way = channel(*arguments)

        def encode(memory: torch.Tensor, vector: torch.Tensor, generator: torch.Generator) -> Any:
            found = way.encode(memory, vector, generator)
            calls.append((memory.clone(), vector.clone(), found[1].clone(), found[2].clone()))
            return found

        return way._replace(encode=encode)

    monkeypatch.setattr("client_app.handlers.channel", watched)
    one = SHORT | {"num_sites": 1, "min_sites": 1, "strategy": "fedavg", "fedavg.local-epochs": 1}
    simulate(**one, wire={"codec": "top-k", "share": 0.01, "error_feedback": "deep-squeeze"})
    assert len(calls) == SHORT["epochs"]
    for (*_, lost, _), (memory, *_) in pairwise(calls):
        assert torch.equal(memory, lost)
    wanted, sent = (
        torch.stack(each).sum(0)
        for each in (list(zip(*calls, strict=True))[1], list(zip(*calls, strict=True))[3])
    )
    torch.testing.assert_close(sent + calls[-1][2], wanted, rtol=0, atol=1e-5)


def test_choco_is_for_peers() -> None:
    with pytest.raises(
        ConfigError,
        match=r"wire\.error-feedback = 'choco': fedavg has no neighbours; allowed: 'none', ",
    ):
        configuration(strategy="fedavg", wire={"codec": "qsgd", "error_feedback": "choco"})


def test_runs_repeat_themselves_bit_for_bit() -> None:
    first, second = (simulate(**SHORT, wire={"codec": "qsgd"}) for _ in range(2))
    assert all(torch.equal(value, second.model[name]) for name, value in first.model.items())


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("x/places", Array(np.array([9999], dtype=np.int32))),
        ("x/places", Array(np.array([3], dtype=np.int64))),
        ("x/values", Array(np.array([np.nan], dtype=np.float32))),
        ("x/values", Array(np.array([1.0, 2.0], dtype=np.float32))),
        ("x/more", Array(np.array([1.0], dtype=np.float32))),
        ("x", Array(np.zeros(14, dtype=np.float32))),
    ],
)
@pytest.mark.parametrize("strategy", ["fedavg", "Krum", "fedbuff"])
def test_update_that_is_none_costs_its_site_only(strategy: str, name: str, array: Array) -> None:
    keys = {"codec": "top-k", "share": 0.01, "error_feedback": "deep-squeeze"}
    small: dict[str, Any] = {"model": {"name": NETWORK}, "training": {"batch_size": 4}}
    config = configuration(strategy=strategy, num_sites=4, epochs=2, wire=keys, **small)

    def spoil(site: int, message: Message, content: RecordDict) -> Answer:
        if site == 1 and message.metadata.message_type == "train":
            assert read_order(config_of(message)).local
            content.array_records["arrays"][name] = array
        return content

    found: Outcome = outcome(config, spoil)
    assert found.error is None
    assert {event.site.number for event in found.refused} == {1}


def test_own_codec() -> None:
    run = simulate(**SHORT, strategy="fedavg", wire={"codec": "examples.my_codec:few_digits"})
    assert run.summary["accuracy"] > 0.5
