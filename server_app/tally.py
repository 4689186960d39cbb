"""Sums of what peers report between two tests."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from server_app.report import Snapshot
from strategies.averaging.average import NUM_EXAMPLES
from strategies.protocol import StepMetrics


@dataclass
class PeerTest:
    """Peers' tests after an exchange, and what they reported of their training before.

    Attributes:
        moment: of the last answer.
        answers: of each peer, what it reported.
        train: of each peer, means since its last test; the first and the last rate.
    """

    snapshot: Snapshot
    answers: dict[int, dict[str, float | list[float]]] = field(default_factory=dict)
    train: dict[int, dict[str, float]] = field(default_factory=dict)

    def train_means(self) -> dict[str, float]:
        """The mean of each training metric over the peers that report it."""
        names = sorted({name for each in self.train.values() for name in each})
        found = {
            name: [each[name] for each in self.train.values() if name in each] for name in names
        }
        return {name: sum(values) / len(values) for name, values in found.items()}


class Tally:
    """Gathers what peers report.

    Args:
        before: whether what a peer trained in the step in which it tests came before the test.
    """

    def __init__(self, *, before: bool) -> None:
        self._before = before
        self._tests: dict[int, PeerTest] = {}
        self._train: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def state_dict(self) -> dict[str, Any]:
        """The state, as plain values."""
        tests = {
            number: (tuple(test.snapshot), test.answers, test.train)
            for number, test in self._tests.items()
        }
        return {"tests": tests, "train": {peer: dict(found) for peer, found in self._train.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state."""
        for number, (snapshot, answers, train) in state["tests"].items():
            self._tests[number] = PeerTest(Snapshot(*snapshot), answers, train)
        for peer, found in state["train"].items():
            self._train[peer].update(found)

    def add(self, peer: int, metrics: StepMetrics, number: int | None, snapshot: Snapshot) -> None:
        """A peer took a step, in which it tested after the exchange ``number``, or not."""
        if metrics.disagreement is not None:  # before it trained on
            self._train[peer]["disagreement"].append(metrics.disagreement)
        if self._before:
            self._trained(peer, metrics)
        if number is not None:
            self._tested(peer, metrics, number, snapshot)
        if not self._before:
            self._trained(peer, metrics)

    def _trained(self, peer: int, metrics: StepMetrics) -> None:
        for name, value in (
            ("loss", metrics.loss),
            ("lr-first", metrics.lr_first),
            ("lr-last", metrics.lr_last),
        ):
            if value is not None:
                self._train[peer][name].append(value)

    def _tested(self, peer: int, metrics: StepMetrics, number: int, snapshot: Snapshot) -> None:
        test = self._tests.setdefault(number, PeerTest(snapshot))
        test.snapshot = snapshot
        found = {
            NUM_EXAMPLES: metrics.test_examples,
            "loss": metrics.test_loss,
            "accuracy": metrics.test_accuracy,
            "means": metrics.test_means,
        }
        test.answers[peer] = {name: value for name, value in found.items() if value is not None}
        trained = self._train.pop(peer, {})
        test.train[peer] = {name: sum(values) / len(values) for name, values in trained.items()}
        test.train[peer] |= {
            name: trained[name][end]
            for name, end in (("lr-first", 0), ("lr-last", -1))
            if name in trained
        }

    def pending(self) -> list[int]:
        """After which exchanges peers tested, of what was not taken yet."""
        return sorted(self._tests)

    def answered(self, number: int) -> Collection[int]:
        """The peers that tested after an exchange."""
        return self._tests[number].answers.keys()

    def pop(self, number: int) -> PeerTest:
        """Remove and return the test after an exchange."""
        return self._tests.pop(number)
