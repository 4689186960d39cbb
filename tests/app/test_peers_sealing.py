"""Sealed peers: the numbers of open ones, and no model for the server."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from client_app.app import app as client_app
from configuration.config import Config
from server_app.app import run as run_server
from server_app.discovery import RunError
from server_app.results import History
from simulation.grid import VirtualGrid
from simulation.world import World
from strategies.records import arrays_of, config_of
from tests.app.peers import CHOCO, SEALED, Between, run, small
from tests.data import write_keys


def deployed(config: Config, nodes: Iterable[dict[str, Any]]) -> History:
    """A run of sites with such a ``--node-config``."""
    grid, history = (
        VirtualGrid(client_app, World().sites(config.num_sites, 1), config.flat()),
        History(config),
    )
    for context, node in zip(grid.contexts.values(), nodes, strict=True):
        context.node_config = dict(node)
    run_server(grid, config, history)
    return history


@pytest.mark.slow
def test_sealing_changes_no_number_and_keeps_models_from_the_server() -> None:
    changes: dict[str, Any] = {"strategy": "q-saddle", "epochs": 2, **CHOCO}
    open_, sealed = run(**changes), run(**changes, **SEALED)
    assert list(open_.history["accuracy"]) == list(sealed.history["accuracy"])
    assert sealed.models == {}
    assert sealed.metrics.query("split == 'consensus'").empty
    coded: dict[str, Any] = {"strategy": "ngm", "wire.cross-codec": "sign", "epochs": 2}
    assert list(run(**coded, **SEALED).history["accuracy"]) == list(
        run(**coded).history["accuracy"]
    )


def test_site_with_keys_takes_part_in_sealed_runs_only(tmp_path: Path) -> None:
    with pytest.raises(
        RunError,
        match="sealing = 'off': this site has peer-keys and takes part in sealed runs only",
    ):
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
    assert wrapped == {
        (peer, f"to-{(peer + side) % 4}/key") for peer in range(4) for side in (1, -1)
    }


def test_keys_of_files_seal_a_run(tmp_path: Path) -> None:
    nodes = write_keys(tmp_path / "keys")
    config = small(strategy="dmsgd", epochs=2, wire={"sealing": "keys"})
    sealed = deployed(config, nodes)
    plain = deployed(
        small(strategy="dmsgd", epochs=2), [{"site": node["site"], "data": ""} for node in nodes]
    )
    found = (
        history.metrics.query("metric == 'accuracy' and site == 'all'")["value"].tolist()
        for history in (sealed, plain)
    )
    assert next(found) == next(found)

    listed = (tmp_path / "keys" / "peers.toml").read_text().splitlines()
    (tmp_path / "few.toml").write_text("\n".join(listed[:3]))
    few = [node | {"peer-keys": str(tmp_path / "few.toml")} for node in nodes]
    with pytest.raises(RunError, match=r"few.toml': no keys of the neighbours \[3\]"):
        deployed(config.model_copy(update={"min_sites": 4}), few)
