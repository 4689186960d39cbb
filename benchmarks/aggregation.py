"""Averaging the models of ten sites: ours against Flower's ``aggregate_arrayrecords``.

Time and memory, side by side.

    python -m benchmarks.aggregation

Replies are made one by one, as they would arrive from the network, and are not counted.
"""

import argparse
import gc
import logging
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import psutil
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from client_app.app import app
from simulation.grid import FIRST_NODE, VirtualGrid
from simulation.world import World
from strategies.averaging import fedavg
from strategies.averaging.adapter import Planned
from strategies.averaging.mean import StreamingMean
from strategies.method import Run
from strategies.protocol import Layout, TrainMetrics, read_trained, write_trained
from strategies.records import arrays_of, pack, unpack

MILLION = 1_000_000


def all_replies(sites: int, size: int) -> Iterator[Message]:
    """One reply a site, each made when the iterator reaches it."""
    return (reply(site, size) for site in range(sites))


def reply(site: int, size: int) -> Message:
    """A site's reply with a model of ``size`` parameters."""
    question = Message(RecordDict(), FIRST_NODE + site, "train")
    x = torch.randn(size, generator=torch.Generator().manual_seed(site))
    metrics = TrainMetrics(
        loss=1.0, lr_first=0.05, lr_last=0.05, num_examples=100 + site, samples=100
    )
    made = Message(write_trained({"x": x}, metrics), reply_to=question)
    made.metadata.__dict__["_src_node_id"] = FIRST_NODE + site
    return made


class Peak:
    """The most memory that this process held inside a ``with``, in MB above what it held before."""

    def __enter__(self) -> "Peak":
        gc.collect()
        self._process, self._run = psutil.Process(), True
        self._before = self.most = self._process.memory_info().rss
        self._watch = threading.Thread(target=self._look)
        self._watch.start()
        return self

    def _look(self) -> None:
        while self._run:
            self.most = max(self.most, self._process.memory_info().rss)
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        self._run = False
        self._watch.join()
        self.megabytes = (self.most - self._before) / 1e6


def ours(sites: int, before: ArrayRecord, replies: Iterable[Message]) -> None:
    """What the server does with the replies of a round, checks included."""
    grid = VirtualGrid(app, World().sites(sites, 0), {})
    strategy = Planned(
        fedavg.plan(fedavg.Keys(), Run(1.0, 0.0)),
        {FIRST_NODE + site: 1 / sites for site in range(sites)},
    )
    list(strategy.configure_train(1, before, ConfigRecord({"training.lr": 1.0}), grid))
    layout, sent = (
        Layout({"x": before["x"].shape[0]}, torch.empty(0, dtype=torch.bool)),
        {"x": unpack(before["x"])},
    )
    numbered = enumerate(replies)
    strategy.aggregate_train(
        1, (each for site, each in numbered if read_trained(each, layout, 100 + site, sent))
    )


def ours_mean_alone(sites: int, replies: Iterable[Message]) -> None:
    """Our mean alone, which is what Flower's function computes."""
    mean: StreamingMean | None = None
    for each in replies:
        x = unpack(arrays_of(each)["x"])
        mean = mean or StreamingMean(x.shape)
        mean.add(x, 1 / sites)
    assert mean is not None
    pack({"x": mean.result()})


def flowers(replies: Iterable[Message]) -> None:
    """Flower's FedAvg on the same replies."""
    aggregate_arrayrecords([each.content for each in replies], "num-examples")


def main() -> None:
    """Print medians and ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sites", type=int, default=10)
    parser.add_argument("--millions", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    sites, size = arguments.sites, arguments.millions * MILLION
    VirtualGrid(app, World().sites(sites, 0), {})
    before = pack({"x": torch.zeros(size)})
    contenders: dict[str, Callable[[Iterable[Message]], None]] = {
        "Flower's aggregate_arrayrecords": flowers,
        "our mean": partial(ours_mean_alone, sites),
        "our round: checks, mean, change": partial(ours, sites, before),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(
        arguments.repeats + 1
    ):  # in turns, so that a busy machine disturbs both alike; the first is a warm-up
        for name, work in contenders.items():
            ready = list(all_replies(sites, size))
            start = time.perf_counter()
            work(ready)
            if repeat:
                times[name].append(time.perf_counter() - start)
            del ready
    print(
        f"{sites} sites x {arguments.millions} million parameters, "
        f"{torch.get_num_threads()} threads"
    )
    reference = statistics.median(times["Flower's aggregate_arrayrecords"])
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        print(f"{name:<32} {middle:.3f} s, ratio {middle / reference:.2f}")
    model = 4 * size / 1e6
    for count in (sites, 3 * sites):
        with Peak() as ours_peak:
            ours(count, before, all_replies(count, size))
        print(
            f"peak memory with {count} sites, in models of {model:.0f} MB: "
            f"{ours_peak.megabytes / model:.1f}",
            end="",
        )
        print(" (of them, a reply and the tensor that it is made of, which is the benchmark's)")


if __name__ == "__main__":
    main()
