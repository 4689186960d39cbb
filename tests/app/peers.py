"""Small runs of peers, and who looks at their messages or changes them."""

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Message

from client_app.app import app as client_app
from configuration.config import Config, configuration
from server_app.app import run as run_server
from server_app.results import History
from simulation.grid import VirtualGrid
from simulation.laboratory import Run, simulate
from simulation.world import World
from tests.conftest import own

SMALL: dict[str, Any] = {
    "num_sites": 4,
    "epochs": 4,
    "model.name": "mlp",
    "training.lr": 0.05,
    "progress": False,
}
SEALED: dict[str, Any] = {"wire.sealing": "trust-on-first-use"}
CHOCO: dict[str, Any] = {
    "wire.codec": "qsgd",
    "wire.error-feedback": "choco",
    "topology.averaging-rate": 0.5,
}
Tamper = Callable[[int, Message, Message], Message | None]


def small(**changes: Any) -> Config:
    """The configuration of :func:`run`."""
    half = own(changes.get("strategy", "dmsgd"), momentum=0.5)
    return configuration(
        **{key: value for key, value in (SMALL | half | changes).items() if key != "progress"}
    )


def run(world: World | None = None, engine: str = "app", **changes: Any) -> Run:
    half = own(changes.get("strategy", "co-learning"), momentum=0.5)
    return simulate(**(SMALL | half | changes), world=world, engine=engine)


def accuracy(found: Run, site: int) -> list[float]:
    rows = found.metrics.query("metric == 'accuracy' and split == 'test'")
    return [float(value) for value in rows[rows["site"] == str(site)]["value"]]


class Between(VirtualGrid):
    """Messages pass through ``change`` on their way to a site."""

    change: Callable[[Message], None]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        passed = list(messages)
        for message in passed:
            self.change(message)
        return super().push_messages(passed)


def watched(
    tamper: Tamper | None, world: World | None = None, **changes: Any
) -> tuple[VirtualGrid, History]:
    """Run peers, with all messages passed to ``tamper``."""
    config = small(**changes)
    history = History(config)
    grid = VirtualGrid(
        client_app, (world or World()).sites(config.num_sites, config.seed), config.flat(), tamper
    )
    run_server(grid, config, history)
    return grid, history
