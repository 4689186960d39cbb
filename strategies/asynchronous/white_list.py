"""The white list: every site contributes once before any contributes again.

    site k may contribute  <=>  c_k - min_j c_j <= slack

over the active sites j, where c counts contributions so far.

With slack 0 the sites that may contribute are a list from which each one is struck when it did,
refilled when it is empty. A contribution that may not be applied yet waits, in the order of
arrival. An infinite slack applies everything at once. Readings:

* list: a site waits for its turn, too, and starts again with the model of its release.
* refill: a site that contributed waits until all have; then all are sent the same newest model.
* local: a site goes on working while its contribution waits, and what it sends in the meantime is
  averaged with it.

Source: "white-list scheduling" of GSGM (arXiv 1902.07848). **Reconstructed from the abstracts**;
when the list is refilled, the slack and all readings of waiting are ours.
Invariant: contributions of active sites never differ by more than 1 + slack; with slack 0, an
update's staleness is at most 2 (N - 1) in the reading "list", and that of the k-th arrival of a
list is k - 1 in the reading "refill".
"""

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

Site = TypeVar("Site", bound=Hashable)


class WhiteList(Generic[Site]):
    """Decides whose contribution is applied when.

    Args:
        sites: all active.
        slack: how far a site may be ahead of the slowest, besides the one contribution that it is
            always ahead with.

    Attributes:
        counts: contributions applied, of each site.
    """

    def __init__(self, sites: Iterable[Site], slack: float) -> None:
        self.counts: dict[Site, int] = dict.fromkeys(sites, 0)
        self._slack = slack
        self._active = set(self.counts)
        self._waiting: list[Site] = []  # in the order of arrival

    def waits(self, site: Site) -> bool:
        """Whether a contribution of the site is waiting."""
        return site in self._waiting

    def arrive(self, site: Site) -> list[Site]:
        """A contribution of ``site`` arrived: whose contributions are now applied, in this order.

        A site that was set aside is active again, as if it had contributed as often as the slowest.
        """
        if site not in self._active:
            self.counts[site] = max(self.counts[site], self._least())
            self._active.add(site)
        if not self.waits(site):
            self._waiting.append(site)
        return self._release()

    @property
    def even(self) -> bool:
        """Whether all active sites contributed equally often: the list is refilled."""
        return len({self.counts[site] for site in self._active}) <= 1

    def set_aside(self, site: Site) -> list[Site]:
        """Nobody waits for ``site`` any more: whose contributions are now applied."""
        self._active.discard(site)
        return self._release()

    def _least(self) -> int:
        return min(
            (self.counts[site] for site in self._active),
            default=max(self.counts.values(), default=0),
        )

    def _release(self) -> list[Site]:
        released: list[Site] = []
        while allowed := [
            site for site in self._waiting if self.counts[site] - self._least() <= self._slack
        ]:
            self._waiting.remove(allowed[0])
            self.counts[allowed[0]] += 1
            released.append(allowed[0])
        return released
