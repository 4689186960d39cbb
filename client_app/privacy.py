"""Differential privacy of what a site sends: clipping, Gaussian noise, and an account.

The site decides on it; the account is of what is spent.

    u <- u min(1, C / |u|) + z C n,   n ~ N(0, I)

``u`` is what the site's data did: how far a model came in an order to train, with all that is sent
beside it as one vector; for a peer, whose model leaves with each exchange, every gradient. Whatever
the data are, clipped ``u`` differ by at most 2 C, so that an answer is a Gaussian mechanism of
noise multiplier z / 2 for any change of them, from one example to all. Answers compose to one of
``1 / sqrt(sum 1 / (z_t / 2)^2)``; epsilon at delta is that of Balle and Wang, "Improving the
Gaussian Mechanism for Differential Privacy", ICML 2018, as the library dp-accounting computes it.

Not covered: what a site says of itself before the first round (numbers of examples, names of
classes, each column's count, mean and variance), attacks on floating-point noise (Mironov, CCS
2012), and how long the site works.
"""

import json
import math
import os
import secrets
from bisect import bisect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from flwr.app import Context
from torch import Tensor

from configuration.files import write_whole

CLIP, MULTIPLIER, DELTA, EPSILON = (
    "privacy.clip-norm",
    "privacy.noise-multiplier",
    "privacy.delta",
    "privacy.epsilon",
)
SEED = "privacy.seed"  # 64 hexadecimal digits, where several processes must draw the same noise
PIECE = 2**20  # numbers that are drawn at once


class BudgetError(ValueError):
    """The site's epsilon is spent."""


def cost_of(multiplier: float) -> float:
    """The cost of an answer: its inverse squared noise multiplier."""
    return (2 / multiplier) ** 2


class Account:
    """The privacy that a site has spent, in a file that outlives every process.

    Args:
        folder: the site's state.
        delta: of (epsilon, delta).
    """

    def __init__(self, folder: Path, delta: float) -> None:
        self._file, self._delta = folder / "privacy.json", delta

    def _spent(self) -> float:
        """The sum of the inverse squared noise multipliers.

        Raises:
            ValueError: the file does not say it.
        """
        if not self._file.exists():
            return 0.0
        try:
            spent = float(json.loads(self._file.read_text())["spent"])
        except (ValueError, KeyError, TypeError):
            spent = math.nan
        if not 0 <= spent < math.inf:
            raise ValueError(
                f"{self._file} is damaged; bring it back from a copy, "
                "nothing else says what is spent"
            )
        return spent

    def epsilon(self, more: float = 0.0) -> float:
        """The epsilon that is spent so far, or would be with ``more`` cost."""
        from dp_accounting import get_epsilon_gaussian  # not above: a second, and few sites ask

        spent = self._spent() + more
        return get_epsilon_gaussian(1 / math.sqrt(spent), self._delta) if spent else 0.0

    def answers_left(self, cost: float, budget: float) -> int:
        """How many answers of such a cost are left, at most a million."""
        return bisect(range(10**6), budget, key=lambda uses: self.epsilon((uses + 1) * cost))

    def charge(self, more: float) -> None:
        """Spend ``more``; it is on disk when this returns: only then may an answer leave."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._file, json.dumps({"spent": self._spent() + more}).encode())


class _Normal:
    """Standard normal numbers that nobody can guess.

    Source: Box and Muller (1958), on AES-256 in counter mode. Not torch's generator: on a CPU it
    takes 32 bits of a seed, so that an hour's work finds the noise and takes it away.
    """

    def __init__(self, key: bytes) -> None:
        self._bits = Cipher(AES256(key), CTR(bytes(16))).encryptor()

    def draw(self, vector: Tensor) -> Tensor:
        """Normal numbers in the shape of ``vector``, on its device."""
        found = torch.empty(vector.numel())
        for piece in found.split(PIECE):
            pairs = -(-len(piece) // 2)
            u, v = (
                np.frombuffer(self._bits.update(bytes(16 * pairs)), np.uint64).reshape(2, pairs)
                >> 11
            ) / 2**53  # [0, 1)
            radius, angle = np.sqrt(-2 * np.log1p(-u)), 2 * math.pi * v
            both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
            piece.copy_(torch.from_numpy(both[: len(piece)]))
        return found.view(vector.shape).to(vector.device)


def _keeps_account() -> bool:
    """Whether this process keeps the account: the other ones of a site use the same noise."""
    return os.environ.get("RANK", "0") == "0"


class Noise:
    """Clips and adds noise.

    Args:
        clip_norm: C, the Euclidean norm that is left.
        multiplier: z, the noise's standard deviation in each coordinate as a multiple of C.
        account: what is charged.
        budget: the largest epsilon.
        seed: of the noise, 32 bytes; nobody else may know it.
    """

    def __init__(
        self, clip_norm: float, multiplier: float, account: Account, budget: float, seed: bytes
    ) -> None:
        self._clip, self._multiplier, self._account, self._budget = (
            clip_norm,
            multiplier,
            account,
            budget,
        )
        self._normal, self._uses = _Normal(seed), 0

    @classmethod
    def of(cls, context: Context) -> "Noise | None":
        """The noise that the node's configuration asks for; None where it asks for none.

        Raises:
            BudgetError: not even one answer is left.
        """
        node: dict[str, Any] = dict(context.node_config)
        if CLIP not in node:
            return None
        account, seed = (
            Account(Path(node.get("state", "")), node[DELTA]),
            bytes.fromhex(node.get(SEED) or secrets.token_hex(32)),
        )
        found = cls(node[CLIP], node[MULTIPLIER], account, node[EPSILON], seed)
        if _keeps_account():
            found._check(1)
        return found

    def __call__(self, vectors: list[Tensor]) -> list[Tensor]:
        """The vectors, clipped to one common norm, with noise."""
        self._uses += 1
        norm = torch.stack([vector.norm() for vector in vectors]).norm()
        # 0 / 0 and what is not finite: nothing leaves.
        share = (self._clip / norm).clamp(max=1.0).nan_to_num()
        deviation = self._clip * self._multiplier
        return [
            (vector * share).nan_to_num(0.0, 0.0, 0.0) + deviation * self._normal.draw(vector)
            for vector in vectors
        ]

    def _check(self, uses: int) -> float:
        cost = uses * cost_of(self._multiplier)
        if (epsilon := self._account.epsilon(cost)) > self._budget:
            raise BudgetError(
                f"privacy.epsilon = {self._budget:g}: with this answer it would be {epsilon:.4g}"
            )
        return cost

    def charge(self) -> None:
        """Charge what was used since the last time; before the answer leaves.

        Raises:
            BudgetError: it is more than is left.
        """
        if _keeps_account():
            self._account.charge(self._check(self._uses))
        self._uses = 0
