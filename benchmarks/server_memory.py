"""Memory of the server in models: does it grow with the number of sites?

    python -m benchmarks.server_memory [--sites 3 10 30] [METHOD ...]

The real server, two rounds (of GSGM and its like as many contributions), a network of 10 million
parameters. Sites answer at once; a reply is made when it is pulled: until then the SuperLink keeps
it. What Flower needs to take a reply off the wire, two models for a moment, is not counted here
(``benchmarks.deployment`` counts it).
"""

import argparse
import ctypes
import gc
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from configuration.config import Config, configuration
from configuration.network import codec_of, sends_updates
from server_app.app import run
from server_app.results import History
from simulation.grid import VirtualGrid
from simulation.world import World
from strategies.methods import METHODS
from strategies.protocol import (
    CODED,
    SiteCard,
    TestMetrics,
    TrainMetrics,
    read_order,
    write_card,
    write_tested,
    write_trained,
)
from strategies.records import ARRAYS, X, code_version, config_of

EXAMPLES, SHAPE = 10, (1, 2, 2)  # ten batches
SHOWN = (
    "fedavg",
    "co-learning",
    "diloco",
    "scaffold",
    "FedAdam",
    "FedMedian",
    "gsgm",
    "fedbuff",
    "fedasync",
)
WIRES: dict[str, dict[str, Any]] = {
    "": {},
    "bf16 down, qsgd up": {"down_codec": "bf16", "codec": "qsgd"},
}


def network(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A network of ten million parameters in four layers."""
    inputs, width = torch.Size(shape).numel(), 10_000_000 // 7
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, num_classes)
    )


class Ready(VirtualGrid):
    """All replies are there at once, and each is made when it is pulled.

    Args:
        config: the run.
        sizes: parameters of each layer.
    """

    def __init__(self, config: Config, sizes: tuple[int, ...]) -> None:
        super().__init__(ClientApp(), World().sites(config.num_sites, 1), {})
        self._config, self._sizes = config, sizes
        self._asked: dict[str, Message] = {}
        self._made = _made(config, sizes)  # what every site sends; of which each reply holds a copy

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Store the messages until their replies are pulled."""
        for message in messages:
            self._count += 1
            message.metadata.__dict__["_message_id"] = str(self._count)
            content = RecordDict(
                {name: record for name, record in message.content.items() if name != ARRAYS}
            )
            self._asked[str(self._count)] = Message(metadata=message.metadata, content=content)  # type: ignore[call-overload]
            yield str(self._count)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Make the replies to stored messages."""
        return [
            self._reply(self._asked.pop(identity))
            for identity in message_ids
            if identity in self._asked
        ]

    def _reply(self, message: Message) -> Message:
        site = list(self._sites).index(message.metadata.dst_node_id)
        tested = TestMetrics(loss=1.0, accuracy=0.5, num_examples=EXAMPLES)
        match message.metadata.message_type:
            case "query.site":
                answer = write_card(_card(site, self._config.num_sites))
            case "train":
                metrics = TrainMetrics(
                    loss=1.0, lr_first=0.05, lr_last=0.05, num_examples=EXAMPLES, samples=EXAMPLES
                )
                answer = write_trained(
                    self._made, metrics, tested if read_order(config_of(message)).test else None
                )
            case _:
                answer = write_tested(tested)
        return Message(answer, reply_to=message)


def _made(config: Config, sizes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    moved = torch.full((sum(sizes),), 1e-3)
    beside = dict.fromkeys(getattr(getattr(config.plan, "site", None), "sends", ()), moved)
    if not sends_updates(config.wire):
        return {X: moved, **beside}
    payload = codec_of(config.wire, sizes).encode(moved, torch.Generator())
    return {f"{CODED}{part}": value for part, value in payload.items()} | beside


def _card(site: int, sites: int) -> SiteCard:
    return SiteCard(
        site=site,
        sites=sites,
        name=f"site {site}",
        classes=["a", "b"],
        columns=[],
        shape=list(SHAPE),
        train=EXAMPLES,
        test=EXAMPLES,
        notes=[],
        code=code_version(),
        counts=[EXAMPLES, EXAMPLES],
    )


def short(method: str, sites: int, model: str, **more: Any) -> Config:
    """The configuration of two rounds of a method, or of contributions of two epochs."""
    kind = METHODS[method]
    keys = {"local_steps": 10} if "local_steps" in kind.keys.model_fields else {"local_epochs": 1}
    common: dict[str, Any] = {
        "epochs": 2,
        "training": {"batch_size": 1},
        "model": {"name": model},
        kind.table: keys,
    }
    return configuration(strategy=method, num_sites=sites, **common, **more)


def peak(config: Config, sizes: tuple[int, ...]) -> float:
    """The server's peak memory during a run, in models of ``sizes``.

    What this process held before is subtracted.
    """
    grid = Ready(config, sizes)
    gc.collect()
    # What is free, but still counted as this process's, would serve the run uncounted.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    before = _status("VmRSS")
    run(grid, config, History(config))
    return (_status("VmHWM") - before) / (4 * sum(sizes))


def _status(key: str) -> int:
    """Bytes of memory, from a line of /proc/self/status."""
    found = re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def main() -> None:
    """Print a row a method."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="*", help=f"by default {', '.join(SHOWN)}")
    parser.add_argument("--sites", type=int, nargs="+", default=[3, 10, 30])
    arguments = parser.parse_args()
    sizes = tuple(parameter.numel() for parameter in network(SHAPE, 2).parameters())
    rows = []
    for wire, keys in WIRES.items():
        for method in arguments.methods or SHOWN:
            row: dict[str, Any] = {"method": method, "wire": wire}
            for sites in arguments.sites:
                row[f"{sites} sites"] = peak(
                    short(method, sites, f"{__name__}:network", wire=keys), sizes
                )
            rows.append(row)
            print(
                pd.DataFrame(rows).to_string(index=False, float_format="{:.1f}".format), flush=True
            )


if __name__ == "__main__":
    main()
