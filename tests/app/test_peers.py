"""Peers: the real ServerApp and ClientApp over the relay, and what their runs leave."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Message
from matplotlib.image import imread
from safetensors.torch import load_file

from client_app.app import app as client_app
from configuration.errors import ConfigError
from server_app import relay as relay_module
from server_app.app import run as run_server
from server_app.results import History
from simulation.grid import VirtualGrid
from simulation.laboratory import Run
from simulation.world import World
from strategies.records import arrays_of, config_of
from strategies.topology import TopologyError
from tests.app.peers import SEALED, Between, run, small, watched
from tests.conftest import RunApp


def test_same_seed_same_history_and_seeds_differ() -> None:
    one, two, other = (run(strategy="dmsgd", epochs=1, seed=seed) for seed in (1, 1, 2))
    assert one.metrics.equals(two.metrics)
    assert not one.metrics.equals(other.metrics)


def test_relay_does_no_arithmetic_on_payloads() -> None:
    """It imports neither torch nor numpy; what it delivers is, byte for byte, what was offered."""
    source = ast.parse(Path(relay_module.__file__).read_text())
    imported = {
        alias.name if isinstance(node, ast.Import) else str(node.module)
        for node in ast.walk(source)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert not any(name.split(".")[0] in ("torch", "numpy") for name in imported)
    assert not {"unpack", "pack", "arrays"} & {
        alias.name
        for node in ast.walk(source)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
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
    """On a path the last peer is slow.

    When it has taken its first steps, the first one is some steps ahead, not one.
    """
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"strategy": "dmsgd", "topology.name": "torus"},
            "num-sites = 4 is no product of two numbers",
        ),
        (
            {"strategy": "dmsgd", "topology.name": "star", "topology.mixing": "uniform"},
            "not doubly stochastic",
        ),
        (
            {"strategy": "dmsgd", "topology.name": "edges", "topology.edges": "/nowhere"},
            "edges = '/nowhere'",
        ),
        (
            {
                "strategy": "dmsgd",
                "topology.name": "bipartite",
                "num_sites": 8,
                "dmsgd.consensus-weight": 1.0,
            },
            "dmsgd.momentum = 0.5, dmsgd.consensus-weight = 1: disagreement grows by 1.16",
        ),
    ],
)
def test_topology_that_cannot_be_stops_before_the_first_message(
    changes: dict[str, Any], message: str
) -> None:
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
        (
            {"strategy": "q-saddle", "q-saddle.rho": 0.0},
            "q-saddle.rho = 0.0: must be greater than 0",
        ),
        (
            {"strategy": "dmsgd", "num_sites": 1, "min_sites": 1},
            "num-sites = 1: dmsgd needs peers to exchange with; at least 2",
        ),
        (
            {"strategy": "dmsgd", "wire.codec": "top-k"},
            "error-feedback = 'none': codec = 'top-k' loses what it leaves out",
        ),
        (
            {"strategy": "gradient-tracking", "wire.codec": "qsgd"},
            "wire.codec = 'qsgd': gradient-tracking would carry on every error",
        ),
        ({"strategy": "ngm", "ngm.local-steps": 2}, "ngm.local-steps = 2: unknown key"),
        (
            {
                "strategy": "qgm",
                "wire.codec": "qsgd",
                "wire.error-feedback": "choco",
                "topology.name": "one-peer-exponential",
            },
            "error-feedback = 'choco': neighbours change",
        ),
        (
            {
                "strategy": "qgm",
                "wire.codec": "qsgd",
                "wire.error-feedback": "choco",
                "topology.name": "matching",
            },
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
            {
                "strategy": "n-saddle",
                "n-saddle.rho": 0.05,
                "n-saddle.perturbed-by": "owner-of-model",
                "wire.codec": "fp16",
            },
            (
                "wire.codec = 'fp16': n-saddle.perturbed-by = 'owner-of-model' needs "
                "wire.codec = 'identity'"
            ),
        ),
        ({"strategy": "dmsgd", "wire.bits": 3}, "wire.bits = 3: must be 2, 4, 8 or 16"),
        (
            {"strategy": "dmsgd", "topology.name": "circle"},
            "topology.name = 'circle': allowed: ring",
        ),
    ],
)
def test_what_does_not_go_together_is_an_error_that_names_the_key(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(**changes)


def test_batch_norm_statistics_are_averaged_with_the_models() -> None:
    found = run(
        strategy="dmsgd",
        model={"name": "resnet20"},
        data={"source": "tests.data:few"},
        num_sites=2,
        epochs=1,
    )
    means = [model["stem.1.running_mean"] for model in found.models.values()]
    assert not torch.equal(means[0], torch.zeros(16))
    # Two peers with weights 1/2 agree after each exchange.
    torch.testing.assert_close(means[0], means[1])


def test_results_show_the_graph_the_worst_peer_and_every_link(
    run_app: RunApp, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_app(strategy="dmsgd", num_sites=4, topology={"name": "path"}, epochs=2, draw=True)
    assert imread(found.folder / "topology.png").shape[0] > 200
    assert not (found.folder / "schedule.png").exists()
    assert {file.name for file in found.folder.glob("model*")} == {
        f"model-{site}.safetensors" for site in range(4)
    }
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
    assert (
        found.trace("accuracy-worst")[-1]
        <= found.trace("accuracy")[-1]
        <= found.trace("accuracy-best")[-1]
    )


def test_site_writes_its_model_into_the_file_that_it_names(tmp_path: Path) -> None:
    config = small(strategy="dmsgd", **SEALED)
    grid = VirtualGrid(client_app, World().sites(4, 1), config.flat())
    for number, context in enumerate(grid.contexts.values()):
        context.node_config["save"] = str(tmp_path / f"site-{number}" / "model.safetensors")
    run_server(grid, config, History(config))
    models = [load_file(tmp_path / f"site-{number}" / "model.safetensors") for number in range(4)]
    expected = run(strategy="dmsgd").models
    for number, model in enumerate(models):
        assert all(
            torch.equal(model[name], value) for name, value in expected[f"model-{number}"].items()
        )
