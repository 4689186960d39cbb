"""The world of a simulation: how fast sites compute, what their links carry, when they are there.

Everything random is drawn from the run's seed, so that the same run meets the same world.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from configuration.errors import ConfigError
from strategies.randomness import derive

Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]
FromZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Period = tuple[float, float]  # from, to, in seconds; to may be infinite


class Lognormal(BaseModel):
    """A value for each site, lognormally distributed: ``median * exp(sigma * N(0, 1))``."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    median: Above0
    sigma: FromZero


PER_SITE = ("samples_per_s", "bandwidth_mbps", "latency_ms")
PerSite = Above0 | list[Above0] | Lognormal


class World(BaseModel):
    """The speeds, links and outages of sites, which Flower's own simulation does not have.

    A number holds for all sites, a list has one for each, :class:`Lognormal` draws one for each.

    Attributes:
        samples_per_s: examples that a site trains on in a second (forward and backward pass;
            testing takes a third of that).
        bandwidth_mbps: megabits a second of a site's link, each way.
        latency_ms: milliseconds that a message is on its way, besides its bytes.
        jitter: spread of the time of each transfer: it is multiplied with exp(jitter N(0, 1)).
        offline: for a site's number, its periods (from, to) off, in seconds; ``(600, inf)``: it
            dies.
        mean_up_s, mean_down_s: sites also come and go at random: mean lengths of the exponentially
            distributed periods for which a site is on and off. Both or neither.

    Raises:
        ConfigError: names the key, the value and what is allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples_per_s: PerSite = 1000.0
    bandwidth_mbps: PerSite = 100.0
    latency_ms: FromZero | list[FromZero] | Lognormal = 20.0
    jitter: FromZero = 0.0
    offline: dict[Annotated[int, Field(ge=0)], list[Period]] = {}
    mean_up_s: Above0 | None = None
    mean_down_s: Above0 | None = None

    def __init__(self, **values: object) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(
                "\n".join(dict.fromkeys(_explain(each, values) for each in error.errors()))
            ) from None
        for site, periods in self.offline.items():
            borders = [border for period in periods for border in period]
            if borders and (borders[0] < 0 or any(not a < b for a, b in pairwise(borders))):
                raise ConfigError(
                    f"offline = {{{site}: {periods}}}: "
                    "periods (from, to) in order are expected, from 0 on"
                )
        if (self.mean_up_s is None) != (self.mean_down_s is None):
            raise ConfigError(
                f"mean_up_s = {self.mean_up_s}, mean_down_s = {self.mean_down_s}: "
                "both or neither must be given"
            )

    def sites(self, num_sites: int, seed: int) -> list["SiteWorld"]:
        """The world of each site of a run.

        Raises:
            ConfigError: a list of another length than there are sites, a site that is not there, or
                nobody there, ever.
        """
        values = {name: self._for_each(name, num_sites, seed) for name in PER_SITE}
        if strangers := [site for site in self.offline if site >= num_sites]:
            raise ConfigError(
                f"offline = {self.offline}: there is no site {strangers[0]}, "
                f"sites are 0 to {num_sites - 1}"
            )
        found = [
            SiteWorld(
                samples_per_s=values["samples_per_s"][site],
                bytes_per_s=values["bandwidth_mbps"][site] * 1e6 / 8,
                latency_s=values["latency_ms"][site] / 1000,
                jitter=self.jitter,
                offline=self.offline.get(site, []),
                up_s=self.mean_up_s,
                down_s=self.mean_down_s,
                seed=derive(seed, "world", site),
            )
            for site in range(num_sites)
        ]
        if all(site.back_at(0.0) == math.inf for site in found):
            raise ConfigError(f"offline = {self.offline}: no site is ever there")
        return found

    def _for_each(self, name: str, num_sites: int, seed: int) -> Sequence[float]:
        value = getattr(self, name)
        if isinstance(value, Lognormal):
            draws = np.random.default_rng(derive(seed, name)).standard_normal(num_sites)
            return [float(each) for each in value.median * np.exp(value.sigma * draws)]
        if isinstance(value, list):
            if len(value) != num_sites:
                raise ConfigError(f"{name} = {value}: {len(value)} values for {num_sites} sites")
            return value
        return [value] * num_sites


class SiteWorld:
    """One site's speed, link and presence, in seconds, bytes and examples.

    Args:
        samples_per_s: examples trained on in a second.
        bytes_per_s: of the link, each way.
        latency_s: of a message.
        jitter: see :class:`World`.
        offline: periods in which the site is off, in order.
        up_s, down_s: mean lengths of random periods; None for a site that comes and goes only as
            ``offline`` says.
        seed: of jitter and random periods.
    """

    def __init__(
        self,
        *,
        samples_per_s: float,
        bytes_per_s: float,
        latency_s: float,
        jitter: float,
        offline: Sequence[Period],
        up_s: float | None,
        down_s: float | None,
        seed: int,
    ) -> None:
        self.samples_per_s = samples_per_s
        self._bytes_per_s, self._latency_s, self._jitter = bytes_per_s, latency_s, jitter
        self._fixed = list(offline)
        self._up_s, self._down_s = up_s, down_s
        self._random: list[Period] = []
        self._noise = np.random.default_rng(derive(seed, "jitter"))
        self._fate = np.random.default_rng(derive(seed, "churn"))

    def travel_s(self, num_bytes: int) -> float:
        """Seconds that the next message is on its way."""
        seconds = self._latency_s + num_bytes / self._bytes_per_s
        return (
            seconds * math.exp(self._jitter * self._noise.standard_normal())
            if self._jitter
            else seconds
        )

    def next_outage(self, time: float) -> Period | None:
        """The first period that is not over at ``time``, or None where none will come."""
        if time == math.inf:
            return None
        candidates = [period for period in self._fixed if period[1] > time][:1]
        if self._up_s is not None and self._down_s is not None:
            while not self._random or self._random[-1][1] <= time:
                start = (self._random[-1][1] if self._random else 0.0) + self._fate.exponential(
                    self._up_s
                )
                self._random.append((start, start + self._fate.exponential(self._down_s)))
            candidates += [period for period in self._random if period[1] > time][:1]
        return min(candidates, default=None)

    def back_at(self, time: float) -> float:
        """The first moment from ``time`` on at which the site is on; infinite for a dead one."""
        while time < math.inf and (outage := self.next_outage(time)) and outage[0] <= time:
            time = outage[1]
        return time


def _explain(error: ErrorDetails, values: Mapping[str, object]) -> str:
    key = str(error["loc"][0])
    if key not in World.model_fields:
        return f"{key}: unknown key; allowed: {', '.join(World.model_fields)}"
    least = "0 or more" if key == "latency_ms" else "above 0"
    allowed = error["msg"].replace("Input should be", "must be")
    if key in PER_SITE:
        allowed = (
            f"a number {least}, a list with one for each site, or Lognormal(median=..., sigma=...)"
        )
    return f"{key} = {values[key]!r}: {allowed}"
