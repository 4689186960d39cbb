"""What an operator may get wrong.

And what a server of sealed peers does when a site forgets or tells nothing.
"""

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict

from client_app.app import app as client_app
from configuration.config import configuration
from configuration.flower import TaskIdentity
from server_app.app import run as run_server
from server_app.discovery import RunError
from server_app.results import History
from simulation.grid import VirtualGrid
from simulation.world import World
from strategies.protocol import read_card
from tests.app.stubs import SMALL, outcome
from tests.data import write_keys

# What an operator tells a SuperNode.


def answer(node: dict[str, Any], **changes: Any) -> Message:
    """What a site with such a ``--node-config`` answers in the discovery."""
    # Flower's messages need one.
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = (1, 1, 1)
    settings = dict(configuration(strategy="dmsgd", num_sites=4, **changes).flat())
    return client_app(
        message=Message(RecordDict(), 1000, "query.site"),
        context=Context(1, 1000, node, RecordDict(), settings),
    )


OWN: dict[str, Any] = {"site": 0, "data": ""}
SIMULATED: dict[str, Any] = {"partition-id": 0, "num-partitions": 4}


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (
            OWN | {"private-key": "0.key", "peer_keys": "peers.toml"},
            "peer_keys = 'peers.toml': unknown key; allowed: site, data, name, ",
        ),
        (OWN | {"naem": "Bern"}, "naem = 'Bern': unknown key; allowed: "),
        (OWN | {"stat": "/srv"}, "stat = '/srv': unknown key"),
        (
            OWN | {"private-key": "0.key"},
            (
                "private-key = '0.key': there is no peer-keys; "
                "private-key and peer-keys belong together"
            ),
        ),
        (OWN | {"peer-keys": "p.toml"}, "peer-keys = 'p.toml': there is no private-key"),
        (OWN | {"site": 1.7}, "site = 1.7; allowed: a whole number from 0 to 999999"),
        (OWN | {"site": True}, "site = True; allowed: a whole number"),
        (OWN | {"site": -3}, "site = -3; allowed: a whole number"),
        (OWN | {"site": "0"}, "site = '0'; allowed: a whole number"),
        (OWN | {"name": 3}, 'name = 3; allowed: a text, name="..."'),
        ({"data": "/srv"}, "data = '/srv': there is no site; site and data belong together"),
        (SIMULATED | {"site": 1}, "site = 1: there is no data"),
        ({"partition-id": 0}, "partition-id = 0: there is no num-partitions"),
        (
            SIMULATED | {"private-key": "a", "peer-keys": "b"},
            "private-key = 'a': a site with keys reads no data but its own",
        ),
        (
            {"service": "/run/site.sock", "peer-keys": "p.toml", "private-key": "0.key"},
            "a site with a service says this in its site.toml",
        ),
    ],
)
def test_node_config_that_is_refused(node: dict[str, Any], reason: str) -> None:
    reply = answer(node)
    assert reply.has_error()
    assert reply.error.reason is not None
    assert reply.error.reason.startswith("NodeError: --node-config ")
    assert reason in reply.error.reason


@pytest.mark.parametrize("node", [OWN, SIMULATED, OWN | {"name": "Bern"}, OWN | SIMULATED])
def test_node_config_that_is_good(node: dict[str, Any]) -> None:
    assert read_card(answer(node)).site == 0


def test_a_misspelt_key_ends_the_run_with_words() -> None:
    """What it would have taken part in is an unsealed run."""
    config = configuration(strategy="dmsgd", num_sites=2)
    grid = VirtualGrid(client_app, World().sites(2, 1), config.flat())
    for context in grid.contexts.values():
        context.node_config["peer-key"] = "peers.toml"
    with pytest.raises(RunError, match=r"peer-key = 'peers\.toml': unknown key"):
        run_server(grid, config, History(config))


@pytest.mark.parametrize("keys", [False, True])
def test_a_deployed_site_reads_its_own_data_only(keys: bool, tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text(
        "age,label\n" + "\n".join(f"{age},{age % 2}" for age in range(100))
    )
    (tmp_path / "secret.csv").write_text(
        "diagnosis,label\n" + "\n".join(f"{row},{row % 2}" for row in range(100))
    )
    node = (write_keys(tmp_path / "keys")[0] if keys else OWN) | {"data": str(tmp_path / "own.csv")}
    changes: dict[str, Any] = {
        "model.name": "mlp",
        "data.source": "csv",
        "data.path": str(tmp_path / "secret.csv"),
        "data.label": "label",
    }
    sealing = {"wire.sealing": "keys"} if keys else {}
    assert read_card(answer(node, **changes, **sealing)).columns == ["age"]
    bare = {key: value for key, value in node.items() if key not in ("site", "data")} | SIMULATED
    reply = answer(bare, **changes, **sealing)
    # Without keys it is a site of a simulation, which reads what the run names.
    assert reply.has_error() is keys


# Nonces.


def test_a_site_that_tells_no_nonce_takes_no_part_in_a_sealed_run() -> None:
    def spoil(site: int, message: Message, content: RecordDict) -> RecordDict:
        if site == 1 and message.metadata.message_type == "query.site":
            del content.config_records["config"]["nonce"]
        return content

    config = configuration(
        **SMALL,
        strategy="d-psgd",
        topology={"name": "complete"},
        wire={"sealing": "trust-on-first-use"},
    )
    found = outcome(config, spoil)
    assert found.error is None
    assert set(found.metrics["site"]) >= {"0", "2", "3", "4", "all"}
    assert "1" not in set(found.metrics["site"])


@pytest.mark.parametrize("strategy", ["dmsgd", "n-saddle", "qgm"])
def test_a_site_that_lost_its_memory_goes_on(
    strategy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The real relay passes the new nonce on.

    Neither side misses more than the exchanges that were under way.
    """
    choco: dict[str, Any] = (
        {"codec": "qsgd", "error_feedback": "choco"} if strategy == "qgm" else {}
    )
    rate: dict[str, Any] = {"topology": {"averaging_rate": 0.5}} if choco else {}
    config = configuration(
        strategy=strategy,
        num_sites=4,
        epochs=1,
        model={"name": "mlp"},
        wire={"sealing": "keys"} | choco,
        **rate,
    )
    forgotten: list[int] = []

    def forget(number: int, message: Message, reply: Message) -> Message:
        step = (
            message.content.config_records["config"].get("server-round", -1)
            if "config" in message.content
            else -1
        )
        if number == 1 and step == 6:
            forgotten.append(1)
            list(grid.contexts.values())[1].state = RecordDict()
        return reply

    grid, history = (
        VirtualGrid(client_app, World().sites(4, 1), config.flat(), forget),
        History(config),
    )
    for context, node in zip(grid.contexts.values(), write_keys(tmp_path / "keys"), strict=True):
        context.node_config = node
    run_server(grid, config, history)
    lines = [
        record.getMessage()
        for record in caplog.records
        if "refuses what came from" in record.getMessage()
    ]
    assert forgotten
    expected = [
        f"step {step}: site 1 refuses what came from site {j}" for step in (7, 8) for j in (0, 2)
    ]
    assert [line.partition(": step")[0] for line in lines] == expected
    assert set(history.metrics.query("metric == 'accuracy'")["site"]) == {"0", "1", "2", "3", "all"}
