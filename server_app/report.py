"""What sites report on its way into the history: checked, counted, timed."""

import math
from collections.abc import Mapping
from logging import WARNING
from typing import NamedTuple

from flwr.app import Message, MetricRecord
from flwr.common.logger import log

from server_app.census import Federation
from server_app.exchange import Clock, why
from server_app.results import EVERYBODY, History
from strategies.averaging.average import NUM_EXAMPLES
from strategies.averaging.mean import refusal
from strategies.records import arrays_of, metrics_of, num_bytes, unpack


class Moment(NamedTuple):
    """How far a run was.

    Attributes:
        seconds: since the first round.
        traffic: of each node, bytes up and down.
    """

    seconds: float
    traffic: dict[int, tuple[int, int]]

    def megabytes(self) -> float:
        """Sent and received."""
        return sum(map(sum, self.traffic.values())) / 1e6


class Report:
    """Counts every byte, names every reply that cannot be used, and writes metrics down with the time and the bytes so far.

    Args:
        federation: the sites.
        history: where metrics go.
        clock: started here.
        unit: what is counted, "round" or "update".
    """

    def __init__(self, federation: Federation, history: History, clock: Clock, unit: str) -> None:
        self._unit = unit
        self._sites = {site.node: site for site in federation.sites}
        self._history, self._clock, self._start = history, clock, clock.now()
        self._traffic = dict.fromkeys(self._sites, (0, 0))  # bytes up, bytes down

    def moment(self) -> Moment:
        """Now."""
        return Moment(self._clock.now() - self._start, dict(self._traffic))

    def sent(self, message: Message) -> None:
        """A message goes out."""
        up, down = self._traffic[message.metadata.dst_node_id]
        self._traffic[message.metadata.dst_node_id] = up, down + num_bytes(message)

    def received(
        self, node: int, reply: Message, sizes: Mapping[str, int] | None, round_number: int, phase: str | None = None
    ) -> bool:
        """A reply is there: whether it can be used. If not, a warning names the site and the reason.

        Args:
            node: whom it is from.
            reply: the reply.
            sizes: length of each vector that a model must hold; None where no model is expected.
            round_number: of the warning.
            phase: what the site is left out of; by default the test where no model is expected, else the training.
        """
        up, down = self._traffic[node]
        self._traffic[node] = up + num_bytes(reply), down
        reason = unusable(reply, sizes)
        if reason:
            site, phase = self._sites[node], phase or ("test" if sizes is None else "training")
            when = f"{self._unit} {round_number}"
            log(WARNING, "%s: %s (site %d) is left out of the %s: %s", when, site.name, site.number, phase, reason)
        return not reason

    def write(
        self,
        round_number: int,
        split: str,
        of_sites: Mapping[int, Mapping[str, float]],
        together: Mapping[str, float] | None,
        moment: Moment | None = None,
    ) -> None:
        """Write down what each site reported, by node, and the mean over them, at the ``moment`` it belongs to, by default now."""
        seconds, traffic = moment or self.moment()
        for node, site in self._sites.items():
            if node in of_sites:
                self._history.record(round_number, seconds, site.number, split, of_sites[node], *traffic[node])
        if together is not None:
            up, down = (sum(column) for column in zip(*traffic.values(), strict=True))
            self._history.record(round_number, seconds, EVERYBODY, split, together, up, down)


def numbers(record: MetricRecord) -> dict[str, float]:
    """A record's single numbers."""
    return {key: float(value) for key, value in record.items() if isinstance(value, int | float)}


def unusable(reply: Message, sizes: Mapping[str, int] | None) -> str | None:
    """Why a reply cannot be used, or None where it can.

    Args:
        reply: of a site.
        sizes: length of each vector that a model must hold; None where no model is expected.
    """
    if reply.has_error():
        return why(reply)
    metrics = metrics_of(reply)
    if not metrics:
        return "the reply holds no metrics"
    count = metrics.get(NUM_EXAMPLES)
    if not isinstance(count, int) or count < 1:
        return f"num-examples is {count}, a whole number above 0 is expected"
    if wrong := [f"{key} = {value}" for key, value in metrics.items() if not _finite(value)]:
        return f"metrics are not finite: {', '.join(wrong)}"
    if sizes is None:
        return None
    arrays = arrays_of(reply)
    if set(arrays) != set(sizes):
        return f"the reply holds the arrays {sorted(arrays)}, {sorted(sizes)} are expected"
    for name, size in sizes.items():
        array = arrays[name]
        if array.dtype != "float32" or array.shape != (size,):
            return f"{name} is {array.dtype} of shape {array.shape}, float32 of shape ({size},) is expected"
        try:
            vector = unpack(array)
        except ValueError as error:
            return f"{name} cannot be read: {error}"
        if vector.shape != (size,):
            return f"{name} is of shape {tuple(vector.shape)}, ({size},) is expected"
        if reason := refusal(vector):
            return reason
    return None


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
