"""Peers: the real ServerApp and ClientApp over the relay, the batched engine beside it, and everything that can go wrong."""

import ast
import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from matplotlib.image import imread

from client_app import oracle as oracle_module
from client_app import site as site_module
from client_app.app import app as client_app
from client_app.memory import recall
from configuration.config import Config, configuration
from configuration.errors import ConfigError
from server_app import relay as relay_module
from server_app.app import run as run_server
from server_app.census import RunError
from server_app.results import History
from simulation.grid import VirtualGrid
from simulation.laboratory import Run, simulate
from simulation.world import World
from strategies.method import PeerPlan
from strategies.records import arrays_of, config_of, unpack
from strategies.topology import TopologyError
from tests.conftest import RunApp, own
from tests.data import write_keys

SMALL: dict[str, Any] = {"num_sites": 4, "epochs": 4, "model.name": "mlp", "training.lr": 0.05, "progress": False}
SEALED: dict[str, Any] = {"wire.sealing": "trust-on-first-use"}


def small(**changes: Any) -> Config:
    """The configuration of :func:`run`."""
    half = own(changes.get("strategy", "dmsgd"), momentum=0.5)
    return configuration(**{key: value for key, value in (SMALL | half | changes).items() if key != "progress"})


def run(world: World | None = None, engine: str = "app", **changes: Any) -> Run:
    half = own(changes.get("strategy", "co-learning"), momentum=0.5)
    return simulate(**(SMALL | half | changes), world=world, engine=engine)


NOLOCO = "strategies.peer.noloco:METHOD"
ALIKE: list[dict[str, Any]] = [
    {"strategy": "d-psgd"},
    {"strategy": "cdsgd", "topology.name": "star"},
    {"strategy": "cdmsgd", "cdmsgd.nesterov": True, "topology.lazy": True},
    {"strategy": "dsgdm", "partition.kind": "sizes", "dsgdm.local-steps": 2},
    {"strategy": "dmsgd", "topology.name": "path", "dmsgd.form": "velocity"},
    {"strategy": "dmsgd", "topology.name": "torus", "num_sites": 9, "dmsgd.consensus-weight": 1.0, "topology.averaging-rate": 0.7},
    {"strategy": "qgm", "topology.name": "one-peer-exponential", "training.clip-norm": 0.5},
    {"strategy": "q-saddle", "topology.name": "exponential", "partition.kind": "dirichlet"},
    {
        "strategy": "q-saddle",
        "wire.codec": "random-k",
        "wire.share": 0.3,
        "wire.error-feedback": "choco",
        "topology.averaging-rate": 0.4,
    },
    {"strategy": "q-saddle", "wire.codec": "random-k", "wire.error-feedback": "deep-squeeze", "topology.averaging-rate": 0.2},
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
    {"strategy": "n-saddle", "n-saddle.perturbed-by": "owner-of-model", "training.weight-decay": 0.1},
    {"strategy": "d-psgd", "data.augment": "flip-crop"},
    {"strategy": NOLOCO, "topology.name": "matching", "num_sites": 5, "noloco.local-steps": 3},
    {"strategy": "d-psgd", "topology.name": "examples.my_topology:cities"},
]


def smooth(shape: tuple[int, ...], num_classes: int) -> torch.nn.Module:
    """A network without kinks, at which a rounding error of one engine would become far more than itself."""
    hidden = 64
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(math.prod(shape), hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, num_classes)
    )


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
    trained = (found.metrics.query("metric == 'loss' and split == 'train'") for found in (relay, batched))
    own, other = (each.set_index(["round", "site"])["value"].sort_index() for each in trained)
    pd.testing.assert_series_equal(own, other, rtol=1e-4)
    # The relay's messages hold more than payloads: headers, metrics, what sites are told.
    assert 1 < relay.history["megabytes"].iloc[-1] / batched.history["megabytes"].iloc[-1] < 1.3
    distance = batched.metrics.query("metric == 'consensus-distance'")["value"].iloc[-1]
    assert relay.metrics.query("metric == 'consensus-distance'")["value"].iloc[-1] == pytest.approx(distance, rel=1e-4, abs=1e-6)


JUMPING: list[dict[str, Any]] = [
    *(
        {"wire.codec": codec, "wire.error-feedback": "choco", "topology.averaging-rate": 0.5}
        for codec in ("qsgd", "sign", "top-k", "fp16", "bf16")
    ),
    {"wire.codec": "examples.my_codec:few_digits", "wire.error-feedback": "deep-squeeze"},
    {"strategy": "d-psgd"},
    {"strategy": "d-psgd", "model.name": "cnn"},
]


@pytest.mark.parametrize("changes", JUMPING, ids=lambda changes: next(iter(changes.values())))
def test_what_jumps_is_close_in_both_engines(changes: dict[str, Any]) -> None:
    """A rounding error of one engine can move a number to a codec's next level, or past the kink of a ReLU or of max-pooling, and
    then by far more than itself, but seldom."""
    changes = {"strategy": "q-saddle"} | changes
    relay, batched = (run(engine=engine, epochs=2, **changes) for engine in ("app", "batched"))
    for name, model in relay.models.items():
        for key, value in model.items():
            torch.testing.assert_close(batched.models[name][key], value, rtol=0, atol=5e-3)


@pytest.mark.slow
def test_sealing_changes_no_number_and_keeps_models_from_the_server() -> None:
    changes: dict[str, Any] = {
        "strategy": "q-saddle",
        "wire.codec": "qsgd",
        "wire.error-feedback": "choco",
        "topology.averaging-rate": 0.5,
        "epochs": 2,
    }
    open_, sealed = run(**changes), run(**changes, **SEALED)
    assert list(open_.history["accuracy"]) == list(sealed.history["accuracy"])
    assert sealed.models == {}
    assert sealed.metrics.query("split == 'consensus'").empty
    coded: dict[str, Any] = {"strategy": "ngm", "wire.cross-codec": "sign", "epochs": 2}
    assert list(run(**coded, **SEALED).history["accuracy"]) == list(run(**coded).history["accuracy"])


def test_same_seed_same_history_and_seeds_differ() -> None:
    one, two, other = (run(strategy="dmsgd", epochs=1, seed=seed) for seed in (1, 1, 2))
    assert one.metrics.equals(two.metrics)
    assert not one.metrics.equals(other.metrics)


def test_state_survives_the_process() -> None:
    """Everything a site keeps in memory is dropped before each message: only ``context.state`` remains."""

    def forget(number: int, message: Message, reply: Message) -> Message:
        for cached in (site_module.network_of, site_module._site_data, oracle_module.order_of):
            cached.cache_clear()
        return reply

    for changes in (
        {"strategy": "dmsgd"},
        {"strategy": "qgm", "wire.codec": "qsgd", "wire.error-feedback": "choco", "topology.averaging-rate": 0.5},
    ):
        _, history = watched(forget, **changes, epochs=1)
        assert (
            history.metrics.query("metric == 'accuracy'")["value"].tolist()
            == run(**changes, epochs=1).metrics.query("metric == 'accuracy'")["value"].tolist()
        )


def test_state_on_disk_survives_the_supernode(tmp_path: Path) -> None:
    """What Flower remembers of site 2 is gone before each message, as when its SuperNode was started anew."""
    changes: dict[str, Any] = {
        "strategy": "qgm",
        "wire.codec": "qsgd",
        "wire.error-feedback": "choco",
        "topology.averaging-rate": 0.5,
        "epochs": 2,
        **SEALED,
    }
    config = small(**changes)

    folder, modes = tmp_path / "of" / "site-2", set[int]()

    def accuracies(settings: dict[str, str]) -> list[float]:
        def forget(number: int, message: Message, reply: Message) -> Message:
            context_of_site_2().state = RecordDict()
            modes.update(path.stat().st_mode & 0o777 for path in folder.glob("*"))
            return reply

        def context_of_site_2() -> Context:
            return list(grid.contexts.values())[2]

        grid, history = VirtualGrid(client_app, World().sites(4, 1), config.flat(), forget), History(config)
        context_of_site_2().node_config |= settings
        run_server(grid, config, history)
        found: list[float] = history.metrics.query("metric == 'accuracy' and site == '2'")["value"].tolist()
        return found

    undisturbed = run(**changes).metrics.query("metric == 'accuracy' and site == '2'")["value"].tolist()
    assert accuracies({"state": str(folder)}) == undisturbed
    # Until the next run: while the last answer was on its way, the server might have been killed.
    assert sorted(path.name for path in folder.iterdir()) == ["1-2.before", "1-2.ended"]
    assert modes == {0o600}
    assert accuracies({}) != undisturbed


@pytest.mark.parametrize("wrong", ["a file", "no state"])
def test_state_that_cannot_be_used_is_named_before_any_work(wrong: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("flwr").propagate = True
    folder = tmp_path / "state"
    if wrong == "a file":
        folder.write_bytes(b"")
    else:
        folder.mkdir()
    config = small(strategy="dmsgd", min_sites=4)
    grid = VirtualGrid(client_app, World().sites(4, 1), config.flat())
    context = list(grid.contexts.values())[1]
    context.node_config["state"] = str(folder)
    if wrong == "no state":
        (folder / "1-1.state").write_bytes(b"no state")
    history = History(config)
    with pytest.raises(RunError, match=rf"state = '{folder}': "):
        run_server(grid, config, history)
    assert history.metrics.empty


Tamper = Callable[[int, Message, Message], Message | None]


class Between(VirtualGrid):
    """Messages pass through ``change`` on their way to a site."""

    change: Callable[[Message], None]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        passed = list(messages)
        for message in passed:
            self.change(message)
        return super().push_messages(passed)


def watched(tamper: Tamper | None, world: World | None = None, **changes: Any) -> tuple[VirtualGrid, History]:
    """A run whose messages ``tamper`` sees."""
    config = small(**changes)
    history = History(config)
    grid = VirtualGrid(client_app, (world or World()).sites(config.num_sites, config.seed), config.flat(), tamper)
    run_server(grid, config, history)
    return grid, history


def test_relay_does_no_arithmetic_on_payloads() -> None:
    """It knows neither torch nor numpy, and what it delivers is, byte for byte, what was offered."""
    source = ast.parse(Path(relay_module.__file__).read_text())
    imported = {
        alias.name if isinstance(node, ast.Import) else str(node.module)
        for node in ast.walk(source)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert not any(name.split(".")[0] in ("torch", "numpy") for name in imported)
    assert not {"unpack", "pack", "arrays"} & {
        alias.name for node in ast.walk(source) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    offered: set[bytes] = set()
    delivered: list[bytes] = []

    def look(number: int, message: Message, reply: Message) -> Message:
        for name, record in message.content.items():
            if name.startswith("from-"):
                assert isinstance(record, ArrayRecord)
                delivered.extend(array.data for array in record.values())
        if not reply.has_error():
            offered.update(array.data for array in arrays_of(reply).values())
        return reply

    watched(look, strategy="ngm", epochs=1)
    assert len(delivered) > 100
    assert set(delivered) <= offered


def test_a_message_a_peer_and_exchange_and_two_with_neighbourhood_gradients() -> None:
    kinds: list[str] = []

    def count(number: int, message: Message, reply: Message) -> Message:
        kinds.append(message.metadata.message_type)
        return reply

    watched(count, strategy="dmsgd", epochs=2)  # 4 sites, 12 batches an epoch
    assert kinds.count("train.peer") == 4 * (24 + 1)
    kinds.clear()
    watched(count, strategy="ngm", epochs=2)
    assert kinds.count("train.cross") == 4 * 24
    assert kinds.count("train.peer") == 4 * (24 + 1)


def test_neighbours_need_not_wait_for_those_far_away() -> None:
    """On a path the last peer is slow: when it has taken its first steps, the first one is some steps ahead, not one."""
    steps: dict[int, int] = {}
    ahead: list[int] = []

    def look(number: int, message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train.peer":
            steps[number] = int(config_of(message)["server-round"])  # type: ignore[arg-type]
            ahead.append(steps[number] - min(steps.values()))
        return reply

    world = World(samples_per_s=[1000, 1000, 1000, 1000, 1000, 10])
    watched(look, world, strategy="d-psgd", num_sites=6, topology={"name": "path"}, epochs=2)
    assert max(ahead) == 4  # the last but one takes the same step; then one more for each link


def accuracy(found: Run, site: int) -> list[float]:
    rows = found.metrics.query("metric == 'accuracy' and split == 'test'")
    return [float(value) for value in rows[rows["site"] == str(site)]["value"]]


@pytest.mark.parametrize("strategy", ["d-psgd", "dmsgd", "n-saddle"])
def test_peer_that_dies_is_not_waited_for(strategy: str) -> None:
    found = run(World(samples_per_s=100, offline={2: [(6.0, math.inf)]}), strategy=strategy, epochs=6)
    assert found.finished
    assert len(accuracy(found, 2)) < len(accuracy(found, 0)) == 6
    assert found.history["accuracy"].iloc[-1] > 0.6
    assert "model-2" not in found.models
    assert len(found.models) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "dmsgd"},
        {"strategy": "q-saddle", "wire.codec": "qsgd", "wire.error-feedback": "choco", "topology.averaging-rate": 0.5, **SEALED},
        {
            "strategy": "n-saddle",
            "wire.codec": "qsgd",
            "wire.error-feedback": "choco",
            "topology.averaging-rate": 0.5,
            "wire.cross-codec": "sign",
        },
    ],
    ids=["dmsgd", "choco, sealed", "n-saddle, choco"],
)
@pytest.mark.slow
def test_peer_that_comes_back_rejoins_with_its_state(changes: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("flwr").propagate = True
    found = run(World(samples_per_s=100, offline={2: [(6.0, 68.0)]}), epochs=16, **changes)
    assert found.finished
    assert "site 2 is back" in caplog.text
    assert "refuses" not in caplog.text
    own = accuracy(found, 2)
    assert len(own) <= 16  # it may have missed tests
    assert own[-1] > 0.7
    assert len(accuracy(found, 0)) == 16
    if "wire.sealing" not in changes:
        distance = found.metrics.query("metric == 'consensus-distance'")["value"].iloc[-1]
        assert distance < 0.5


def test_slow_peer_gets_all_that_its_neighbours_offered() -> None:
    """On a directed graph these may be several exchanges ahead."""
    changes: dict[str, Any] = {
        "strategy": "d-psgd",
        "topology.name": "exponential",
        "num_sites": 8,
        "training.batch-size": 16,
        "epochs": 2,
    }
    slow, batched = run(World(samples_per_s=[5.0, *[1000.0] * 7]), **changes), run(engine="batched", **changes)
    for name, model in slow.models.items():
        for key, value in model.items():
            torch.testing.assert_close(batched.models[name][key], value, rtol=0, atol=1e-5)


def test_each_exchange_is_tested_once_though_a_peer_comes_late() -> None:
    late = World(samples_per_s=100, offline={2: [(1.0, 2.0)]})
    found = run(late, strategy="d-psgd", num_sites=3, epochs=1, results={"evaluate_every": 1}, timeout_s=3.0)
    assert list(found.history["round"]) == list(range(1, 16))


@pytest.mark.parametrize("sealing", ["off", "trust-on-first-use"])
@pytest.mark.parametrize("lost_at", [2.98, 3.0])  # while the replies are on their way; before
def test_peers_that_are_all_away_for_a_while_go_on(sealing: str, lost_at: float) -> None:
    away = World(samples_per_s=100, offline={site: [(lost_at, 20.0)] for site in range(3)})
    found = run(away, strategy="dmsgd", num_sites=3, epochs=8, timeout_s=30.0, wire={"sealing": sealing})
    assert found.finished
    assert found.history["accuracy"].iloc[-1] > 0.7


@pytest.mark.parametrize("engine", ["app", "batched"])
def test_epochs_add_up_whenever_peers_are_tested(engine: str) -> None:
    found = run(engine=engine, strategy="d-psgd", num_sites=3, epochs=1, results={"evaluate_every": 7})
    rows = found.metrics.query("metric == 'local-epochs'")
    assert list(rows["value"]) == pytest.approx([7 / 15, 7 / 15, 1 / 15])
    with pytest.raises(RunError, match="local-steps = 1000: epochs = 1 have 15 batches; at most these"):
        run(engine=engine, strategy="d-psgd", num_sites=3, epochs=1, d_psgd={"local_steps": 1000})


def test_batched_run_that_diverges_says_so() -> None:
    with pytest.raises(RunError, match=r"exchange \d+: training diverged: the models of the sites \[0, 1, 2, 3\] are not finite"):
        run(engine="batched", strategy="d-psgd", training={"lr": 1e6})


def test_peer_that_remembers_nothing_is_named(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("flwr").propagate = True

    def forget(number: int, message: Message, reply: Message) -> Message:
        if number == 1 and config_of(message).get("server-round") == 5:
            list(grids[0].contexts.values())[1].state = RecordDict()
            return Message(Error(5, "no heartbeat"), reply_to=message)
        return reply

    config = small(strategy="dmsgd")
    grids = [VirtualGrid(client_app, World().sites(4, 1), config.flat(), forget)]
    run_server(grids[0], config, History(config))
    assert "site 1 is back, remembers nothing of this run and starts anew" in caplog.text


def test_peer_that_fails_every_time_costs_the_others_little(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("flwr").propagate = True

    def fail(number: int, message: Message, reply: Message) -> Message:
        if number == 1 and message.metadata.message_type == "train.peer":
            reply.content.metric_records["metrics"]["num-examples"] = 0
        return reply

    _, history = watched(fail, strategy="d-psgd", epochs=6)
    assert history.metrics.query("site == '1' and metric == 'accuracy'").empty
    assert len(history.metrics.query("site == '0' and metric == 'accuracy'")) == 6
    assert caplog.text.count("site 1 (site 1) is left out") < 12  # it is called ever less often


def test_peers_that_all_fail_stop_the_run_at_once() -> None:
    def fail(number: int, message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train.peer":
            reply.content.metric_records["metrics"]["num-examples"] = 0
        return reply

    with pytest.raises(RunError, match=r"and no others will, .* stopped\. site 0, site 1, site 2, site 3: num-examples is 0"):
        watched(fail, strategy="d-psgd")


def test_too_few_peers_stop_the_run_after_the_timeout() -> None:
    dead = World(samples_per_s=100, offline={site: [(10.0, math.inf)] for site in (0, 1, 2)})
    with pytest.raises(RunError, match="1 peers go on after patience-s = 50, min-sites = 2: stopped"):
        run(dead, strategy="dmsgd", epochs=30, timeout_s=50.0, patience_s=50.0)


def test_silent_neighbours_weight_goes_to_the_peer_itself() -> None:
    """Peer 1 is never heard: on a path of three, the other two go on as if they were alone."""

    def mute(number: int, message: Message, reply: Message) -> Message | None:
        return None if number == 1 and message.metadata.message_type == "train.peer" else reply

    _, history = watched(mute, strategy="d-psgd", num_sites=3, topology={"name": "path"}, epochs=2, timeout_s=30.0)
    both = history.models
    _, alone = watched(
        mute, strategy="d-psgd", num_sites=3, topology={"name": "path", "averaging_rate": 0.001}, epochs=2, timeout_s=30.0
    )
    for name in ("model-0", "model-2"):
        for key, value in both[name].items():
            torch.testing.assert_close(value, alone.models[name][key])


def spoil(what: str) -> Tamper:
    """Something wrong with what peer 1 offers, or with how the relay delivers it."""
    seen: dict[str, Array] = {}

    def tamper(number: int, message: Message, reply: Message) -> Message:
        arrays = reply.content.get("arrays") if not reply.has_error() else None
        if number != 1 or message.metadata.message_type != "train.peer" or not isinstance(arrays, ArrayRecord):
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
            arrays[name] = Array(arrays[name].dtype, arrays[name].shape, arrays[name].stype, bytes(data))
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
    import re

    logging.getLogger("flwr").propagate = True
    _, history = watched(spoil(what), strategy="d-psgd", epochs=2, **settings)
    assert re.search(message, caplog.text)
    assert "site 0 refuses what came from site 1" in caplog.text
    assert "site 2 refuses what came from site 1" in caplog.text
    assert "refuses what came from site 3" not in caplog.text
    assert history.metrics.query("metric == 'accuracy'")["value"].notna().all()


def test_payload_delivered_twice_is_refused() -> None:
    """A relay that turned bad: it delivers the payload of a step again under the same, valid, header."""
    delivered: list[ArrayRecord] = []
    refused: list[str] = []

    def replay(message: Message) -> None:
        record = message.content.get("from-1")
        if isinstance(record, ArrayRecord):
            delivered.append(record)
            message.content["from-1"] = delivered[0]

    def look(number: int, message: Message, reply: Message) -> Message:
        if not reply.has_error():
            told: Any = config_of(reply).get("refused", ())
            refused.extend(told)
        return reply

    config = small(strategy="d-psgd", **SEALED)
    grid = Between(client_app, World().sites(4, 1), config.flat(), look)
    grid.change = replay
    run_server(grid, config, History(config))
    assert "site 1: step 0 came before" in refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "dmsgd", "topology.name": "torus"}, "num-sites = 4 is no product of two numbers"),
        ({"strategy": "dmsgd", "topology.name": "star", "topology.mixing": "uniform"}, "not doubly stochastic"),
        ({"strategy": "dmsgd", "topology.name": "edges", "topology.edges": "/nowhere"}, "edges = '/nowhere'"),
        (
            {"strategy": "dmsgd", "topology.name": "bipartite", "num_sites": 8, "dmsgd.consensus-weight": 1.0},
            "dmsgd.momentum = 0.5, dmsgd.consensus-weight = 1: disagreement grows by 1.16",
        ),
    ],
)
def test_topology_that_cannot_be_stops_before_the_first_message(changes: dict[str, Any], message: str) -> None:
    sent: list[Message] = []
    config = small(**changes)
    grid = Between(client_app, World().sites(4, 1), config.flat())
    grid.change = sent.append
    with pytest.raises(TopologyError, match=message):
        run_server(grid, config, History(config))
    assert sent == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "q-saddle", "q-saddle.rho": 0.0}, "q-saddle.rho = 0.0: must be greater than 0"),
        ({"strategy": "dmsgd", "num_sites": 1, "min_sites": 1}, "num-sites = 1: dmsgd needs peers to exchange with; at least 2"),
        ({"strategy": "dmsgd", "wire.codec": "top-k"}, "error-feedback = 'none': codec = 'top-k' loses what it leaves out"),
        (
            {"strategy": "gradient-tracking", "wire.codec": "qsgd"},
            "wire.codec = 'qsgd': gradient-tracking would carry on every error",
        ),
        ({"strategy": "ngm", "ngm.local-steps": 2}, "ngm.local-steps = 2: unknown key"),
        (
            {"strategy": "qgm", "wire.codec": "qsgd", "wire.error-feedback": "choco", "topology.name": "one-peer-exponential"},
            "error-feedback = 'choco': neighbours change",
        ),
        (
            {"strategy": "qgm", "wire.codec": "qsgd", "wire.error-feedback": "choco", "topology.name": "matching"},
            "error-feedback = 'choco': neighbours change",
        ),
        (
            {"strategy": "dmsgd", "training.optimizer": "adamw"},
            "training.optimizer = 'adamw': has no effect with strategy = 'dmsgd'",
        ),
        (
            {"strategy": "ngm", "topology.name": "exponential"},
            "topology.name = 'exponential': gradients go back where models came from",
        ),
        (
            {"strategy": "n-saddle", "n-saddle.rho": 0.05, "n-saddle.perturbed-by": "owner-of-model", "wire.codec": "fp16"},
            "wire.codec = 'fp16': n-saddle.perturbed-by = 'owner-of-model' needs wire.codec = 'identity'",
        ),
        ({"strategy": "dmsgd", "wire.bits": 3}, "wire.bits = 3: must be 2, 4, 8 or 16"),
        ({"strategy": "dmsgd", "topology.name": "circle"}, "topology.name = 'circle': allowed: ring"),
    ],
)
def test_what_does_not_go_together_is_an_error_that_names_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(**changes)


def test_engine_of_the_laboratory_is_checked() -> None:
    with pytest.raises(ConfigError, match="engine = 'batched': runs peers"):
        run(strategy="fedavg", engine="batched")
    with pytest.raises(ConfigError, match="engine = 'batched': knows no world"):
        run(World(), strategy="dmsgd", engine="batched")
    with pytest.raises(ConfigError, match="engine = 'ray': allowed: 'app', 'batched'"):
        run(strategy="dmsgd", engine="ray")
    with pytest.raises(ConfigError, match=r"norm = 'batch': engine = 'batched' takes no BatchNorm"):
        run(strategy="dmsgd", engine="batched", model={"name": "resnet20"}, data={"source": "tests.equivalence.test_averaging:few"})


def test_batch_norm_statistics_are_averaged_with_the_models() -> None:
    found = run(
        strategy="dmsgd", model={"name": "resnet20"}, data={"source": "tests.equivalence.test_averaging:few"}, num_sites=2, epochs=1
    )
    means = [model["stem.1.running_mean"] for model in found.models.values()]
    assert not torch.equal(means[0], torch.zeros(16))
    torch.testing.assert_close(means[0], means[1])  # two peers with weights 1/2 agree after each exchange


def test_results_show_the_graph_the_worst_peer_and_every_link(run_app: RunApp, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_app(strategy="dmsgd", num_sites=4, topology={"name": "path"}, epochs=2, draw=True)
    assert imread(found.folder / "topology.png").shape[0] > 200
    assert not (found.folder / "schedule.png").exists()
    assert {file.name for file in found.folder.glob("model*")} == {f"model-{site}.safetensors" for site in range(4)}
    printed = capsys.readouterr().out
    assert "exchange    24 | epoch 2/2 | lr" in printed
    assert "worst 0." in printed
    assert "apart " in printed
    assert "dmsgd after 24 exchanges" in printed
    assert "the mean of all models: accuracy" in printed
    links = found.metrics.query("split == 'links'")
    assert {(row.site, row.metric) for row in links.itertuples()} == {
        ("0", "bytes-to-1"),
        ("1", "bytes-to-0"),
        ("1", "bytes-to-2"),
        ("2", "bytes-to-1"),
        ("2", "bytes-to-3"),
        ("3", "bytes-to-2"),
    }
    parameters = sum(value.numel() for value in Run.load(found.folder).models["model-0"].values())
    # 24 exchanges of model and momentum, 128 bytes of a header each.
    assert set(links["value"]) == {24 * 2 * (4 * parameters + 128)}
    assert found.trace("accuracy-worst")[-1] <= found.trace("accuracy")[-1] <= found.trace("accuracy-best")[-1]


def test_site_writes_its_model_into_the_file_that_it_names(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    config = small(strategy="dmsgd", **SEALED)
    grid = VirtualGrid(client_app, World().sites(4, 1), config.flat())
    for number, context in enumerate(grid.contexts.values()):
        context.node_config["save"] = str(tmp_path / f"site-{number}" / "model.safetensors")
    run_server(grid, config, History(config))
    models = [load_file(tmp_path / f"site-{number}" / "model.safetensors") for number in range(4)]
    expected = run(strategy="dmsgd").models
    for number, model in enumerate(models):
        assert all(torch.equal(model[name], value) for name, value in expected[f"model-{number}"].items())


def test_site_with_keys_takes_part_in_sealed_runs_only(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="sealing = 'off': this site has peer-keys and takes part in sealed runs only"):
        deployed(small(strategy="dmsgd"), write_keys(tmp_path / "keys"))


def test_sealed_peers_keep_their_models_whatever_the_server_asks_for() -> None:
    def ask_for_all(message: Message) -> None:
        fields = config_of(message)
        if "listeners" in fields:
            fields["listeners"] = [0, 1, 2, 3]

    handed: list[str] = []
    wrapped: set[tuple[int, str]] = set()

    def look(number: int, message: Message, reply: Message) -> Message:
        if not reply.has_error():
            handed.extend(reply.content)
            wrapped.update((number, name) for name in arrays_of(reply) if name.endswith("/key"))
        return reply

    for sealing, expected in (("off", True), ("trust-on-first-use", False)):
        handed.clear()
        config = small(strategy="dmsgd", epochs=1, wire={"sealing": sealing})
        grid = Between(client_app, World().sites(4, 1), config.flat(), look)
        grid.change = ask_for_all
        run_server(grid, config, History(config))
        assert ("model" in handed) is expected
    # A content key for each neighbour on the ring, and for nobody else.
    assert wrapped == {(peer, f"to-{(peer + side) % 4}/key") for peer in range(4) for side in (1, -1)}


def deployed(config: Config, nodes: Iterable[dict[str, Any]]) -> History:
    """A run of sites with such a ``--node-config``."""
    grid, history = VirtualGrid(client_app, World().sites(config.num_sites, 1), config.flat()), History(config)
    for context, node in zip(grid.contexts.values(), nodes, strict=True):
        context.node_config = dict(node)
    run_server(grid, config, history)
    return history


def test_keys_of_files_seal_a_run(tmp_path: Path) -> None:
    nodes = write_keys(tmp_path / "keys")
    config = small(strategy="dmsgd", epochs=2, wire={"sealing": "keys"})
    sealed = deployed(config, nodes)
    plain = deployed(small(strategy="dmsgd", epochs=2), [{"site": node["site"], "data": ""} for node in nodes])
    found = (history.metrics.query("metric == 'accuracy' and site == 'all'")["value"].tolist() for history in (sealed, plain))
    assert next(found) == next(found)

    listed = (tmp_path / "keys" / "peers.toml").read_text().splitlines()
    (tmp_path / "few.toml").write_text("\n".join(listed[:3]))
    few = [node | {"peer-keys": str(tmp_path / "few.toml")} for node in nodes]
    with pytest.raises(RunError, match=r"few.toml': no keys of the neighbours \[3\]"):
        deployed(config.model_copy(update={"min_sites": 4}), few)


CHOCO: dict[str, Any] = {"wire.codec": "qsgd", "wire.error-feedback": "choco", "topology.averaging-rate": 0.5}


@pytest.mark.parametrize(
    ("strategy", "seed", "timeout_s"), [("qgm", 2, 5.0), ("qgm", 3, 600.0), ("n-saddle", 1, 30.0), ("d-psgd", 4, 5.0)]
)
def test_hats_are_never_wrong_whoever_comes_and_goes(strategy: str, seed: int, timeout_s: float) -> None:
    """CHOCO: what a reader has of a neighbour that it mixes with is what that neighbour thinks it has, at the same step."""
    hats: dict[tuple[int, int], torch.Tensor] = {}
    compared = 0

    class Looking(VirtualGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            pushed = list(messages)
            identities = super().push_messages(pushed)
            for message in pushed:
                self.look(message.metadata.dst_node_id)
            return identities

        def look(self, node: int) -> None:
            nonlocal compared
            known = recall(self.contexts[node], algorithm, torch.device("cpu"))
            if known and known.memories:
                hats[node - 1000, known.offered] = known.memories[0].clone()
            for sender, hat in known.hats.items() if known else ():
                if (sender, hat.step) in hats:
                    compared += 1
                    torch.testing.assert_close(hat.vectors[0], hats[sender, hat.step], rtol=0, atol=0)

    config = small(strategy=strategy, min_sites=1, seed=seed, timeout_s=timeout_s, **CHOCO)
    assert isinstance(config.plan, PeerPlan)
    algorithm = type(config.plan.algorithm.init(torch.zeros(1)))
    world = World(samples_per_s=100, mean_up_s=30, mean_down_s=20)
    run_server(Looking(client_app, world.sites(4, seed), config.flat()), config, History(config))
    assert compared > 150


def test_refused_difference_is_made_good_by_a_fresh_start(caplog: pytest.LogCaptureFixture) -> None:
    """One changed bit at step 5: the neighbours leave the sender out until it starts anew, and then hear it again."""
    logging.getLogger("flwr").propagate = True

    def spoil_once(number: int, message: Message, reply: Message) -> Message:
        arrays = reply.content.get("arrays") if not reply.has_error() else None
        if number == 1 and isinstance(arrays, ArrayRecord) and config_of(message).get("server-round") == 5:
            for name in [name for name in arrays if name.endswith("sealed")]:
                data = bytearray(arrays[name].data)
                data[-1] ^= 1
                arrays[name] = Array(arrays[name].dtype, arrays[name].shape, arrays[name].stype, bytes(data))
        return reply

    _, history = watched(spoil_once, strategy="qgm", epochs=4, **CHOCO, **SEALED)
    assert caplog.text.count("refuses what came from site 1") in (2, 3, 4)  # both neighbours, once or twice
    assert history.metrics.query("metric == 'accuracy' and site == 'all'")["value"].iloc[-1] > 0.3


@pytest.mark.parametrize(
    ("settings", "part", "wrong"),
    [
        (
            {"wire.codec": "top-k", "wire.error-feedback": "deep-squeeze", "topology.averaging-rate": 0.5},
            "places",
            np.full(481, 10**8, np.int32),
        ),
        (
            {"wire.codec": "sign", "wire.error-feedback": "deep-squeeze", "topology.averaging-rate": 0.2},
            "signs",
            np.ones(602, np.float32),
        ),
        ({"strategy": "ngm"}, "values", np.ones(3, np.float32)),
        (
            {"strategy": "n-saddle", "n-saddle.rho": 0.05, "n-saddle.perturbed-by": "owner-of-model"},
            "shift",
            np.ones(7, np.float32),
        ),
    ],
    ids=["places", "signs", "gradient", "shift"],
)
def test_malformed_payload_costs_its_sender_not_the_readers(
    settings: dict[str, Any], part: str, wrong: Any, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("flwr").propagate = True

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
    assert history.metrics.query("metric == 'accuracy' and site == 'all'")["value"].tolist() == list(
        run(strategy="d-psgd").history["accuracy"]
    )


def test_sites_that_do_not_take_part_must_not_cut_the_graph() -> None:
    world = World(offline={0: [(0.0, math.inf)]})
    with pytest.raises(RunError, match=r"the peers fall into parts: \[1\], \[2\], \[3\]"):
        run(world, strategy="d-psgd", topology={"name": "star"}, timeout_s=30.0)


def test_training_is_reported_alike_by_both_engines() -> None:
    relay, batched = (run(engine=engine, strategy="dmsgd", epochs=3).metrics for engine in ("app", "batched"))
    for metric in ("loss", "lr-first", "lr-last"):
        one, two = (
            each.query(f"metric == '{metric}' and site == 'all' and split == 'train'")["value"] for each in (relay, batched)
        )
        np.testing.assert_allclose(one, two, rtol=1e-5)
