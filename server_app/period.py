"""Statistics of an asynchronous run between two tests."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from server_app.report import Snapshot
from strategies.protocol import TrainMetrics


class Period:
    """Statistics of the contributions since the last test.

    Args:
        start: how far the run was then.
    """

    def __init__(self, start: float) -> None:
        self.start = start
        self._losses: dict[int, list[float]] = defaultdict(list)
        self._ages: dict[int, list[float]] = defaultdict(list)
        self._rates: list[float] = []

    def trained(self, node: int, metrics: TrainMetrics) -> None:
        """Add a contribution of a site."""
        if metrics.loss is not None:
            self._losses[node].append(metrics.loss)
        self._rates.append(metrics.lr_first)

    def applied(self, node: int, ages: Sequence[int]) -> None:
        """Note that a site's contribution, with parts of these ages, changed the model."""
        self._ages[node].append(sum(ages) / len(ages))

    def means(self, nodes: Sequence[int]) -> tuple[dict[int, dict[str, float]], dict[str, float]]:
        """Updates, mean staleness and loss of each site, and over all."""
        ages, losses = (
            [each for of_site in known.values() for each in of_site]
            for known in (self._ages, self._losses)
        )
        of_sites = {
            node: _row(self._ages.get(node, []), self._losses.get(node, [])) for node in nodes
        }
        of_all = _row(ages, losses)
        of_all |= {"lr-first": self._rates[0], "lr-last": self._rates[-1]} if self._rates else {}
        counts = sorted(Counter(map(round, ages)).items())
        return of_sites, of_all | {f"staleness-{age}": float(count) for age, count in counts}


def _row(ages: Sequence[float], losses: Sequence[float]) -> dict[str, float]:
    found = {"updates": float(len(ages)), "staleness": _mean(ages), "loss": _mean(losses)}
    return {name: value for name, value in found.items() if not math.isnan(value)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


@dataclass
class PendingTest:
    """A test under way.

    Attributes:
        snapshot, done: how far the run was.
        waiting: whose answers are still to come.
        train: means over the sites of what training reported before.
        answers: what sites found, by node.
        lost: whether any was away before it answered.
    """

    snapshot: Snapshot
    done: float
    waiting: set[int]
    train: Mapping[str, float]
    answers: dict[int, dict[str, float]] = field(default_factory=dict)
    lost: bool = False
