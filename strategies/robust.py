"""Means that a few hostile contributions cannot move at will, and bounds on a site's share.

Of the rows v_1 .. v_n, of which f may be hostile:

    median         of each coordinate the middle value; of an even number the mean of the two in
                   the middle
    trimmed-mean   of each coordinate the mean without the f smallest and the f largest values
    krum           score_i = sum of |v_i - v_j|^2 over the n - f - 2 nearest j;
                   the mean of the n - f rows of the lowest scores
    clipped        own + sum_j w_j c_j (v_j - own),  c_j = min(1, tau / |v_j - own|),
                   tau = sqrt(sum_j w_j |v_j - own|^2 / delta), the sum without the f furthest j,
                   delta: their weights

and of shares s_k, one that is larger than c is cut to c, and what is cut goes to the others in
proportion to theirs.

Sources: median and trimmed mean: Yin, Chen, Ramchandran, Bartlett, "Byzantine-Robust Distributed
Learning", ICML 2018. Krum: Blanchard, El Mhamdi, Guerraoui, Stainer, "Machine Learning with
Adversaries", NeurIPS 2017, as Multi-Krum; its n - f rows are those of later implementations, the
guarantee of the paper holds for fewer. Clipped: He, Karimireddy, Jaggi, "Byzantine-Robust
Decentralized Learning via ClippedGossip", arXiv 2202.01545; **the radius is reconstructed**: theirs
is made of the good neighbours, which are known to nobody, and stands here for those that are not
the f furthest. Differs: all rows count the same, whatever examples stand behind them, except in
``clipped``. With fewer than 2 f + 1 rows f is as many as there can be (the median); of so few Krum
keeps at least one row.
Special cases: f = 0 is the mean, for Krum too; n rows that are equal are their mean; a cap of 1
changes no share.
Trap: where sites hold different data, honest rows differ, and what all these means leave out is not
only what is hostile.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["mean", "median", "trimmed-mean", "krum", "clipped"]
BLOCK = 1 << 20  # numbers worked on at a time


class Robust(NamedTuple):
    """Which mean, and against how many.

    Attributes:
        kind: its name.
        faulty: f.
    """

    kind: Kind = "mean"
    faulty: int = 1

    @property
    def on(self) -> bool:
        """Whether the rule is another one than the plain mean."""
        return self.kind != "mean"

    @property
    def majority(self) -> int:
        """The fewest rows of which hostile ones are less than half."""
        return 3 if self.kind == "median" else 2 * self.faulty + 1


PLAIN = Robust()


def trimmed_mean(rows: Tensor, faulty: int) -> Tensor:
    """The mean [d] of rows [n, d] without the ``faulty`` smallest and largest of each coordinate.

    At least the middle stays.
    """
    n = len(rows)
    cut = min(faulty, (n - 1) // 2)
    return rows.sort(0).values[cut : n - cut].mean(0)


def median(rows: Tensor) -> Tensor:
    """The median [d] of rows [n, d]."""
    return trimmed_mean(rows, len(rows))


def krum(squares: Tensor, faulty: int) -> list[int]:
    """The rows that Multi-Krum keeps, in their order, by their squared distances [n, n]."""
    n = len(squares)
    near = max(1, n - faulty - 2)
    # A row's distance to itself is 0, and the first.
    scores = squares.sort(1).values[:, 1 : near + 1].sum(1)
    return sorted(scores.argsort(stable=True)[: max(1, n - faulty)].tolist())


# The rows' coordinates from the first to before the second, [n, .].
Rows = Callable[[int, int], Tensor]


def combined(
    rows: Rows, count: int, size: int, robust: Robust, judged: int | None = None
) -> Tensor:
    """The robust mean [size] of ``count`` rows, block by block: they may be on disk.

    Args:
        rows: gives blocks of them.
        count: n.
        size: d.
        robust: which mean; not ``clipped``, which has a centre.
        judged: Krum's distances are those of so many first coordinates; by default of all.
    """
    step = max(1, BLOCK // count)
    blocks = [(start, min(start + step, size)) for start in range(0, size, step)]
    kept = list(range(count))
    if robust.kind == "krum":
        squares, end = (
            torch.zeros(count, count, dtype=torch.float64),
            size if judged is None else judged,
        )
        for start, stop in blocks:
            if start < end:
                block = rows(start, min(stop, end)).double()
                squares += torch.cdist(
                    block, block, compute_mode="donot_use_mm_for_euclid_dist"
                ).square_()
        kept = krum(squares, robust.faulty)
    faulty = {"median": count, "trimmed-mean": robust.faulty}.get(robust.kind, 0)
    found = torch.empty(size)
    for start, stop in blocks:
        found[start:stop] = trimmed_mean(rows(start, stop)[kept], faulty)
    return found


def mean_of(vectors: Sequence[Tensor], robust: Robust) -> Tensor:
    """The robust mean [d] of vectors [d] in memory."""
    return combined(
        lambda a, b: torch.stack([each[a:b] for each in vectors]),
        len(vectors),
        len(vectors[0]),
        robust,
    )


def clipped(
    own: Tensor, theirs: Mapping[int, Tensor], weights: Mapping[int, float], faulty: int
) -> Tensor:
    """ClippedGossip: ``own`` [d] and what neighbours sent, each pulled to within a radius of it.

    The ``faulty`` furthest decide nothing about the radius; where no others sent anything, it is 0.
    """
    lengths = {j: float(torch.linalg.vector_norm(vector - own)) for j, vector in theirs.items()}
    furthest = sorted(lengths, key=lambda j: lengths[j])[max(0, len(lengths) - faulty) :]
    delta = sum(weights[j] for j in furthest)
    inside = math.fsum(weights[j] * length**2 for j, length in lengths.items() if j not in furthest)
    radius = math.sqrt(inside / delta) if furthest else math.inf
    found = own.clone()
    for j, vector in theirs.items():
        scale = min(1.0, radius / lengths[j]) if lengths[j] else 1.0
        found.add_(vector - own, alpha=weights[j] * scale)
    return found


def neighbourhood_mean(
    own: Tensor, theirs: Mapping[int, Tensor], weights: Mapping[int, float], robust: Robust
) -> Tensor:
    """The robust mean of a peer's ``own`` vector [d] and its neighbours'.

    Median and trimmed mean are those of all of these, which count the same (BRIDGE: Yang and Bajwa,
    "BRIDGE: Byzantine-Resilient Decentralized Gradient Descent", arXiv 1908.08098).
    """
    if robust.kind == "clipped":
        return clipped(own, theirs, weights, robust.faulty)
    return mean_of([own, *theirs.values()], robust)


def capped(shares: Mapping[int, float], most: float) -> dict[int, float]:
    """Shares, together 1, of which none is larger than ``most`` (or 1 / n, if that is larger)."""
    most, found = max(most, 1 / max(1, len(shares))), dict(shares)
    full: set[int] = set()
    while over := {k for k, share in found.items() if share > most + 1e-12} - full:
        full |= over
        rest = sum(share for k, share in shares.items() if k not in full)
        left = 1 - most * len(full)
        found = {k: most if k in full else share / rest * left for k, share in shares.items()}
    return found
