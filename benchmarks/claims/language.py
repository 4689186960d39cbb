"""Language: DiLoCo and its relatives beside the four systems, on texts of four topics."""

import tomllib
from typing import Any

from benchmarks import language
from benchmarks.claims.claim import (
    Candidate,
    Claim,
    Judgement,
    Measure,
    Setting,
    Size,
    final,
    steps,
)
from configuration.config import ROOT, flatten

OPTIMIZER = "training.optimizer"


def candidates(count: int) -> tuple[Candidate, ...]:
    """Those of :mod:`benchmarks.language`, each with so many learning rates around its rate."""
    found = []
    for name, keys in language.METHODS.items():
        rate = language.RATES[name]
        space = {"training.lr": steps(rate / 3, rate * 3, count)}
        found.append(Candidate(name, keys, space))
    return tuple(found)


def setting(name: str, epochs: int) -> Setting:
    """``conf/language.toml`` without its method."""
    keys = flatten(tomllib.loads((ROOT / "conf/language.toml").read_text()))
    shared: dict[str, Any] = {
        key: value
        for key, value in keys.items()
        if key not in ("strategy", "training.lr") and not key.startswith("diloco.")
    }
    path = {"data.path": "ag_news_small.zip/train.csv"}
    return Setting(name, shared | path | {"epochs": epochs})


DILOCO = "DiLoCo, H = 50"

CLAIM = Claim(
    question="Which method for a language model across data centers?",
    about="""
AG news as bytes, a site for each of the four topics, a transformer of two layers of width 64; equal
passes over each site's texts. Claimed by arXiv 2311.08105: DiLoCo is as good as training in step,
with hundreds of times fewer bytes. The methods are those
of [language](language.md), here with rates of a search.""",
    quick=Size((setting("AG news", 1),), candidates(2), seeds=2, trials=2),
    full=Size((setting("AG news", 6),), candidates(4), seeds=3, trials=4),
    measures=(
        Measure("all topics", "bits a byte, mean over topics", final("all topics"), False),
        Measure("own topic", "bits a byte on a site's own topic", final("own topic"), False),
        Measure("MB", "sent and received", final("MB"), False, ".0f"),
    ),
    judgements=(
        Judgement(
            "Worse by 0.05 bits a byte at most",
            "all topics",
            DILOCO,
            "centralized",
            -0.05,
        ),
        *(
            Judgement("Fewer bits a byte on all topics", "all topics", DILOCO, than)
            for than in ("FedAvg", "Co-learning", "GSGM", "DMSGD, ring", "NoLoCo, H = 10")
        ),
        Judgement("At least 90 % fewer bytes", "MB", DILOCO, "GSGM", 0.9, relative=True),
    ),
    axes=("round", "megabytes"),
    final=language.measured,
)
