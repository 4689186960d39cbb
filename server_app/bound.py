"""How far one contribution may move the model: a multiple of the median over the sites.

    refused  <=>  |change| > c median_k a_k   and   |change| / s > c median_k b_k

``a_k`` is the largest norm of a change that site k sent and that was accepted, ``b_k`` the largest
norm over ``s``, the sum of the learning rates of the site's steps. A change is refused only if it
exceeds both: sites with more data take more steps, and rates rise and fall. The largest and not the
newest: where a site has learned its part, its next batches move nothing, until one does.

Half of the sites would have to be broken for the median to be. Until three sites have answered, the
model's own norm stands for ``median_k a_k``: of two, it is unknown which is wrong. Peers bound what
neighbours send by their own model, too (:mod:`strategies.peer.step`).
"""

from collections.abc import Mapping
from statistics import median
from typing import NamedTuple

FEW = 3
HINT = "where every site does, a smaller training.lr may help"


class Change(NamedTuple):
    """How far a contribution moved a vector: its norm, and the sum of the steps' learning rates."""

    norm: float
    rates: float


class Bound:
    """The bound on the change of one vector of the model.

    Args:
        multiple: c; 0 for no bound.

    Attributes:
        largest: of each site, norms and norms over rates.
    """

    def __init__(self, multiple: float) -> None:
        self._multiple = multiple
        self.largest: dict[int, Change] = {}

    @property
    def few(self) -> bool:
        """Whether there is no median yet."""
        return len(self.largest) < FEW

    def violation(
        self, change: Change, size: float, others: Mapping[int, Change] | None = None
    ) -> str | None:
        """How a contribution breaks the bound, or None.

        Args:
            change: that it makes.
            size: norm of the model.
            others: what each site sent, this one too, where none was taken yet.
        """
        known = (
            list(self.largest.values())
            if others is None
            else [_relative(each) for each in others.values()]
        )
        reference = median(each.norm for each in known) if len(known) >= FEW else 0.0
        allowed = self._multiple * (reference or size)
        if not allowed or change.norm <= allowed:  # also of no bound
            return None
        relative = self._multiple * median(each.rates for each in known) if reference else 0.0
        if _relative(change).rates <= relative:
            return None
        what = "the median over the sites" if reference else "the model's norm"
        return (
            f"it moves the model by {change.norm:.3g}; "
            f"at most {self._multiple:g} times {what}, {allowed:.3g} (max-change); {HINT}"
        )

    def accept(self, site: int, change: Change) -> None:
        """Note that a site's contribution was accepted."""
        old, new = self.largest.get(site, Change(0.0, 0.0)), _relative(change)
        self.largest[site] = Change(max(old.norm, new.norm), max(old.rates, new.rates))


def _relative(change: Change) -> Change:
    return Change(change.norm, change.norm / change.rates if change.rates else 0.0)
