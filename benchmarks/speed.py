"""How fast simulations are: ours, a plain PyTorch loop and other frameworks, in one table.

    python -m benchmarks.speed [--only laboratory batched] [--repeats 3]

W1 is FedAvg on digits: ten sites, 20 rounds of one local epoch in batches of 32, small CNN, each
site tested after each round. W2 is D-PSGD on a ring of eight peers: the same examples and network,
33 epochs with an exchange a batch, 198 iterations. Each contender runs in a process of its own, in
turns. Rounds do the same work, and other work on the machine only ever adds to their time: a
contender's is that which a tenth of all its rounds stay below; all else are medians. Every process
computes with one thread of torch; Flower's Ray engine and BlazeFL train as many sites at once as
there are cores. Accuracies tell that all did the same work.
``make-run`` is ``make run``, with Flower's processes, and takes part only where it is named: it
takes minutes, and not all of its memory is counted.

Where they are installed, pfl-research and BlazeFL take part in W1. They are no dependency group:
pfl-research asks for an older dp-accounting than this project, and for Python below 3.13, BlazeFL
for 3.12. Their code runs beside ours all the same, with Python 3.12:

    python -m uv pip install --no-deps pfl blazefl multiprocess prv-accountant
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
from flwr.app import Message

from benchmarks import timing
from benchmarks.rivals import BATCH, LR, PEERS, SEED, SITES, Run
from client_app.app import app as client_app
from configuration.config import ROOT, configuration
from server_app.app import run as run_server
from server_app.discovery import discover
from server_app.overview import read_metrics
from server_app.results import History
from simulation.batched import Peers
from simulation.grid import VirtualGrid
from simulation.together import Together
from simulation.world import World

EPOCHS = {"W1": 20, "W2": 33}
CONTENDERS = {
    ("W1", "plain"): "rivals.fedavg",
    ("W1", "laboratory"): "speed.laboratory",
    ("W1", "batched"): "speed.batched",
    ("W1", "flower"): "rivals.flower",
    ("W1", "pfl"): "rivals.pfl_research",
    ("W1", "blazefl"): "rivals.blazefl",
    ("W2", "plain"): "rivals.ring",
    ("W2", "relay"): "speed.relay",
    ("W2", "batched"): "speed.batched_peers",
    ("W2", "make-run"): "speed.make_run",
}
EACH = "ms a round or iteration"
GOALS = (
    "goals: laboratory at most 1.03 (W1), relay 1.25 (W2); batched at most 0.65 (W1) and 0.55 (W2)"
)
SETTINGS: dict[str, Any] = {
    "seed": SEED,
    "model.name": "cnn",
    "training.lr": LR,
    "training.lr-ratio": 1.0,
    "training.batch-size": BATCH,
    "training.clip-norm": 0.0,
    "computing.device": "cpu",
}
FEDAVG = SETTINGS | {"strategy": "fedavg", "num-sites": SITES, "fedavg.local-epochs": 1}
D_PSGD = SETTINGS | {
    "strategy": "d-psgd",
    "num-sites": PEERS,
    "training.weight-decay": 0.0,
    "wire.collect-models": False,
    "results.evaluate-every": 10**9,  # at the end
}


def last(ends: list[float], metrics: pd.DataFrame) -> Run:
    """What a run did, by its metrics."""
    tests = metrics.query("split == 'test' and site == 'all'")
    found = {name: float(rows["value"].iloc[-1]) for name, rows in tests.groupby("metric")}
    return Run(ends, found["loss"], found["accuracy"])


def laboratory(epochs: int) -> Run:
    """The laboratory: the app in this process."""
    history = timing.rounds(configuration(**FEDAVG, epochs=epochs))
    return last(history.ends, history.metrics)


def batched(epochs: int) -> Run:
    """Its batched engine."""
    history = timing.rounds(configuration(**FEDAVG, epochs=epochs), Together)
    return last(history.ends, history.metrics)


def relay(epochs: int) -> Run:
    """The app in this process."""
    config, times = configuration(**D_PSGD, epochs=epochs), list[float]()
    history = History(config)

    def note(peer: int, message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train.peer":
            times.append(time.time())
        return reply

    grid = VirtualGrid(client_app, World().sites(PEERS, SEED), config.flat(), note)
    run_server(grid, config, history)
    # An exchange is over when all have answered the step after it.
    return last(times[2 * PEERS - 1 :: PEERS], history.metrics)


def batched_peers(epochs: int) -> Run:
    """The batched engine of peers."""
    config, ends = configuration(**D_PSGD, epochs=epochs), list[float]()
    history = History(config)

    class Timed(Peers):
        def step(self, number: int) -> None:
            super().step(number)
            ends.append(time.time())

    grid = VirtualGrid(client_app, World().sites(PEERS, SEED), config.flat())
    Timed(config, discover(grid, config), history).run(lambda _: None)
    return last(ends, history.metrics)


def make_run(epochs: int) -> Run:
    """Flower's processes, by ``make run``; its exchanges, as if all took the same time."""
    with tempfile.TemporaryDirectory() as folder:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
        settings = D_PSGD | {"epochs": epochs}
        pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
        command = ["make", "run", f"RESULTS={folder}", f"SET={pairs}"]
        subprocess.run(command, cwd=ROOT, env=clean, check=True, stdout=sys.stderr)
        [file] = Path(folder).glob("*/metrics.csv")
        metrics, end = read_metrics(file), file.stat().st_mtime
    seconds, number = metrics[["seconds", "round"]].max()
    return last(np.linspace(end - seconds, end, int(number)).tolist(), metrics)


def measure(workload: str, contender: str) -> dict[str, Any]:
    """Run a contender in a process of its own: its rounds' milliseconds, and more."""
    module, function = CONTENDERS[workload, contender].split(".")
    code = (
        f"import json; from benchmarks.{module} import {function} as run; "
        f"print(); print(json.dumps(run({EPOCHS[workload]})))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        start, peak = time.time(), 0
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=out, stderr=errors, env=environment
        ) as process:
            watched = psutil.Process(process.pid)
            while process.poll() is None:
                used = 0
                for each in (watched, *watched.children(recursive=True)):
                    try:
                        used += each.memory_info().rss
                    except psutil.Error:
                        continue
                peak = max(peak, used)
                time.sleep(0.1)
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            sys.exit(f"{workload}, {contender}: {errors.read()[-2000:]}")
        run = Run(*json.loads(out.read().splitlines()[-1]))
    return {
        EACH: 1000 * np.diff(run.ends),
        "s to the first": run.ends[0] - start,
        "peak MiB": peak / 2**20,
        "accuracy": run.accuracy,
    }


def main() -> None:
    """Print the table."""
    names = dict.fromkeys(name for _, name in CONTENDERS if name != "plain")
    missing = {name for name in ("pfl", "blazefl") if not find_spec(name)}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        metavar="NAME",
        nargs="+",
        choices=[*names],
        default=[name for name in names if name not in {*missing, "make-run"}],
        help=f"beside the plain loop: {', '.join(names)}",
    )
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    workloads = {workload for workload, name in CONTENDERS if name in arguments.only}
    found = pd.DataFrame(
        {"workload": workload, "contender": name, **measure(workload, name)}
        for _ in range(arguments.repeats)
        for workload, name in CONTENDERS
        if workload in workloads and name in {*arguments.only, "plain"}
    )
    groups = found.groupby(["workload", "contender"], sort=False)
    times = groups[EACH].agg(lambda each: np.quantile(np.concatenate([*each]), 0.1))
    table = groups.median(numeric_only=True)
    table.insert(0, EACH, times)
    plain = times.xs("plain", level="contender")
    table.insert(1, "of plain", times / plain.reindex(table.index, level="workload"))
    digits = {EACH: 1, "of plain": 2, "s to the first": 1, "peak MiB": 0, "accuracy": 3}
    print(table.round(digits).to_string())
    print(GOALS)


if __name__ == "__main__":
    main()
