"""Peers that come late, go, forget, fail or die, and what becomes of the others."""

import math
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Error, Message, RecordDict

from client_app.app import app as client_app
from client_app.memory import load_peer_state
from client_app.oracle import _orders
from client_app.site import network_of
from datasets import sources
from server_app.app import run as run_server
from server_app.discovery import RunError
from server_app.results import History
from simulation.grid import VirtualGrid
from simulation.world import World
from strategies.method import PeerPlan
from strategies.records import config_of
from tests.app.peers import CHOCO, SEALED, accuracy, run, small, watched


def test_state_survives_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A site's memory is dropped before each message: only ``context.state`` remains."""
    looks = count()
    # Its examples are read again where its files seem to have changed.
    monkeypatch.setattr(sources, "fingerprint", lambda source, path: str(next(looks)))

    def forget(number: int, message: Message, reply: Message) -> Message:
        for cached in (network_of, _orders):
            cached.cache_clear()
        return reply

    for changes in (
        {"strategy": "dmsgd"},
        {"strategy": "qgm", **CHOCO},
    ):
        _, history = watched(forget, **changes, epochs=1)
        assert (
            history.metrics.query("metric == 'accuracy'")["value"].tolist()
            == run(**changes, epochs=1).metrics.query("metric == 'accuracy'")["value"].tolist()
        )


def test_state_on_disk_survives_the_supernode(tmp_path: Path) -> None:
    """What Flower holds of site 2 is gone before each message, as after its SuperNode's restart."""
    changes: dict[str, Any] = {"strategy": "qgm", "epochs": 2, **CHOCO, **SEALED}
    config = small(**changes)
    folder, modes = tmp_path / "of" / "site-2", set[int]()

    def accuracies(settings: dict[str, str]) -> list[float]:
        def forget(number: int, message: Message, reply: Message) -> Message:
            context_of_site_2().state = RecordDict()
            modes.update(path.stat().st_mode & 0o777 for path in folder.glob("*"))
            return reply

        def context_of_site_2() -> Context:
            return list(grid.contexts.values())[2]

        grid, history = (
            VirtualGrid(client_app, World().sites(4, 1), config.flat(), forget),
            History(config),
        )
        context_of_site_2().node_config |= settings
        run_server(grid, config, history)
        found: list[float] = history.metrics.query("metric == 'accuracy' and site == '2'")[
            "value"
        ].tolist()
        return found

    undisturbed = (
        run(**changes).metrics.query("metric == 'accuracy' and site == '2'")["value"].tolist()
    )
    assert accuracies({"state": str(folder)}) == undisturbed
    # Until the next run: while the last answer was on its way, the server might have been killed.
    assert sorted(path.name for path in folder.iterdir()) == ["1-2.before", "1-2.ended"]
    assert modes == {0o600}
    assert accuracies({}) != undisturbed


@pytest.mark.parametrize("wrong", ["a file", "no state"])
def test_state_that_cannot_be_used_is_named_before_any_work(
    wrong: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
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


def test_peer_that_remembers_nothing_is_named(caplog: pytest.LogCaptureFixture) -> None:

    def forget(number: int, message: Message, reply: Message) -> Message:
        if number == 1 and config_of(message).get("server-round") == 5:
            list(grids[0].contexts.values())[1].state = RecordDict()
            return Message(Error(5, "no heartbeat"), reply_to=message)
        return reply

    config = small(strategy="dmsgd")
    grids = [VirtualGrid(client_app, World().sites(4, 1), config.flat(), forget)]
    run_server(grids[0], config, History(config))
    assert "site 1 is back, has lost its memory of this run and starts again" in caplog.text


@pytest.mark.parametrize("strategy", ["d-psgd", "dmsgd", "n-saddle"])
def test_peer_that_dies_is_not_waited_for(strategy: str) -> None:
    found = run(
        World(samples_per_s=100, offline={2: [(6.0, math.inf)]}), strategy=strategy, epochs=6
    )
    assert found.finished
    assert len(accuracy(found, 2)) < len(accuracy(found, 0)) == 6
    assert found.history["accuracy"].iloc[-1] > 0.6
    assert "model-2" not in found.models
    assert len(found.models) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "dmsgd"},
        {"strategy": "q-saddle", **CHOCO, **SEALED},
        {"strategy": "n-saddle", **CHOCO, "wire.cross-codec": "sign"},
    ],
    ids=["dmsgd", "choco, sealed", "n-saddle, choco"],
)
@pytest.mark.slow
def test_peer_that_comes_back_rejoins_with_its_state(
    changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
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


def test_each_exchange_is_tested_once_though_a_peer_comes_late() -> None:
    late = World(samples_per_s=100, offline={2: [(1.0, 2.0)]})
    found = run(
        late, strategy="d-psgd", num_sites=3, epochs=1, results={"evaluate_every": 1}, timeout_s=3.0
    )
    assert list(found.history["round"]) == list(range(1, 16))


@pytest.mark.parametrize("sealing", ["off", "trust-on-first-use"])
@pytest.mark.parametrize("lost_at", [2.98, 3.0])  # while the replies are on their way; before
def test_peers_that_are_all_away_for_a_while_go_on(sealing: str, lost_at: float) -> None:
    away = World(samples_per_s=100, offline={site: [(lost_at, 20.0)] for site in range(3)})
    found = run(
        away, strategy="dmsgd", num_sites=3, epochs=8, timeout_s=30.0, wire={"sealing": sealing}
    )
    assert found.finished
    assert found.history["accuracy"].iloc[-1] > 0.7


def test_peer_that_fails_every_time_costs_the_others_little(
    caplog: pytest.LogCaptureFixture,
) -> None:

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

    with pytest.raises(
        RunError,
        match=r"and no others will, .* stopped\. site 0, site 1, site 2, site 3: num-examples is 0",
    ):
        watched(fail, strategy="d-psgd")


def test_too_few_peers_stop_the_run_after_the_timeout() -> None:
    dead = World(samples_per_s=100, offline={site: [(10.0, math.inf)] for site in (0, 1, 2)})
    with pytest.raises(
        RunError, match="1 peers go on after patience-s = 50, min-sites = 2: stopped"
    ):
        run(dead, strategy="dmsgd", epochs=30, timeout_s=50.0, patience_s=50.0)


def test_silent_neighbours_weight_goes_to_the_peer_itself() -> None:
    """Peer 1 is never heard: on a path of three, the other two go on as if they were alone."""

    def mute(number: int, message: Message, reply: Message) -> Message | None:
        return None if number == 1 and message.metadata.message_type == "train.peer" else reply

    _, history = watched(
        mute, strategy="d-psgd", num_sites=3, topology={"name": "path"}, epochs=2, timeout_s=30.0
    )
    both = history.models
    _, alone = watched(
        mute,
        strategy="d-psgd",
        num_sites=3,
        topology={"name": "path", "averaging_rate": 0.001},
        epochs=2,
        timeout_s=30.0,
    )
    for name in ("model-0", "model-2"):
        for key, value in both[name].items():
            torch.testing.assert_close(value, alone.models[name][key])


def test_sites_that_do_not_take_part_must_not_cut_the_graph() -> None:
    world = World(offline={0: [(0.0, math.inf)]})
    with pytest.raises(RunError, match=r"the peers fall into parts: \[1\], \[2\], \[3\]"):
        run(world, strategy="d-psgd", topology={"name": "star"}, timeout_s=30.0)


@pytest.mark.parametrize(
    ("strategy", "seed", "timeout_s"),
    [("qgm", 2, 5.0), ("qgm", 3, 600.0), ("n-saddle", 1, 30.0), ("d-psgd", 4, 5.0)],
)
def test_hats_are_never_wrong_whoever_comes_and_goes(
    strategy: str, seed: int, timeout_s: float
) -> None:
    """CHOCO: what a reader has of a neighbour is what that neighbour thinks it has.

    For each neighbour that it mixes with, at the same step.
    """
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
            known = load_peer_state(self.contexts[node], algorithm, torch.device("cpu"))
            if known and known.memories:
                hats[node - 1000, known.offered] = known.memories[0].clone()
            for sender, hat in known.hats.items() if known else ():
                if (sender, hat.step) in hats:
                    compared += 1
                    torch.testing.assert_close(
                        hat.vectors[0], hats[sender, hat.step], rtol=0, atol=0
                    )

    config = small(strategy=strategy, min_sites=1, seed=seed, timeout_s=timeout_s, **CHOCO)
    assert isinstance(config.plan, PeerPlan)
    algorithm = type(config.plan.algorithm.init(torch.zeros(1)))
    world = World(samples_per_s=100, mean_up_s=30, mean_down_s=20)
    run_server(Looking(client_app, world.sites(4, seed), config.flat()), config, History(config))
    assert compared > 150
