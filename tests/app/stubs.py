"""Sites that answer at once with made-up numbers: the real server, without training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from configuration.config import Config, configuration
from configuration.network import codec_of, down_codec_of, sends_updates
from server_app.app import run
from server_app.events import Event, NewModel, Refused
from server_app.results import Folder, History
from simulation.grid import FIRST_NODE, Call, Tamper, VirtualGrid
from simulation.world import World
from strategies.protocol import (
    CODED,
    Order,
    SiteCard,
    StepMetrics,
    StepNotes,
    TestMetrics,
    TrainMetrics,
    read_model,
    read_order,
    read_peer_order,
    write_card,
    write_tested,
    write_trained,
)
from strategies.records import STATS, X, arrays_of, code_version, config_of, pack, unpack

SITES, TRAIN, TEST, SIZE = 5, 8, 4, 14
NETWORK = "tests.app.stubs:network"
SMALL: dict[str, Any] = {
    "num_sites": SITES,
    "epochs": 2,
    "model": {"name": NETWORK},
    "training": {"batch_size": 4},
}
Answer = RecordDict | Error | None  # None: it is lost
Spoil = Callable[[int, Message, RecordDict], Answer]


def network(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Fourteen parameters and four statistics; as many more for more classes than two."""
    return nn.Sequential(nn.Flatten(), nn.Linear(4, num_classes), nn.BatchNorm1d(num_classes))


class Sites(VirtualGrid):
    """Sites that answer with made-up numbers.

    Args:
        config: the run.
        spoil: what becomes of a site's answer.
        seconds: how long it takes.
        tamper: what becomes of the message that holds it.
    """

    def __init__(
        self,
        config: Config,
        spoil: Spoil = lambda site, message, content: content,
        seconds: Callable[[int, Message], float] = lambda site, message: 1.0,
        tamper: Tamper | None = None,
    ) -> None:
        super().__init__(ClientApp(), World().sites(config.num_sites, 1), {}, tamper)
        self._config, self._spoil, self._seconds = config, spoil, seconds

    def _work(self, call: Call) -> None:
        site, message = call.node - FIRST_NODE, call.message
        answer = self._spoil(site, message, honest(self._config, site, message))
        time = self.now() + self._seconds(site, message)
        if answer is not None:
            self._deliver(call, time, Message(answer, reply_to=message))


def honest(config: Config, site: int, message: Message) -> RecordDict:
    """What a site answers that is as it should be."""
    match message.metadata.message_type:
        case "query.site":
            return write_card(card(config, site))
        case "train":
            return trained(config, read_order(config_of(message)), site, message)
        case "evaluate":
            return write_tested(
                reached(site, 1 if len(arrays_of(message)[X].shape) == 1 else config.num_sites)
            )
        case kind:
            return stepped(config, site, message, kind == "train.cross")


def card(config: Config, site: int) -> SiteCard:
    """The card of a site with two classes of examples of 1 x 2 x 2."""
    trusting = config.wire.sealing == "trust-on-first-use"
    return SiteCard(
        site=site,
        sites=config.num_sites,
        name=f"site {site}",
        classes=["a", "b"],
        columns=[],
        shape=[1, 2, 2],
        train=TRAIN,
        test=TEST,
        notes=[],
        code=code_version(),
        counts=[6, 6],
        public_key=bytes([9] * 32) if trusting else None,
        nonce=bytes(16) if config.wire.sealing != "off" else None,
    )


def noise(site: int, number: int, size: int) -> torch.Tensor:
    """A tenth in each coordinate or so, the same for the same site and message."""
    return torch.randn(size, generator=torch.Generator().manual_seed(1000 * number + site)) / 10


def reached(site: int, models: int = 1) -> TestMetrics:
    """A loss and an accuracy by the site's number."""
    more: dict[str, Any] = {} if models == 1 else {"accuracy_vote": 0.5, "accuracy_single": 0.5}
    return TestMetrics(loss=1.0 + site, accuracy=site % 10 / 10, num_examples=TEST, **more)


def trained(config: Config, order: Order, site: int, message: Message) -> RecordDict:
    """A model a little way off, or that way."""
    assert order.local is not None
    sent = read_model(arrays_of(message), down_codec_of(config.wire))
    size = len(sent[X])
    moved = noise(site, order.number, size)
    made = {X: moved if order.local.delta else sent[X] - moved, STATS: sent[STATS] * 0.9 + 0.1}
    made |= {name: noise(site, -order.number, size) for name in sent if name not in made}
    metrics = TrainMetrics(loss=1.0, lr_first=0.05, lr_last=0.05, num_examples=TRAIN, samples=TRAIN)
    if sends_updates(config.wire):
        classes = len(order.agreed.classes)
        codec = codec_of(config.wire, (4 * classes, classes, classes, classes))
        del made[X]
        made |= {
            f"{CODED}{part}": value
            for part, value in codec.encode(moved, torch.Generator()).items()
        }
    return write_trained(made, metrics, reached(site) if order.test else None)


def stepped(config: Config, site: int, message: Message, cross: bool) -> RecordDict:
    """A peer's answer: it offers what it makes up."""
    order = read_peer_order(config_of(message))
    metrics: dict[str, Any] = {"num_examples": TRAIN, "samples": TRAIN}
    if order.test:
        metrics |= {"test_loss": 1.0 + site, "test_accuracy": site % 10 / 10, "test_examples": TEST}
    if not cross and not order.last:
        metrics |= {"loss": 1.0, "lr_first": 0.05, "lr_last": 0.05}
    names = [f"to-{j}/values" for j in order.neighbours] if cross else ["offer/0.values"]
    classes = len(order.agreed.classes)
    x = noise(site, order.step, 7 * classes)
    arrays = {name: Array(x.numpy()) for name in names if not order.last}
    nonce = None if order.listeners is None else bytes(16)
    notes = StepNotes(refused=[], broken=[], reset=False, lost=False, nonce=nonce)
    content = RecordDict(
        {
            "arrays": ArrayRecord(arrays),
            "metrics": MetricRecord(StepMetrics(**metrics).named()),
            "config": ConfigRecord(notes.named()),
        }
    )
    if order.last and config.wire.collect_models and config.wire.sealing == "off":
        content["model"] = pack({X: x, STATS: torch.ones(2 * classes)})
    return content


class Outcome(History):
    """What a run left behind.

    Attributes:
        refused: what was refused by the server.
        refused_by: what peers say they refused.
        new_models: the models, in the order of their events.
        error: the error that ended it, if one did.
        seconds: how long it took, the discovery included.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.seconds = 0.0
        self.refused: list[Refused] = []
        self.refused_by: list[Refused] = []
        self.new_models: list[dict[str, torch.Tensor]] = []
        self.error: Exception | None = None

    def __call__(self, event: Event) -> None:
        """Store the event."""
        super().__call__(event)
        if isinstance(event, Refused):
            (self.refused_by if event.by else self.refused).append(event)
        if isinstance(event, NewModel):
            self.new_models.append({name: unpack(array) for name, array in event.arrays.items()})

    def model(self) -> dict[str, bytes]:
        """Every byte of the last model."""
        return {name: array.data for name, array in self.arrays.items()}

    def model_of(self, site: int) -> "np.ndarray[Any, Any]":
        """A peer's last model."""
        return unpack(self.arrays[X])[site].numpy()


def outcome(config: Config, *args: Any, **kwargs: Any) -> Outcome:
    """Run the real server over :class:`Sites`."""
    found, grid = Outcome(config), Sites(config, *args, **kwargs)
    try:
        run(grid, config, found)
    except Exception as error:
        found.error = error
    found.seconds = grid.now()
    return found


def config_of_run(tmp_path: Path, **changes: Any) -> Config:
    """Four epochs of FedAvg, with results in ``tmp_path / "runs"``."""
    small: dict[str, Any] = {
        "strategy": "fedavg",
        "fedavg.local-epochs": 1,
        "num_sites": 3,
        "epochs": 4,
    }
    return configuration(
        **small | changes | {"model.name": NETWORK, "results.folder": str(tmp_path / "runs")}
    )


def written(config: Config, spoil: Spoil) -> Folder:
    """Run the real server over :class:`Sites`; the sink that wrote the results."""
    found = Folder(config)
    run(Sites(config, spoil), config, found)
    return found


def only(folder: Path) -> Path:
    """What is in a folder, alone."""
    (found,) = folder.iterdir()
    return found
