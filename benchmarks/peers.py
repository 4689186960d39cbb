"""Peers on a ring, one exchange a mini-batch, in four engines.

These are a plain PyTorch loop, the batched engine, the relay in process and Flower's Ray engine.

    python -m benchmarks.peers [--peers 16] [--iterations 200] [--model cnn] [--ray]

D-PSGD on digits; the same network, batches and learning rate. Seconds of the iterations alone: what
is set up before the first is not counted. In turns, several times, medians. Then what sealing costs
on 100 MB.
"""

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.nn import functional as F

from client_app.app import app as client_app
from client_app.oracle import nth_batch
from client_app.sealing import Header, Keyring
from client_app.site import SiteId, site_data
from configuration.__main__ import pairs
from configuration.config import ROOT, Config, configuration
from models.networks import build
from server_app.app import run as run_server
from server_app.discovery import discover
from server_app.relay import Relay
from server_app.results import History
from simulation.batched import Peers
from simulation.grid import VirtualGrid
from simulation.world import World
from strategies.randomness import derive


def configured(peers: int, iterations: int, model: str) -> Config:
    """``iterations`` exchanges, tested once at the end; an epoch is more or less three batches."""
    common: dict[str, Any] = {
        "strategy": "d-psgd",
        "num_sites": peers,
        "model.name": model,
        "training.lr": 0.05,
        "training.lr-ratio": 1.0,
    }
    config = configuration(
        **common,
        training={"weight_decay": 0.0, "clip_norm": 0.0},
        wire={"collect_models": False},
        results={"evaluate_every": 10**9},
        epochs=1,
    )
    examples = 1437 / peers
    return config.model_copy(
        update={"epochs": round(iterations / -(-examples // config.training.batch_size))}
    )


def plain_loop(config: Config, exchanges: int) -> float:
    """The plain loop: a module and an optimizer a peer, the mean of three neighbours by hand."""
    n = config.num_sites
    data = [
        site_data(config, SiteId(peer, n, ""), tuple(map(str, range(10))), None)
        for peer in range(n)
    ]
    networks = [
        build(
            config.model.name, (1, 8, 8), 10, derive(config.seed, "model"), **config.model.options
        )
        for _ in range(n)
    ]
    optimizers = [torch.optim.SGD(network.parameters(), config.training.lr) for network in networks]
    start = time.perf_counter()
    for number in range(exchanges):
        for peer in range(n):
            x, y = nth_batch(config, peer, data[peer].train, number)
            optimizers[peer].zero_grad()
            F.cross_entropy(networks[peer](x), y).backward()
            optimizers[peer].step()
        with torch.no_grad():
            before = [[p.clone() for p in network.parameters()] for network in networks]
            for peer, network in enumerate(networks):
                left, right = before[peer - 1], before[(peer + 1) % n]
                for p, a, b, c in zip(network.parameters(), left, before[peer], right, strict=True):
                    p.copy_((a + b + c) / 3)
    return time.perf_counter() - start


def batched(config: Config) -> tuple[float, int]:
    """Seconds and exchanges of the batched engine."""
    grid = VirtualGrid(client_app, World().sites(config.num_sites, 1), config.flat())
    peers = Peers(config, discover(grid, config), History(config))
    start = time.perf_counter()
    for number in range(peers.exchanges):
        peers.step(number)
    return time.perf_counter() - start, peers.exchanges


def relay(config: Config) -> float:
    """Seconds of the app in this process."""
    grid = VirtualGrid(client_app, World().sites(config.num_sites, 1), config.flat())
    began: list[float] = []
    original = Relay.run

    def timed(self: Relay) -> Any:
        began.append(time.perf_counter())
        return original(self)

    Relay.run = timed  # type: ignore[method-assign]
    try:
        run_server(grid, config, History(config))
    finally:
        Relay.run = original  # type: ignore[method-assign]
    return time.perf_counter() - began[0]


def ray_engine(config: Config) -> float:
    """Seconds from the first message to the last in ``make run``."""
    with tempfile.TemporaryDirectory() as folder:
        settings = pairs(config)
        clean = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
        subprocess.run(
            ["make", "--no-print-directory", "run", f"RESULTS={folder}", f"SET={settings}"],
            cwd=ROOT,
            env=clean,
            check=True,
            capture_output=True,
        )
        (run,) = Path(folder).iterdir()
        return float(pd.read_csv(run / "metrics.csv")["seconds"].max())


def sealing() -> None:
    """Sealing and opening 100 MB, for one neighbour and for two."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    private = [X25519PrivateKey.generate() for _ in range(3)]
    public = {number: key.public_key().public_bytes_raw() for number, key in enumerate(private)}
    nonces = {number: os.urandom(16) for number in public}
    rings = [Keyring(number, key, public, nonces) for number, key in enumerate(private)]
    data, header = os.urandom(100_000_000), Header(1, 0, 1, "model")
    sealed, keys, _ = rings[0].seal(data, [1, 2], header)
    seal, opened = [], []
    for _ in range(5):
        start = time.perf_counter()
        sealed, keys, _ = rings[0].seal(data, [1, 2], header)
        middle = time.perf_counter()
        assert rings[2].open(sealed, keys[2], header) == data
        seal.append(middle - start)
        opened.append(time.perf_counter() - middle)
    sealed_ms, opened_ms = (1000 * statistics.median(found) for found in (seal, opened))
    print(
        f"100 MB: sealed for two neighbours in {sealed_ms:.0f} ms, "
        f"opened by one in {opened_ms:.0f} ms"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ray", action="store_true", help="also Flower's Ray engine, minutes")
    arguments = parser.parse_args()
    config = configured(arguments.peers, arguments.iterations, arguments.model)
    exchanges = batched(config)[1]
    print(
        f"{arguments.peers} peers on a ring, digits, {arguments.model}, "
        f"{exchanges} exchanges, torch {torch.__version__}"
    )
    times: dict[str, list[float]] = {}
    for threads in (1, os.cpu_count() or 1):
        torch.set_num_threads(threads)
        for _ in range(arguments.repeats):
            for name, run in (
                ("plain loop", lambda: plain_loop(config, exchanges)),
                ("batched engine", lambda: batched(config)[0]),
                ("relay in process", lambda: relay(config)),
            ):
                times.setdefault(f"{name}, {threads} threads", []).append(run())
    loop = min(
        statistics.median(found) for name, found in times.items() if name.startswith("plain")
    )
    if arguments.ray:
        times["Flower's Ray engine"] = [ray_engine(config)]
    for name, found in times.items():
        seconds = statistics.median(found)
        print(f"{name:<28}{seconds:8.2f} s {seconds / loop:8.2f} times the faster plain loop")
    sealing()


if __name__ == "__main__":
    main()
