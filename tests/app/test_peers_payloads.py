"""What peers make of payloads and weights that were changed, repeated or made up."""

import math
import re
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message

from client_app.app import app as client_app
from server_app.app import run as run_server
from server_app.results import History
from simulation.world import World
from strategies.records import config_of, unpack
from tests.app.peers import CHOCO, SEALED, Between, Tamper, run, small, watched


def spoil(what: str) -> Tamper:
    """Something wrong with what peer 1 offers, or with how the relay delivers it."""
    seen: dict[str, Array] = {}

    def tamper(number: int, message: Message, reply: Message) -> Message:
        arrays = reply.content.get("arrays") if not reply.has_error() else None
        if (
            number != 1
            or message.metadata.message_type != "train.peer"
            or not isinstance(arrays, ArrayRecord)
        ):
            return reply
        for name in [name for name in arrays if name.endswith(("values", "sealed"))]:
            data = bytearray(arrays[name].data)
            match what:
                case "bit":
                    data[-1] ^= 1
                case "nan":
                    data[-4:] = np.float32(math.nan).tobytes()
                case "replay":
                    data = bytearray(seen.setdefault(name, arrays[name]).data)
                case "short":
                    arrays[name] = Array(unpack(arrays[name])[:10].numpy())
                    continue
            arrays[name] = Array(
                arrays[name].dtype, arrays[name].shape, arrays[name].stype, bytes(data)
            )
        return reply

    return tamper


@pytest.mark.parametrize(
    ("what", "settings", "message"),
    [
        ("bit", SEALED, "refuses what came from site 1: step 0 was changed on the way"),
        ("replay", SEALED, "refuses what came from site 1: step 1 was changed on the way"),
        ("nan", {}, "refuses what came from site 1: "),
        ("short", {}, r"refuses what came from site 1: a vector is torch.float32 of shape \(10,\)"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(
    what: str, settings: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    _, history = watched(spoil(what), strategy="d-psgd", epochs=2, **settings)
    assert re.search(message, caplog.text)
    assert "site 0 refuses what came from site 1" in caplog.text
    assert "site 2 refuses what came from site 1" in caplog.text
    assert "refuses what came from site 3" not in caplog.text
    assert history.metrics.query("metric == 'accuracy'")["value"].notna().all()


def test_payload_delivered_twice_is_refused() -> None:
    """A bad relay delivers the payload of a step again under the same, valid, header."""
    delivered: list[ArrayRecord] = []
    refused: list[str] = []

    def replay(message: Message) -> None:
        record = message.content.get("from-1")
        if isinstance(record, ArrayRecord):
            delivered.append(record)
            message.content["from-1"] = delivered[0]

    def look(number: int, message: Message, reply: Message) -> Message:
        if not reply.has_error():
            texts: Any = config_of(reply).get("refused", ())
            refused.extend(texts)
        return reply

    config = small(strategy="d-psgd", **SEALED)
    grid = Between(client_app, World().sites(4, 1), config.flat(), look)
    grid.change = replay
    run_server(grid, config, History(config))
    assert "site 1: step 0 came before" in refused


def test_refused_difference_is_made_good_by_a_reset(caplog: pytest.LogCaptureFixture) -> None:
    """One changed bit at step 5: the neighbours leave the sender out until it restarts.

    From then on they use its messages again.
    """

    def spoil_once(number: int, message: Message, reply: Message) -> Message:
        arrays = reply.content.get("arrays") if not reply.has_error() else None
        if (
            number == 1
            and isinstance(arrays, ArrayRecord)
            and config_of(message).get("server-round") == 5
        ):
            for name in [name for name in arrays if name.endswith("sealed")]:
                data = bytearray(arrays[name].data)
                data[-1] ^= 1
                arrays[name] = Array(
                    arrays[name].dtype, arrays[name].shape, arrays[name].stype, bytes(data)
                )
        return reply

    _, history = watched(spoil_once, strategy="qgm", epochs=4, **CHOCO, **SEALED)
    # Both neighbours, once or twice.
    assert caplog.text.count("refuses what came from site 1") in (2, 3, 4)
    assert history.metrics.query("metric == 'accuracy' and site == 'all'")["value"].iloc[-1] > 0.3


@pytest.mark.parametrize(
    ("settings", "part", "wrong"),
    [
        (
            {
                "wire.codec": "top-k",
                "wire.error-feedback": "deep-squeeze",
                "topology.averaging-rate": 0.5,
            },
            "places",
            np.full(481, 10**8, np.int32),
        ),
        (
            {
                "wire.codec": "sign",
                "wire.error-feedback": "deep-squeeze",
                "topology.averaging-rate": 0.2,
            },
            "signs",
            np.ones(602, np.float32),
        ),
        ({"strategy": "ngm"}, "values", np.ones(3, np.float32)),
        (
            {
                "strategy": "n-saddle",
                "n-saddle.rho": 0.05,
                "n-saddle.perturbed-by": "owner-of-model",
            },
            "shift",
            np.ones(7, np.float32),
        ),
    ],
    ids=["places", "signs", "gradient", "shift"],
)
def test_malformed_payload_costs_its_sender_not_the_readers(
    settings: dict[str, Any], part: str, wrong: Any, caplog: pytest.LogCaptureFixture
) -> None:

    def spoil_part(number: int, message: Message, reply: Message) -> Message:
        arrays = reply.content.get("arrays") if not reply.has_error() else None
        if number == 1 and isinstance(arrays, ArrayRecord):
            for name in [name for name in arrays if name.endswith(part)]:
                arrays[name] = Array(wrong)
        return reply

    _, history = watched(spoil_part, world=None, **({"strategy": "d-psgd", "epochs": 1} | settings))
    assert "refuses what came from site 1" in caplog.text
    assert "is left out" not in caplog.text
    assert "refuses what came from site 3" not in caplog.text
    assert set(history.metrics.query("metric == 'accuracy'")["site"]) == {"0", "1", "2", "3", "all"}


def test_weights_that_the_server_tells_are_not_believed() -> None:
    def weigh(message: Message) -> None:
        fields = config_of(message)
        if fields.get("weights"):
            fields["weights"] = [50.0, 50.0]

    config = small(strategy="d-psgd")
    history = History(config)
    grid = Between(client_app, World().sites(4, 1), config.flat())
    grid.change = weigh
    run_server(grid, config, history)
    assert history.metrics.query("metric == 'accuracy' and site == 'all'")[
        "value"
    ].tolist() == list(run(strategy="d-psgd").history["accuracy"])
