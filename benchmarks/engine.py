"""The laboratory's engines: wall time a round, beside a plain PyTorch loop and Flower's Ray engine.

    python -m benchmarks.engine [--engines plain ours batched flower]

Digits, ten sites, FedAvg, 20 rounds of one local epoch in batches of 32, small CNN, each site
tested after each round; a process each, one after the other, twice. Flower's part is a plain Flower
app: its own FedAvg, state dicts, ``run_simulation``. Then the laboratory's own work a message for a
model of 1 MB: all that is not training or testing.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import timing
from client_app.training import prepare
from configuration.config import configuration
from datasets.site import SiteData, select, simulated_splits
from datasets.sources import digits
from models.networks import build
from simulation.together import Together

SITES, ROUNDS, BATCH, LR, MOMENTUM = 10, 20, 32, 0.05, 0.9
SETTINGS: dict[str, Any] = {
    "strategy": "fedavg",
    "num_sites": SITES,
    "epochs": ROUNDS,
    "fedavg.local-epochs": 1,
    "training.lr-ratio": 1.0,
}
BORN = psutil.Process().create_time()


def sites() -> list[SiteData]:
    """The same ten sites for the loop and for Flower's app."""
    options = {
        "alpha": 1.0,
        "classes_per_site": 1,
        "size_ratio": 1.0,
        "iid_fraction": 0.0,
        "test_part": "own",
        "test_fraction": 0.2,
    }
    examples = digits()
    splits = simulated_splits(examples, SITES, np.random.default_rng(1), kind="iid", **options)  # type: ignore[arg-type]
    return [select(examples, [split]) for split in splits]


def train(network: nn.Module, data: SiteData) -> float:
    """One epoch of SGD."""
    sgd = torch.optim.SGD(network.parameters(), LR, MOMENTUM, weight_decay=1e-4)
    network.train()
    total, batches = torch.zeros(()), torch.randperm(len(data.train.y)).split(BATCH)
    for chosen in batches:
        sgd.zero_grad()
        loss = F.cross_entropy(network(prepare(data.train.x[chosen])), data.train.y[chosen])
        loss.backward()
        sgd.step()
        total += loss.detach()
    return total.item() / len(batches)


@torch.no_grad()
def test(network: nn.Module, data: SiteData) -> tuple[float, float]:
    """Loss and accuracy on the test part."""
    network.eval()
    logits = network(prepare(data.test.x))
    return F.cross_entropy(logits, data.test.y).item(), (
        logits.argmax(1) == data.test.y
    ).float().mean().item()


def plain() -> list[float]:
    """Train in a loop without any framework; return the times at which rounds end."""
    ends, everybody = [], sites()
    network = build("cnn", (1, 8, 8), 10, 1)
    for _ in range(ROUNDS):
        sent = copy.deepcopy(network.state_dict())
        total: dict[str, Tensor] = {}
        for data in everybody:
            network.load_state_dict(sent)
            train(network, data)
            for key, value in network.state_dict().items():
                total[key] = total[key].add_(value) if key in total else value.clone()
        network.load_state_dict({key: value / SITES for key, value in total.items()})
        for data in everybody:
            test(network, data)
        ends.append(time.time())
    return ends


def ours() -> list[float]:
    """The times at which the rounds of our engine end."""
    return timing.ends(configuration(**SETTINGS))


def batched() -> list[float]:
    """The times at which the rounds of our batched engine end."""
    return timing.ends(configuration(**SETTINGS), Together)


flower_client = ClientApp()
_data: list[SiteData] = []


def _open(message: Message, context: Context) -> tuple[nn.Module, SiteData]:
    if not _data:  # once a process
        torch.set_num_threads(1)
        _data.extend(sites())
    network = build("cnn", (1, 8, 8), 10, 1)
    network.load_state_dict(message.content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
    return network, _data[int(context.node_config["partition-id"])]


@flower_client.train()
def _flower_train(message: Message, context: Context) -> Message:
    network, data = _open(message, context)
    metrics = MetricRecord({"loss": train(network, data), "num-examples": len(data.train.y)})
    return Message(
        RecordDict({"arrays": ArrayRecord(network.state_dict()), "metrics": metrics}),
        reply_to=message,
    )


@flower_client.evaluate()
def _flower_evaluate(message: Message, context: Context) -> Message:
    network, data = _open(message, context)
    loss, accuracy = test(network, data)
    metrics = MetricRecord({"loss": loss, "accuracy": accuracy, "num-examples": len(data.test.y)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def flower() -> list[float]:
    """Times of Flower's Ray engine with Flower's own FedAvg."""
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    ends: list[float] = []

    class Timed(FedAvg):
        def aggregate_evaluate(
            self, server_round: int, replies: Iterable[Message]
        ) -> MetricRecord | None:
            found = super().aggregate_evaluate(server_round, replies)
            ends.append(time.time())
            return found

    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        initial = ArrayRecord(build("cnn", (1, 8, 8), 10, 1).state_dict())
        Timed(fraction_train=1.0, fraction_evaluate=1.0).start(grid, initial, num_rounds=ROUNDS)

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, flower_client, SITES, backend_config=resources)  # type: ignore[arg-type]
    return ends


def wide(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A network of 262,510 parameters: a message of 1 MB."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3500), nn.ReLU(), nn.Linear(3500, num_classes))


def overhead() -> float:
    """Milliseconds a message, without training and testing, for a model of 1 MB."""
    from client_app import training

    inside = 0.0

    def timed(function: Any) -> Any:
        def run(*values: Any, **named: Any) -> Any:
            nonlocal inside
            start = time.perf_counter()
            result = function(*values, **named)
            inside += time.perf_counter() - start
            return result

        return run

    training.train, training.evaluate = timed(training.train), timed(training.evaluate)
    seconds = []
    for _ in range(2):  # the first one warms up
        inside, start = 0.0, time.perf_counter()
        timing.ends(configuration(**SETTINGS | {"model.name": "benchmarks.engine:wide"}))
        seconds.append(time.perf_counter() - start - inside)
    return 1000 * seconds[-1] / (SITES * (2 * ROUNDS + 1))


def measure(part: str) -> dict[str, float]:
    """Measure one part in a process of its own.

    Milliseconds a round, seconds to the end of the first round, peak memory of all its processes.
    """
    command = [sys.executable, "-m", "benchmarks.engine", "--part", part]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        peak, watched = 0, psutil.Process(process.pid)
        while process.poll() is None:
            used = 0
            for each in (watched, *watched.children(recursive=True)):
                try:
                    used += each.memory_info().rss
                except psutil.Error:
                    continue
            peak = max(peak, used)
            time.sleep(0.1)
        assert process.stdout is not None
        result = json.loads(process.stdout.read().splitlines()[-1])
    rounds = np.diff(result["ends"])
    return {
        "ms": 1000 * statistics.median(rounds),
        "start": result["ends"][0] - result["born"],
        "MiB": peak / 2**20,
    }


ENGINES: dict[str, tuple[str, Callable[[], list[float]]]] = {
    "plain": ("plain loop", plain),
    "ours": ("laboratory", ours),
    "batched": ("its batched engine", batched),
    "flower": ("Flower (Ray)", flower),
}


def main() -> None:
    """Print the table and the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=[*ENGINES, "overhead"])
    parser.add_argument("--engines", nargs="+", choices=[*ENGINES], default=[*ENGINES])
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.part == "overhead":
        print(overhead())
    elif arguments.part:
        ends = ENGINES[arguments.part][1]()
        print(json.dumps({"born": BORN, "ends": ends}))
        sys.stdout.flush()
        os._exit(0)  # Ray takes seconds to shut down
    else:
        found = pd.DataFrame(
            [
                {"engine": part, **measure(part)}
                for _ in range(arguments.repeats)
                for part in arguments.engines
            ]
        )
        table = found.groupby("engine", sort=False).median()
        table["of the plain loop"] = table["ms"] / table["ms"]["plain"]
        heads = {"ms": "ms a round", "start": "s to the first round", "MiB": "peak MiB"}
        print(
            table.rename(
                columns=heads,
                index={part: name for part, (name, _) in ENGINES.items()},
            )
            .round(2)
            .to_string()
        )
        if {"flower", "ours"} <= {*arguments.engines}:
            print(
                f"Flower's engine takes {table['ms']['flower'] / table['ms']['ours']:.1f} "
                "times the laboratory's time"
            )
        own = subprocess.run(
            [sys.executable, "-m", "benchmarks.engine", "--part", "overhead"],
            capture_output=True,
            text=True,
            check=True,
        )
        print(
            "the laboratory's own work a message, model of 1 MB: "
            f"{float(own.stdout.splitlines()[-1]):.2f} ms"
        )


if __name__ == "__main__":
    main()
