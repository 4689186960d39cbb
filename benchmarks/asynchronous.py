"""Asynchronous aggregation: the server's work an update, and its arrivals a second.

The work is compared with one in-place addition.

    python -m benchmarks.asynchronous

Rules on 25 million parameters, medians of arrivals in turns, side by side with ``x.add_(delta)``.
Then the laboratory with ten sites that reply at once with a model of 100 kB: arrivals a second, the
engine's, the driver's and the rule's work included.
"""

import argparse
import statistics
import time
from typing import Any

import torch

from client_app.app import app as client_app
from configuration.config import configuration
from server_app.app import run as run_server
from server_app.results import History
from simulation.grid import VirtualGrid
from simulation.world import World
from strategies.asynchronous.rule import Update
from strategies.method import ArrivalPlan

SIZE = 25_000_000
RULES: dict[str, dict[str, Any]] = {
    "asgd": {"strategy": "asgd"},
    "asgd-momentum": {"strategy": "asgd-momentum"},
    "gsgm": {"strategy": "gsgm"},
    "gsgm on dc-asgd-a": {"strategy": "gsgm", "gsgm.base": "dc-asgd-a"},
    "gsgm on adam": {"strategy": "gsgm", "gsgm.base": "adam"},
    "dc-asgd-c": {"strategy": "dc-asgd-c"},
    "dc-asgd-a": {"strategy": "dc-asgd-a"},
    "fedasync": {"strategy": "fedasync"},
    "fedbuff": {"strategy": "fedbuff"},
    "delayed-nesterov": {"strategy": "delayed-nesterov"},
}


def rules(repeats: int) -> None:
    """Each rule's time an update, over that of an addition."""
    deltas = [torch.randn(SIZE) * 1e-3 for _ in range(4)]
    base = torch.randn(SIZE)
    for name, changes in RULES.items():
        plan = configuration(**changes).plan
        assert isinstance(plan, ArrivalPlan)
        rule = plan.rule
        state, x = rule.init(base), base.clone()
        times: dict[str, list[float]] = {"add": [], "rule": []}
        for repeat in range(repeats + 3):
            delta = deltas[repeat % len(deltas)]
            start = time.perf_counter()
            x.add_(delta)
            middle = time.perf_counter()
            state = rule.absorb(state, Update(delta, base, 0.05, 3))
            end = time.perf_counter()
            if repeat >= 3:  # memory is touched for the first time
                times["add"].append(middle - start)
                times["rule"].append(end - middle)
        add, ours = (statistics.median(times[key]) for key in ("add", "rule"))
        print(
            f"{name:<20}{1000 * ours:7.1f} ms an update, "
            f"{ours / add:.2f} times an addition ({1000 * add:.1f} ms)",
            flush=True,
        )


def driver() -> None:
    """Arrivals a second that the driver handles."""
    from client_app import training

    training.train = lambda model, *_: (0.0, 1)
    model = "benchmarks.asynchronous:hundred_kilobytes"
    config = configuration(
        strategy="gsgm",
        num_sites=10,
        epochs=40,
        model={"name": model},
        results={"evaluate_every": 10**9},
    )
    history = History(config)
    grid = VirtualGrid(client_app, World().sites(10, 1), config.flat())
    start = time.perf_counter()
    run_server(grid, config, history)
    arrivals = history.metrics.query("metric == 'updates' and site == 'all'")["value"].sum()
    print(
        "laboratory, 10 sites, model of 100 kB: "
        f"{arrivals / (time.perf_counter() - start):.0f} arrivals a second"
    )


def hundred_kilobytes(shape: tuple[int, ...], num_classes: int) -> torch.nn.Module:
    """A network of 24,985 parameters, 100 kB."""
    return torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(64, 333),
        torch.nn.ReLU(),
        torch.nn.Linear(333, num_classes),
    )


def main() -> None:
    """Print the time of each rule, and the arrivals a second of the driver."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    rules(arguments.repeats)
    torch.set_num_threads(1)
    driver()


if __name__ == "__main__":
    main()
