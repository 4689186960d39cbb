"""Language: DiLoCo and its relatives beside the four systems, on texts of four topics."""

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.claims.claim import (
    Candidate,
    Claim,
    Judgement,
    Measure,
    Setting,
    Size,
    final,
    last,
    steps,
)
from client_app.site import SiteId, site_data
from client_app.training import evaluate
from configuration.config import ROOT, Config, flatten
from configuration.network import network_of
from models.flat import FlatModel
from simulation.laboratory import Run

DECAY: dict[str, list[Any]] = {"training.lr-ratio": [0.1, 0.32]}
MOMENTUM = [0.9, 0.6]
# Less outer momentum than the source's, tried after a look at why two seeds of five lag with that.
LESS = ", mu = 0.5"


def of(name: str, strategy: str, rate: float, key: dict[str, list[Any]], **own: Any) -> Candidate:
    """With six trials at first: three rates around ``rate``, and two values of a key of its own."""
    keys = {"strategy": strategy} | {
        each.replace("_", "-") if "." in each else f"{strategy}.{each.replace('_', '-')}": value
        for each, value in own.items()
    }
    # A rate of Co-learning that ends where it began has no cycle: it stays below.
    below = {"training.lr-ratio": 1.0} if strategy == "co-learning" else {}
    return Candidate(name, keys, {"training.lr": steps(rate / 3, rate * 3, 3), **key}, below)


def diloco(steps_a_round: int, also: str = "", **own: Any) -> Candidate:
    """With so many batches of each site in a round."""
    outer: dict[str, list[Any]] = {"diloco.outer-lr": [0.7, 0.3]}
    name = f"DiLoCo, H = {steps_a_round}{also}"
    return of(name, "diloco", 0.003, outer, local_steps=steps_a_round, **own)


SGD: dict[str, Any] = {"training.optimizer": "sgd"}
CANDIDATES = (
    of("centralized", "centralized", 0.003, DECAY),
    of("each alone", "local", 0.003, DECAY),
    of("FedAvg", "fedavg", 0.003, DECAY, local_epochs=1),
    of("Co-learning", "co-learning", 0.003, DECAY, local_epochs=1),
    *map(diloco, (50, 250)),
    *(diloco(each, LESS, outer_momentum=0.5) for each in (50, 250)),
    of("GSGM", "gsgm", 0.1, {"training.lr-ratio": [1.0, 0.1]}, **SGD),
    of(
        "Delayed Nesterov, H = 10",
        "delayed-nesterov",
        0.9,
        {"delayed-nesterov.server-lr": [0.7, 0.3]},
        local_steps=10,
        **SGD,
        **{"training.momentum": 0.0},
    ),
    of("DMSGD, ring", "dmsgd", 0.03, {"dmsgd.momentum": MOMENTUM}, consensus_weight=1.0),
    of(
        "NoLoCo, H = 10",
        "noloco",
        0.3,
        {"noloco.momentum": MOMENTUM},
        local_steps=10,
        **{"topology.name": "matching"},
    ),
)


def setting(name: str, epochs: int, **more: Any) -> Setting:
    """``conf/language.toml`` without its method, tested on the data set's own test part."""
    shared = flatten(tomllib.loads((ROOT / "conf/language.toml").read_text()))
    for key in ("strategy", "training.lr", "data.test-fraction"):
        del shared[key]
    shared = {key: value for key, value in shared.items() if not key.startswith("diloco.")}
    own = {
        "data.path": "ag_news_small.zip/",
        "data.test-part": "official",
        "model.width": 32,
        "epochs": epochs,
        "results.evaluate-every": 100,
    }
    return Setting(name, shared | own, **more)


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
    return loss / math.log(2)


def own_topic(run: Run) -> dict[str, float]:
    """Bits a byte of each site's model, or the common one, on test texts of the site's topic."""
    test = {
        "data.path": str(Path(run.config.data.path) / "test.csv"),
        "data.test-part": "own",
        "data.test-fraction": 0.9,
    }
    config = Config.read({**run.config.flat(), **test})
    found = [
        bits(config, run.models.get(f"model-{site}") or run.model, site)
        for site in range(config.num_sites)
    ]
    return {"own topic": float(np.mean(found))}


DILOCO, SHORT = "DiLoCo, H = 50", "three passes"
# Whom more rounds may help, and those beside them; an update of the others is a step or ten.
ROUNDS = tuple(each.name for each in CANDIDATES[:8])
LONG = setting("six passes", 6, tuned_in=SHORT, candidates=ROUNDS)
FEW = ("centralized", "each alone", "FedAvg", DILOCO)

CLAIM = Claim(
    question="Which method for a language model across data centers?",
    about="""
AG news as bytes, a site for each of the four topics, a transformer of two layers of width 32 with
windows of 64 bytes; equal passes over each site's texts, AdamW at the sites where a method leaves
them the choice. Claimed by the abstract of arXiv 2311.08105: with 500 times less communication
DiLoCo is as good as training in step. Tested on the data set's own test part, texts of all topics;
"own topic" is each site's model, or the common one, on those of the site's.""",
    quick=Size((setting("one pass", 1, candidates=FEW),), CANDIDATES, seeds=3),
    full=Size((setting(SHORT, 3), LONG), CANDIDATES, seeds=5),
    measures=(
        Measure("all topics", "bits a byte", last(), False),
        Measure("own topic", "bits a byte on a site's own topic", final("own topic"), False),
        Measure("rounds", "rounds, updates or exchanges", last("round"), False, ".0f"),
        Measure("MB", "sent and received", last("megabytes"), False, ".0f"),
    ),
    judgements=(
        Judgement("Worse by 0.05 bits a byte at most", "all topics", DILOCO, "centralized", -0.05),
        *(
            Judgement("Fewer bits a byte", "all topics", DILOCO, each.name)
            for each in CANDIDATES[1:]
            if LESS not in each.name and each.name != DILOCO
        ),
        *(
            Judgement(f"Fewer bits a byte{LESS}", "all topics", f"DiLoCo, H = {each}{LESS}", than)
            for each in (50, 250)
            for than in (f"DiLoCo, H = {each}", "each alone", "FedAvg")
        ),
        Judgement("Fewer bits a byte, FedAvg", "all topics", "FedAvg", "each alone"),
        *(
            Judgement(
                "On its own topic, a site alone is worse than the common model",
                "own topic",
                better,
                "each alone",
            )
            for better in (DILOCO, "FedAvg")
        ),
        Judgement("At least 90 % fewer bytes", "MB", DILOCO, "GSGM", 0.9, relative=True),
    ),
    axes=("round", "megabytes"),
    final=own_topic,
    reading="""
**Nobody who exchanges comes near one place for all texts**: with as many passes its one model takes
four times the steps of a site's. After three passes it is half a bit a byte ahead of FedAvg, after
six a third: nobody has converged, and all whom six passes were given go on falling. **Of those who
share, FedAvg and Co-learning are best, with the fewest bytes**, and level with each other; after
six passes DiLoCo with less momentum is level with them, for more bytes. On texts of all topics
FedAvg is better than a site alone, the more so the longer; on the site's own topic a site alone is
better by a tenth of a bit (these two comparisons were added after the first look). Co-learning's
best rate hardly falls in a round.

**DiLoCo is not level with one place.** With the outer momentum of its source, 0.9, which is meant
for hundreds of rounds, it is behind FedAvg: with 50 steps a round two seeds of five end far behind
the others, and after six passes a third one by less; with 250 it has five or nine rounds, and is
level with a site alone after six passes. **That momentum is why it is behind FedAvg** (why two
seeds lag was looked into after the first look): with 0.5, tuned by the same rules, no seed lags.
After three passes it is then level with a site alone (50 steps a round) or still behind it (250),
and behind FedAvg; after six it is better than a site alone, and level with FedAvg with 50 steps,
for more than six times its bytes, or little behind it with 250. For runs of tens of rounds
`conf/language.toml` has it.

Without AdamW at the sites all end last but NoLoCo, for many times the bytes (GSGM, Delayed
Nesterov, DMSGD); NoLoCo, without a server, has on average what DiLoCo with 50 steps and 0.9 has,
which is undecided, for ten times its bytes. Keys are of three passes in both settings. A verdict
whose pairs are all alike has no p, and is not among those that are counted.""",
)
