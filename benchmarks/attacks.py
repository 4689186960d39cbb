"""What hostile sites do to each method, and how well each defence works.

Printed is a Markdown table of the final test accuracy at the honest sites.

    python -m benchmarks.attacks
    python -m benchmarks.attacks --only asgd --attacks flip noise

Digits, spread evenly, and a small network. The hostile sites are the last one of five, or two of
ten; they know what all others sent. A run that stops counts as accuracy 0. With ``change`` for what
a site would have sent beyond the model that it was sent (of a peer, beyond what it offered last):

    reversed   -10 change
    flip       -change
    noise      Gaussian noise, 10 times as long as the others' changes on average
    huge       4e6 in every number
    little     mean - 1.5 standard deviations of what the others sent, in each coordinate
    labels     the site trains honestly on the labels 9 - y

Source of "little": Baruch, Baruch, Goldberg, "A Little Is Enough", NeurIPS 2019; differs: 1.5 for
every number of sites, where the original computes at most how many deviations go unseen, which is 0
for one of five.
"""

import argparse
import logging
import math
import time
from contextlib import suppress
from typing import Any

import joblib
import pandas as pd
import torch
from flwr.app import Message
from torch import Tensor

from client_app.app import app as client_app
from configuration.config import Config, configuration
from datasets.sources import Examples, digits
from server_app.app import run as run_server
from server_app.discovery import RunError
from server_app.results import History
from simulation.grid import FIRST_NODE, VirtualGrid
from simulation.world import World
from strategies.method import ArrivalPlan, PeerPlan
from strategies.records import ARRAYS, X, arrays_of, config_of, pack, unpack

EPOCHS = 6
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {"fedavg.local-epochs": 1},
    "co-learning": {"co-learning.local-epochs": 1, "co-learning.epsilon": 0.0},
    "FedAdam": {"flower.local-epochs": 1},
    "gsgm": {"gsgm.local-steps": 3, "gsgm.schedule": "list"},
    "fedbuff": {"fedbuff.local-steps": 3},
    "asgd": {"asgd.local-steps": 3},
    "dmsgd": {"dmsgd.local-steps": 3, "topology.name": "complete"},
    "q-saddle": {"q-saddle.local-steps": 3, "topology.name": "complete"},
}
ATTACKS = ("none", "reversed", "flip", "noise", "huge", "little", "labels")
# With a robust mean as many as there are sites.
WINDOWS = {"gsgm": "gsgm.window", "fedbuff": "fedbuff.buffer-size"}
SITES = {5: 1, 10: 2}  # of so many sites, so many are hostile


def flipped(path: str) -> Examples:
    """The digits with the labels 9 - y, for label flipping."""
    found = digits()
    return found._replace(y=9 - found.y)


class Attack:
    """Changes what the last sites answer.

    Args:
        kind: one of ``ATTACKS``.
        honest: how many sites are.
        seed: of noise.
    """

    def __init__(self, kind: str, honest: int, seed: int) -> None:
        self._kind, self._honest = kind, honest
        self._generator = torch.Generator().manual_seed(seed)
        self._values: dict[
            int, dict[str, Tensor]
        ] = {}  # of honest sites, what each sent last, from where all are equal
        self._lengths: dict[
            int, dict[str, float]
        ] = {}  # and how far that was from where it had been
        self._before: dict[
            int, dict[str, Tensor]
        ] = {}  # of each peer, what it offered last, or would have

    def __call__(self, site: int, message: Message, reply: Message) -> Message:
        """The reply that is delivered instead of an honest one."""
        if (
            self._kind in ("none", "labels")
            or reply.has_error()
            or not message.metadata.message_type.startswith("train")
        ):
            return reply
        found = {name: unpack(array) for name, array in arrays_of(reply).items()}
        peer = X not in found
        base = {name: torch.zeros_like(value) for name, value in found.items()}
        if not peer and "delta" not in config_of(message):
            base = {name: unpack(array) for name, array in arrays_of(message).items()}
        origin = self._before.get(site, found) if peer else base
        self._before[site] = {name: value.clone() for name, value in found.items()}
        if site < self._honest:
            self._values[site] = {name: value - base[name] for name, value in found.items()}
            self._lengths[site] = {
                name: float((value - origin[name]).norm())
                for name, value in found.items()
                if name in origin
            }
            return reply
        made = {
            name: self._made(name, value, origin.get(name, value), base[name])
            for name, value in found.items()
        }
        reply.content.pop(ARRAYS)
        reply.content[ARRAYS] = pack(made)
        return reply

    def _made(self, name: str, value: Tensor, origin: Tensor, base: Tensor) -> Tensor:
        match self._kind:
            case "reversed":
                return origin - 10 * (value - origin)
            case "flip":
                return origin - (value - origin)
            case "noise":
                lengths = [each[name] for each in self._lengths.values() if name in each] or [
                    float(value.norm())
                ]
                noise = torch.randn(value.shape, generator=self._generator)
                return origin + noise * (
                    10 * sum(lengths) / len(lengths) / math.sqrt(value.numel())
                )
            case "huge":
                return torch.full_like(value, 4e6)
        others = [each[name] for each in self._values.values() if name in each]
        if len(others) < 2:
            return value
        deviation, mean = torch.std_mean(torch.stack(others), 0)
        return base + mean - 1.5 * deviation


def accuracy(config: Config, kind: str, hostile: int) -> float:
    """The accuracy of the last models, the mean over the honest sites' test parts."""
    honest = config.num_sites - hostile
    grid = VirtualGrid(
        client_app,
        World().sites(config.num_sites, config.seed),
        config.flat(),
        Attack(kind, honest, config.seed),
    )
    if kind == "labels":
        for site in range(honest, config.num_sites):
            grid.contexts[FIRST_NODE + site].run_config["data.source"] = (
                "benchmarks.attacks:flipped"
            )
    history, threads = History(config), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run_server(grid, config, history)
    except RunError:
        return 0.0
    finally:
        torch.set_num_threads(threads)
    rows = history.metrics.query("split == 'test' and metric == 'accuracy' and site != 'all'")
    last = rows[rows["site"].astype(int) < honest].groupby("site")["value"].last()
    return float(last.mean())


def defences(method: str, sites: int) -> dict[str, dict[str, Any]]:
    """The settings of each defence, by the name of its column."""
    plan = configuration(strategy=method, num_sites=sites).plan
    means = ("median", "trimmed-mean", "clipped" if isinstance(plan, PeerPlan) else "krum")
    found: dict[str, dict[str, Any]] = {"max-change = 0": {"max-change": 0.0}, "defaults": {}}
    for mean in means if not isinstance(plan, ArrivalPlan) or plan.window else ():
        faulty = {} if mean == "median" else {"robust.faulty": SITES[sites]}
        found[mean] = {
            "robust.mean": mean,
            **faulty,
            **({WINDOWS[method]: sites} if method in WINDOWS else {}),
        }
    return (
        found
        if sites == min(SITES)
        else {name: found[name] for name in ("defaults", "trimmed-mean") if name in found}
    )


def cell(
    method: str, sites: int, attack: str, defence: str, seed: int
) -> tuple[int, str, str, str, float]:
    """Run one cell of the table; return the accuracy that it reached."""
    keys = METHODS[method] | defences(method, sites)[defence]
    common: dict[str, Any] = {
        "strategy": method,
        "num-sites": sites,
        "epochs": EPOCHS,
        "model.name": "mlp",
        "seed": seed,
    }
    logging.disable(logging.WARNING)  # each refused answer is one
    return (
        sites,
        method,
        attack,
        defence,
        accuracy(configuration(**common | keys), attack, SITES[sites]),
    )


def table(found: pd.DataFrame) -> str:
    """Mean and standard error over the seeds, in Markdown."""
    values = found.groupby(["sites", "method", "attack", "defence"], sort=False)["accuracy"].agg(
        ["mean", "sem"]
    )
    columns = [*dict.fromkeys(found["defence"])]
    lines = [
        "| sites | method | attack | " + " | ".join(columns) + " |",
        "|---" * (3 + len(columns)) + "|",
    ]
    for row, each in values.groupby(level=[0, 1, 2], sort=False):
        shown = {
            key[3]: f"{mean:.2f}"
            + ("" if math.isnan(error) else f" ± {error:.2f}")  # of one seed there is none
            for key, (mean, error) in zip(each.index, each.to_numpy(), strict=True)
        }
        lines.append(
            "| " + " | ".join([*map(str, row), *(shown.get(name, "") for name in columns)]) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD"
    )
    parser.add_argument(
        "--attacks", nargs="+", default=list(ATTACKS), choices=ATTACKS, metavar="ATTACK"
    )
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    start = time.monotonic()
    jobs = [
        joblib.delayed(cell)(method, sites, attack, defence, seed)
        for seed in range(1, arguments.seeds + 1)
        for sites in SITES
        for method in arguments.only
        for attack in arguments.attacks
        for defence in defences(method, sites)
    ]
    found: list[tuple[int, str, str, str, float]] = []
    with suppress(KeyboardInterrupt):  # what there is by then
        found.extend(joblib.Parallel(n_jobs=-1, batch_size=1, return_as="generator")(jobs))
    print(table(pd.DataFrame(found, columns=["sites", "method", "attack", "defence", "accuracy"])))
    print(f"\n{len(found)} of {len(jobs)} runs, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
