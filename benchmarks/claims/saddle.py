"""SADDLe: sharpness-aware peers against the methods that they stand on, and compression."""

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
    final,
    last,
    steps,
)
from benchmarks.claims.data import FASHION
from benchmarks.claims.flatness import largest_eigenvalue
from simulation.laboratory import Run

STRATEGIES = {"QGM": "qgm", "Q-SADDLe": "q-saddle", "NGM": "ngm", "N-SADDLe": "n-saddle"}
EIGHT = tuple((name, 8) for name in STRATEGIES)
FOUR = (("QGM", 4), ("Q-SADDLe", 4))
PAIRS = (("Q-SADDLe", "QGM"), ("N-SADDLe", "NGM"))


def flatness(run: Run) -> dict[str, float]:
    """See :mod:`benchmarks.claims.flatness`."""
    return {"lambda": largest_eigenvalue(run)}


def of(name: str, bits: int = 0) -> Candidate:
    """With learning rates, and its radius, or where it has none its momentum; 0 bits: all."""
    strategy = STRATEGIES[name]
    keys: dict[str, Any] = {"strategy": strategy}
    if bits:
        keys |= {
            "wire.codec": "qsgd",
            "wire.bits": bits,
            "wire.error-feedback": "choco",
            "topology.averaging-rate": 0.9 if bits > 4 else 0.5,
        }
        if strategy in ("ngm", "n-saddle"):
            keys["wire.cross-codec"] = "qsgd"
    key, values = ("rho", [0.02, 0.1]) if strategy.endswith("saddle") else ("momentum", [0.9, 0.6])
    space = {"training.lr": steps(0.005, 0.05, 3), f"{strategy}.{key}": values}
    return Candidate(f"{name}, {bits} bits" if bits else name, keys, space)


def setting(
    name: str, sites: int, alpha: float = 0.0, tuned_in: str = "", coded: bool = False
) -> Setting:
    """On a graph of this name; with a Dirichlet of ``alpha``, or one class each."""
    keys: dict[str, Any] = {"num-sites": sites, "topology.name": name.split()[0]}
    keys["partition.kind"] = "dirichlet-equal" if alpha else "classes"
    keys |= {"partition.alpha": alpha} if alpha else {"partition.classes-per-site": 1}
    shown = () if coded else tuple(STRATEGIES)
    return Setting(name, SMALL | keys, tuned_in=tuned_in, candidates=shown)


SMALL = FASHION | {"epochs": 5, "results.evaluate-every": 100}
CODED, SKEWED = "ring of 5, Dirichlet 0.1", "ring of 5, Dirichlet 0.01"
RING = "ring of 10, 1 class"
QUICK = Size(
    settings=(
        setting(CODED, 5, 0.1, coded=True),
        setting(SKEWED, 5, 0.01, CODED),
        setting(RING, 10, tuned_in=CODED),
    ),
    candidates=(*map(of, STRATEGIES), *(of(*each) for each in EIGHT)),
    seeds=3,
)
MORE = (
    setting("ring of 5, Dirichlet 1", 5, 1.0, CODED),
    setting("ring of 5, Dirichlet 0.001", 5, 0.001, CODED),
    setting("ring of 20, 1 class", 20, tuned_in=CODED),
    setting("ring of 40, 1 class", 40, tuned_in=CODED),
    setting("torus of 16, Dirichlet 0.1", 16, 0.1, CODED),
)

CLAIM = Claim(
    question="Are sharpness-aware peers better on unlike data, and cheaper to compress?",
    about="""
Claimed by the abstract of arXiv 2405.13961: SADDLe's peers are 1 to 20 points more accurate than
existing ones on unlike data, and lose about 1 point when they send a quarter of the bytes. Against
what each stands on: Q-SADDLe against QGM, N-SADDLe against NGM; an exchange a mini-batch of 32, for
five epochs, so that more peers have fewer exchanges. 8 and 4 bits: QSGD with CHOCO, also of
cross-gradients. Lambda is the largest eigenvalue of the Hessian of the training loss at the mean
model (fifteen steps of power iteration on 2,000 examples). The reconstruction is ours ([what is
known](../explanation/reconstructions.md)).""",
    quick=QUICK,
    full=replace(
        QUICK,
        settings=(*QUICK.settings, *MORE),
        candidates=(*QUICK.candidates, *(of(*each) for each in FOUR)),
        seeds=5,
    ),
    measures=(
        *OF_PEERS,
        Measure("lambda", "see above", final("lambda"), False, ".1f"),
        Measure("MB", "sent and received", last("megabytes"), False, ".0f"),
    ),
    judgements=(
        *(
            Judgement("At least 1 point more accurate", "accuracy", better, than, 0.01)
            for better, than in PAIRS
        ),
        *(
            Judgement("Better models also where they are averaged", "mean model", better, than)
            for better, than in PAIRS
        ),
        *(
            Judgement("At least twice as flat", "lambda", better, than, 0.5, relative=True)
            for better, than in PAIRS
        ),
        *(
            Judgement(
                "Compressed, less accurate by 1 point at most",
                "accuracy",
                f"{name}, {bits} bits",
                name,
                -0.01,
            )
            for name, bits in (*EIGHT, *FOUR)
        ),
    ),
    axes=("round", "megabytes"),
    final=flatness,
    reading="""
**On unlike data Q-SADDLe is ahead of QGM by more than a point**, wherever labels are skewed on a
ring (Dirichlet 0.1 or less, or one class each, up to 40 peers); where data are alike the two are
level, and on the torus, where each peer has four neighbours and the keys are those tuned on the
ring, Q-SADDLe is no better, and its mean model and its worst peer are worse. **N-SADDLe is ahead of
NGM in every setting**, in two within chance, by a point for certain in half of them; its mean model
is ahead all but where data are alike. Q-SADDLe's mean model is not, among 20 and 40 peers with one
class each. Both take twice the gradients of what they stand on. **Models are far flatter**
everywhere, less so with many peers. **8 bits, a quarter of the bytes, cost less than a point**,
which is undecided for QGM only, whose mean model loses two; that was measured in the first setting
only. 4 bits cost QGM and Q-SADDLe about three points, Q-SADDLe's mean model less than one.""",
)
