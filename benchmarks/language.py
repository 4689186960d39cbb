"""A small language model across four data centers, each with one topic.

Bits a byte on the own topic and on all, and bytes sent.

    python -m benchmarks.language AG_NEWS.csv             every method
    python -m benchmarks.language AG_NEWS.csv --search    learning rates of those with SGD

Every method gets equal tokens, and means over seeds ± standard error are printed; the search takes
half the tokens and another seed.

``conf/language.toml``, AG news as bytes. Sites are tested on texts of their own that no site trains
on.
"""

import argparse
import tomllib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from client_app.site import SiteId, site_data
from client_app.training import evaluate
from configuration.config import ROOT, Config, flatten
from configuration.network import network_of
from models.flat import FlatModel
from simulation.laboratory import Run, compare

SGD = {"training.optimizer": "sgd", "training.momentum": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    "centralized": {"strategy": "centralized"},
    "each alone": {"strategy": "local"},
    "FedAvg": {"strategy": "fedavg", "fedavg.local-epochs": 1},
    "Co-learning": {"strategy": "co-learning", "co-learning.local-epochs": 1},
    "DiLoCo, H = 10": {"strategy": "diloco", "diloco.local-steps": 10},
    "DiLoCo, H = 50": {"strategy": "diloco", "diloco.local-steps": 50},
    "DiLoCo, H = 250": {"strategy": "diloco", "diloco.local-steps": 250},
    "GSGM": {"strategy": "gsgm", "gsgm.schedule": "list", "training.optimizer": "sgd"},
    "Delayed Nesterov, H = 10": {
        "strategy": "delayed-nesterov",
        "delayed-nesterov.local-steps": 10,
        **SGD,
    },
    "DMSGD, ring": {"strategy": "dmsgd", "dmsgd.consensus-weight": 1.0},
    "NoLoCo, H = 10": {
        "strategy": "noloco",
        "noloco.local-steps": 10,
        "noloco.momentum": 0.9,
        "topology.name": "matching",
    },
}
# AdamW: the common one of conf/language.toml; SGD: of three rates each, by --search.
RATES = {
    "centralized": 0.003,
    "each alone": 0.003,
    "FedAvg": 0.003,
    "Co-learning": 0.003,
    "DiLoCo, H = 10": 0.003,
    "DiLoCo, H = 50": 0.003,
    "DiLoCo, H = 250": 0.003,
    "GSGM": 0.1,
    "Delayed Nesterov, H = 10": 0.9,
    "DMSGD, ring": 0.03,
    "NoLoCo, H = 10": 0.3,
}


def of_peers(strategy: str) -> bool:
    """Whether a method is one of peers, which bring their own optimizer."""
    return strategy in ("dmsgd", "noloco")


def common(path: str) -> dict[str, Any]:
    """The keys that all methods share: ``conf/language.toml`` without its method."""
    keys = flatten(tomllib.loads((ROOT / "conf/language.toml").read_text()))
    return {key: value for key, value in keys.items() if not key.startswith("diloco.")} | {
        "data.path": path
    }


def bits(config: Config, model: Mapping[str, torch.Tensor], site: int) -> float:
    """Bits per byte of a model on a site's test part."""
    data = site_data(config, SiteId(site, config.num_sites, ""), ("token",), None)
    network, _ = network_of(config, tuple(data.test.x.shape[1:]), 1)
    network.load_state_dict(model)
    flat = FlatModel(network)
    with torch.no_grad():
        found = evaluate(
            config.task, network, flat, flat.x[None].clone(), flat.stats[None], data.test
        )
    loss = found["loss"]
    assert isinstance(loss, float)
    return loss / float(np.log(2))


def measured(run: Run) -> dict[str, float]:
    """A row of the table: means over sites."""
    # Those of the sites in the order of their numbers, or one for all.
    models = [
        run.models[name]
        for name in sorted(run.models, key=lambda name: int(name.partition("-")[2] or 0))
    ]
    sites = range(run.config.num_sites)
    # [models, sites].
    table = np.array([[bits(run.config, model, site) for site in sites] for model in models])
    own = table.diagonal() if len(models) > 1 else table[0]
    last = run.history.iloc[-1]
    return {
        "own topic": own.mean(),
        "all topics": table.mean(),
        "MB": last["megabytes"],
        "exchanges": last["round"],
    }


def rows(
    path: str, methods: Mapping[str, Mapping[str, Any]], seeds: list[int], **keys: Any
) -> dict[str, list[dict[str, float]]]:
    """A row for each method and seed."""
    shared = common(path) | keys
    jobs = {}
    for name, changes in methods.items():
        of_method = {
            key: value
            for key, value in shared.items()
            if not (of_peers(changes["strategy"]) and key == "training.optimizer")
        }
        jobs[name] = {**of_method, **changes}
    return {
        name: list(map(measured, runs)) for name, runs in compare(jobs, seeds=seeds).runs.items()
    }


def search(path: str) -> None:
    """Print bits per byte for each learning rate."""
    methods = {}
    for name, rate in list(RATES.items())[-4:]:
        for factor in (1 / 3, 1.0, 3.0):
            methods[f"{name} | {rate * factor:.2g}"] = METHODS[name] | {
                "training.lr": rate * factor
            }
    for name, found in rows(path, methods, [7], epochs=1).items():
        print(f"{name:36} {found[0]['own topic']:.3f} {found[0]['all topics']:.3f}", flush=True)


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path")
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.search:
        search(arguments.path)
        return
    methods = {name: keys | {"training.lr": RATES[name]} for name, keys in METHODS.items()}
    print("| | rate | own topic | all topics | MB sent | exchanges |\n|---|---|---|---|---|---|")
    for name, keys in methods.items():
        found = rows(arguments.path, {name: keys}, list(range(1, arguments.seeds + 1)))[name]
        shown = []
        for column in ("own topic", "all topics"):
            values = np.array([each[column] for each in found])
            error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
            shown.append(f"{values.mean():.3f} ± {error:.3f}")
        print(
            f"| {name} | {RATES[name]:g} | {' | '.join(shown)} "
            f"| {found[0]['MB']:,.0f} | {found[0]['exchanges']:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
