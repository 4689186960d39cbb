"""Which sites take part in a run at the moment.

The roster knows which sites are here, which are away and why, which are called again, and whether
there are enough.

One roster for all drivers. It sends nothing and looks at no clock: the driver tells it what
happened, and the time.

A site is *here* until it fails (it answers, but with nothing that can be used) or is silent (it
does not answer, or the grid lost it). From then on it is *away*: nobody waits for it, and it is
called again without being waited for. With its next answer it is here again.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

LONGEST_PAUSE = 64


@dataclass
class Standing:
    """The state of one site in the roster.

    Attributes:
        state: here, failed or silent; of the latter two, why, and since when.
        called: whether it was called again since it failed: until then it is sure to fail again.
        connected: whether the grid has it.
        call_from: the driver's count from which on it is called again.
        failures: and calls that nobody waited for since its last answer.
        returned: whether the grid had it again since it went away.
    """

    state: Literal["here", "failed", "silent"] = "here"
    reason: str = ""
    since: float = 0.0
    called: bool = False
    connected: bool = True
    call_from: int = 0
    failures: int = 0
    returned: bool = False

    @property
    def will_fail(self) -> bool:
        """Whether it would fail again if it were called now."""
        return self.state == "failed" and not self.called


class Roster:
    """The sites of a run.

    Args:
        sites: by whatever the driver knows them, what they are called in an error.
        least: with fewer here the run stops.
        patience_s: after so many seconds.
    """

    def __init__(self, sites: Mapping[int, str], least: int, patience_s: float) -> None:
        self._names = sites
        self._sites = {site: Standing() for site in sites}
        self.least = min(least, len(self._sites))
        self._patience_s = patience_s

    # Checkpoints.

    def state_dict(self) -> dict[int, Standing]:
        """The standing of each site."""
        return dict(self._sites)

    def load_state_dict(self, state: Mapping[int, Standing], now: float) -> None:
        """Go on from there; who is away has been for no time, and may be back."""
        for site, standing in state.items():
            self._sites[site] = replace(standing, since=now, connected=True, returned=False)

    # What happened.

    def lose(
        self, site: int, reason: str, now: float, *, failed: bool = False, call_from: int = 0
    ) -> None:
        """A site failed or is silent: it is away.

        It is called again from the driver's count ``call_from`` on.
        """
        standing = self._sites[site]
        if standing.state == "here":
            standing.since, standing.returned = now, False
        standing.state, standing.called = "failed" if failed else "silent", False
        standing.reason, standing.call_from = reason, call_from
        standing.failures += 1

    def call(self, site: int, call_from: int | None = None) -> None:
        """A site is called again.

        If it is not waited for, it is called once more from the driver's count ``call_from`` on.
        """
        standing = self._sites[site]
        standing.called = True
        if call_from is not None:
            standing.call_from = call_from
            standing.failures += 1

    def call_silent_now(self) -> None:
        """Let silent sites be called at once: nothing else moves the driver's count."""
        for standing in self._sites.values():
            standing.call_from = 0 if standing.state == "silent" else standing.call_from

    def answer(self, site: int) -> bool:
        """Note that a site answered and is here; return whether it was away."""
        standing = self._sites[site]
        was_away, standing.state, standing.failures = standing.state != "here", "here", 0
        return was_away

    def update_connected(self, connected: Collection[int], now: float) -> list[int]:
        """Note which sites the grid has; return those that are back.

        The time of one that was away begins now, but only once: a run in which sites come and go
        and never answer ends.
        """
        back = [
            site for site, each in self._sites.items() if site in connected and not each.connected
        ]
        for site, standing in self._sites.items():
            standing.connected = site in connected
        for site in back:
            if not self._sites[site].returned:
                self._sites[site].since, self._sites[site].returned = now, True
        return back

    # Who takes part.

    def here(self) -> list[int]:
        """The sites that are here: those that are waited for."""
        return [site for site, standing in self._sites.items() if standing.state == "here"]

    def away(self, site: int) -> bool:
        """Whether a site is away: nobody waits for it."""
        return self._sites[site].state != "here"

    def silent(self, site: int) -> bool:
        """Whether a site is away because it does not answer."""
        return self._sites[site].state == "silent"

    def due(self, count: int) -> list[int]:
        """The sites that are away, connected, and due to be called at the driver's ``count``."""
        away = ((site, each) for site, each in self._sites.items() if each.state != "here")
        return [site for site, each in away if each.connected and each.call_from <= count]

    def pause(self, site: int) -> int:
        """How long, in the driver's count, a site that is lost now is not called.

        The pause doubles with each failure, up to a limit.
        """
        return min(1 << self._sites[site].failures, LONGEST_PAUSE)

    # Whether there are enough.

    @property
    def recoverable(self) -> bool:
        """Whether enough sites are here or may come back."""
        return sum(not standing.will_fail for standing in self._sites.values()) >= self.least

    def left_s(self, now: float) -> float:
        """Seconds until the run stops with too few sites here; infinite while there are enough."""
        gone = sorted(
            standing.since for standing in self._sites.values() if standing.state != "here"
        )
        spare = len(self._sites) - self.least
        if len(gone) <= spare:
            return math.inf
        return gone[spare] + self._patience_s - now if self.recoverable else 0.0

    def shortage(self, who: str = "sites") -> str:
        """Why the run stops with too few sites, for an error message."""
        when = (
            f"after patience-s = {self._patience_s:g}" if self.recoverable else "and no others will"
        )
        reasons = {
            self._names[site]: each.reason
            for site, each in self._sites.items()
            if each.state != "here"
        }
        return (
            f"{len(self.here())} {who} go on {when}, min-sites = {self.least}: stopped. "
            f"{grouped_reasons(reasons)}"
        )


def grouped_reasons(reasons: Mapping[str, str]) -> str:
    """Why sites are left out, by their names: those of the same reason together, the first few."""
    of_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        of_reason.setdefault(reason, []).append(name)
    shown = [
        f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}: {reason}"
        for reason, names in of_reason.items()
    ]
    return "; ".join(shown[:5]) + ("; ..." if len(shown) > 5 else "")
