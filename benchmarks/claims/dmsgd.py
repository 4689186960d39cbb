"""DMSGD: does consensus on the momentum help peers?"""

from dataclasses import replace
from typing import Any

from benchmarks.claims.claim import (
    OF_PEERS,
    Candidate,
    Claim,
    Judgement,
    Measure,
    Setting,
    Size,
    last,
    steps,
)
from benchmarks.claims.data import FASHION

VELOCITY = "DMSGD, omega 1, velocity"


def candidates() -> tuple[Candidate, ...]:
    """Each with six trials at first, of learning rates and, where it has one, of momenta."""

    def of(name: str, strategy: str, **keys: Any) -> Candidate:
        own = {"strategy": strategy} | {f"{strategy}.{key}": value for key, value in keys.items()}
        space: dict[str, list[Any]] = {
            "training.lr": steps(0.003, 0.1, 3),
            f"{strategy}.momentum": [0.9, 0.6],
        }
        if strategy in ("d-psgd", "cdsgd"):  # a step of momentum 0.9 is ten times as long
            space = {"training.lr": steps(0.01, 1.0, 6)}
        return Candidate(name, own, space)

    return (
        of("D-PSGD", "d-psgd"),
        of("CDSGD", "cdsgd"),
        of("CDMSGD", "cdmsgd"),
        of("DSGDm", "dsgdm"),
        *(
            of(f"DMSGD, omega {omega:g}", "dmsgd", **{"consensus-weight": omega})
            for omega in (0.0, 0.5, 1.0)
        ),
        of(VELOCITY, "dmsgd", **{"consensus-weight": 1.0, "form": "velocity"}),
    )


def setting(name: str, tuned_in: str = "", iid: float = 0.0) -> Setting:
    """Sixteen peers with one class each, on a graph of this name, or as much iid."""
    graph = name.split(",")[0]
    # Else disagreement grows in DMSGD's position form: graphs with eigenvalues near -1.
    lazy = graph in ("torus", "bipartite")
    keys = {
        "num-sites": 16,
        "topology.name": graph,
        "topology.lazy": lazy,
        "partition.kind": "classes",
        "partition.classes-per-site": 1,
        "partition.iid-fraction": iid,
    }
    return Setting(name, SMALL | keys, tuned_in=tuned_in)


SMALL = FASHION | {"epochs": 20, "results.evaluate-every": 94}
RING = "ring, 1 class"
FULL, OWN = "DMSGD, omega 1", "DMSGD, omega 0"
QUICK = Size(
    settings=(
        setting(RING),
        setting("complete, 1 class", RING),
        setting("ring, iid", RING, iid=1.0),
    ),
    candidates=candidates(),
    seeds=3,
)
MORE = (
    setting("torus, 1 class", RING),
    setting("bipartite, 1 class", RING),
    setting("ring, 50 % iid", RING, iid=0.5),
    setting("complete, iid", RING, iid=1.0),
)

CLAIM = Claim(
    question="Does consensus on the momentum, too, help peers?",
    about="""
Claimed by the abstract of arXiv 2010.11166: peers that share their momentum with their neighbours
beside their models train better than with competing methods, on several graphs. Sixteen peers, an
exchange a mini-batch of 32; omega weighs the neighbourhood's momentum. On torus and
bipartite graph with `topology.lazy`. The reconstruction is ours
([what is known](../explanation/reconstructions.md)).""",
    quick=QUICK,
    full=replace(QUICK, settings=(*QUICK.settings, *MORE), seeds=5),
    measures=(
        *OF_PEERS,
        Measure("MB", "sent and received", last("megabytes"), False, ".0f"),
    ),
    judgements=(
        *(
            Judgement("Sharing momentum fully gives better peers", "accuracy", FULL, than)
            for than in (OWN, "D-PSGD", "CDSGD", "CDMSGD", "DSGDm")
        ),
        *(
            Judgement("And the worst peer is better", "worst peer", FULL, than)
            for than in (OWN, "CDMSGD")
        ),
        Judgement("Sharing half of it is better than none", "accuracy", "DMSGD, omega 0.5", OWN),
        Judgement("In the velocity form, too", "accuracy", VELOCITY, "CDMSGD"),
        Judgement("Momentum of positions is better than of gradients", "accuracy", FULL, VELOCITY),
    ),
    axes=("round", "megabytes"),
    reading="""
**Consensus on the momentum helps where the momentum is of gradients** (the velocity form): with it
fully shared DMSGD is ahead of CDMSGD, which is the same without sharing, each with the rate and the
momentum that are best for it on the ring with one class a peer, on all four graphs, on like and on
unlike data. A peer's own momentum points to its own classes, and the larger it is the farther it
drives the peer away: rivals come out best with a momentum of 0.6, DMSGD with one close to 1, where
its gain is from. **Where the momentum is of positions** (the default form) the difference of two
positions holds the steps towards the neighbours already, and sharing it, too, adds nothing with one
class a peer, on any graph. There this form is far ahead of all rivals without shared momentum, and
on a ring ahead of the velocity form, too; the more links, the less the forms differ. On a ring
whose peers are alike, or half so, full sharing in the position form costs accuracy; half of it (the
default) costs nothing, and where they are half alike it is the best. All keys are tuned on unlike
data: on like data rivals may be better than they are here, and a smaller momentum may cost full
sharing less. Sharing sends twice the bytes: in the position form omega 0 is as good or nearly so
for half.""",
)
