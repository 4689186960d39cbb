"""The events of a run: drivers emit them, and sinks receive them."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flwr.app import Array, ArrayRecord

from models.flat import FlatModel
from server_app.discovery import Federation, Site

EVERYBODY = "all"  # the site of a metric that is the mean over sites


class Began(NamedTuple):
    """The sites are known, and the network, at its initial model."""

    federation: Federation
    model: FlatModel


class Reported(NamedTuple):
    """Metrics of one site, or the mean over them.

    Attributes:
        number: of the round, update or exchange.
        seconds: since the first round.
        site: its number, or ``EVERYBODY``.
        split: train, test, consensus or links.
        metrics: by name.
        bytes_up, bytes_down: to the server and from it, so far.
    """

    number: int
    seconds: float
    site: int | str
    split: str
    metrics: Mapping[str, float]
    bytes_up: int
    bytes_down: int


class Refused(NamedTuple):
    """What a site sent cannot be used; ``str`` makes a line of it.

    Attributes:
        when: the round, update or step.
        site: whose it is.
        phase: what the site is left out of.
        reason: why.
        rule: the key of the configuration by which it is refused; empty where the answer cannot be
            read.
        seconds: since the first round.
        by: the peer that says so; empty where the server does.
    """

    when: str
    site: Site
    phase: str
    reason: str
    rule: str = ""
    seconds: float = 0.0
    by: str = ""

    def __str__(self) -> str:
        if self.by:
            return (
                f"{self.when}: {self.by} refuses what came from site {self.site.number}: "
                f"{self.reason}"
            )
        return (
            f"{self.when}: {self.site.name} (site {self.site.number}) is left out of the "
            f"{self.phase}: {self.reason}"
        )


class NewModel(NamedTuple):
    """The newest model, or all sites' models where they learn alone: a row each."""

    arrays: ArrayRecord


class Checkpoint(NamedTuple):
    """The run could go on from here.

    Attributes:
        state: gives the driver's own state, plain values and tensors; called at once or not at all,
            as ``offers`` is.
        offers: what peers offered and is not delivered yet, by name.
    """

    state: Callable[[], dict[str, Any]]
    offers: Callable[[], dict[str, Mapping[str, Array]]] = dict


class Away(NamedTuple):
    """A site is no longer connected; ``str`` makes a line of it."""

    site: Site

    def __str__(self) -> str:
        return f"{self.site.name} (site {self.site.number}) is not connected"


class Back(NamedTuple):
    """A site is connected again; ``str`` makes a line of it."""

    site: Site

    def __str__(self) -> str:
        return f"{self.site.name} (site {self.site.number}) is connected again"


class Progress(NamedTuple):
    """How far a run is after a round; ``str`` makes a line of it.

    Attributes:
        unit: what is counted: round, update of the server, or exchange of peers.
        round_number: how many there were.
        epochs: local epochs of this round (a fraction where it counts steps), or None where there
            are no rounds.
        done, total: local epochs a site so far (a fraction where sites do not go in rounds), and of
            the whole run.
        seconds: since the first round.
        megabytes: sent and received so far.
        train, test: means over the sites.
        tested: the round after which they tested; None after this one.
        headline: the metric by which the run's task is judged.
    """

    unit: str
    round_number: int
    epochs: float | None
    done: float
    total: int
    seconds: float
    megabytes: float
    train: Mapping[str, float]
    test: Mapping[str, float]
    tested: int | None = None
    headline: str = "accuracy"

    def __str__(self) -> str:
        rates = (
            f"{self.train.get('lr-first', math.nan):.2g} to "
            f"{self.train.get('lr-last', math.nan):.2g}"
        )
        rounds = self.epochs is not None
        before = "" if self.tested is None else f" (round {self.tested})"
        left = self.seconds / self.done * (self.total - self.done) if self.done else math.nan
        parts = (
            f"{self.unit} {self.round_number:>{3 if rounds else 5}}",
            f"epoch {round(self.done):>{len(str(self.total))}}/{self.total}"
            + (f" (+{self.epochs:.3g})" if rounds else ""),
            f"lr {rates:<15}",
            f"train loss {self.train['loss']:.4f}" if "loss" in self.train else "",
            f"test {self.headline} {self.test[self.headline]:.4f}{before}"
            if self.headline in self.test
            else "",
            f"moved {self.train['model-change']:.3f}" if "model-change" in self.train else "",
            f"staleness {self.train['staleness']:.1f}" if "staleness" in self.train else "",
            f"worst {self.test[worst]:.4f}"
            if (worst := f"{self.headline}-worst") in self.test
            else "",
            f"apart {self.train['disagreement']:.3g}" if "disagreement" in self.train else "",
            f"{self.megabytes:.1f} MB",
            f"{self.seconds:.0f} s, {left:.0f} s to go",
        )
        return " | ".join(part for part in parts if part)


class Ended(NamedTuple):
    """The run is over; with the error that stopped it, if one did."""

    error: BaseException | None


Event = Began | Reported | Refused | NewModel | Checkpoint | Away | Back | Progress | Ended
Sink = Callable[[Event], None]
