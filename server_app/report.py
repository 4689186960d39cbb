"""What sites report on its way into the history: counted, read, timed."""

import re
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from typing import NamedTuple, TypeVar

from flwr.app import Message

from configuration.config import Config
from configuration.network import num_outputs
from datasets.site import deviations
from models.tasks import Targets, Task, numbers
from server_app.census import Federation
from server_app.events import EVERYBODY, Away, Back, Event, Progress, Refused, Reported, Sink
from server_app.exchange import TOO_LATE, Clock
from server_app.roster import together
from strategies.averaging.average import NUM_EXAMPLES
from strategies.averaging.mean import weighted_mean
from strategies.method import PeerPlan
from strategies.protocol import Refusal, printable
from strategies.records import num_bytes

T = TypeVar("T")


class Measure(NamedTuple):
    """What tests of a run measure.

    Attributes:
        task: what is trained.
        targets: what its outputs stand for.
        means: how many each site reports.
    """

    task: Task
    targets: Targets
    means: int

    @classmethod
    def of(cls, config: Config, federation: Federation) -> "Measure":
        """Of a run."""
        task, names, details = config.task, federation.classes, config.results.details
        common = federation.moments
        deviation = deviations(common.split(len(federation.columns))[1]) if common else ()
        means = task.num_means(
            federation.shape, num_outputs(task, config.data, len(names)), details
        )
        return cls(task, Targets(names, deviation, config.data.token_bytes, details), means)

    def of_site(self, found: Mapping[str, float | list[float]]) -> dict[str, float]:
        """The metrics of one site's test."""
        return self.task.measured(numbers(found), self.targets)

    def together(self, found: Sequence[Mapping[str, float | list[float]]]) -> dict[str, float]:
        """The metrics of all sites' examples; {} of none."""
        return self.task.measured(
            weighted_mean([numbers(each) for each in found], NUM_EXAMPLES), self.targets
        )

    def extremes(self, found: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """The worst and the best site's headline."""
        name = self.task.headline
        if not (
            values := sorted(
                (each[name] for each in found if name in each), reverse=not self.task.larger
            )
        ):
            return {}
        return {f"{name}-worst": values[0], f"{name}-best": values[-1]}


LONGEST_REASON = 1000  # characters of what a peer says
_BY_PEER = re.compile(r"site (\d{1,9}): (.*?(?:\(([a-z.-]+)\))?)", re.DOTALL)


class Moment(NamedTuple):
    """How far a run was.

    Attributes:
        seconds: since the first round.
        traffic: of each site by its number, bytes up and down.
    """

    seconds: float
    traffic: dict[int, tuple[int, int]]

    def megabytes(self) -> float:
        """Sent and received."""
        return sum(map(sum, self.traffic.values())) / 1e6


class Report:
    """Counts bytes, names unusable replies, and emits metrics with the time and bytes so far.

    Args:
        federation: the sites.
        config: the run.
        sink: where events go.
        clock: started here.
        unit: what is counted, "round", "update" or "step".

    Attributes:
        measure: what tests measure.
    """

    def __init__(
        self, federation: Federation, config: Config, sink: Sink, clock: Clock, unit: str
    ) -> None:
        self.measure, self._config, self._unit = Measure.of(config, federation), config, unit
        self._sites = {site.node: site for site in federation.sites}
        self._sink, self._clock, self._start = sink, clock, clock.now()
        self._traffic = {site.number: (0, 0) for site in federation.sites}  # bytes up, bytes down
        self._connected = set(self._sites)
        self._refused: dict[
            int, tuple[int, str]
        ] = {}  # when something of a node was refused last, and why

    def emit(self, event: Event) -> None:
        """Something happened."""
        self._sink(event)

    def moment(self) -> Moment:
        """Now."""
        return Moment(self._clock.now() - self._start, dict(self._traffic))

    def resume(self, moment: Moment) -> None:
        """Go on counting from a moment."""
        self._start, self._traffic = self._clock.now() - moment.seconds, dict(moment.traffic)

    def see(self, connected: AbstractSet[int]) -> None:
        """Tell whose connection was lost, and who is back."""
        for node, site in self._sites.items():
            if (node in connected) != (node in self._connected):
                self.emit(Back(site) if node in connected else Away(site))
        self._connected = self._sites.keys() & connected

    def sent(self, messages: Sequence[Message]) -> None:
        """Messages go out."""
        for message in messages:
            number = self._sites[message.metadata.dst_node_id].number
            up, down = self._traffic[number]
            self._traffic[number] = up, down + num_bytes(message)

    def receive(
        self, node: int, reply: Message, number: int, phase: str, read: Callable[[Message], T]
    ) -> T | Refusal:
        """What ``read`` makes of a reply, or why it cannot be used, which is logged, too.

        Args:
            node: whom it is from.
            reply: the reply.
            number: of the round, update or step.
            phase: what the site is left out of, if it is.
            read: one of :mod:`strategies.protocol`.
        """
        try:
            found = read(reply)
            if reply.metadata.src_node_id != node:
                raise Refusal(f"it says that it comes from node {reply.metadata.src_node_id}")
        except Refusal as refusal:
            silent = reply.has_error() and reply.error.code == TOO_LATE
            self.refuse(node, number, phase, str(refusal), "timeout-s" if silent else "")
            return refusal
        finally:
            self.count(node, reply)
        return found

    def count(self, node: int, reply: Message) -> None:
        """The bytes of a reply."""
        number = self._sites[node].number
        up, down = self._traffic[number]
        with suppress(Exception):  # what cannot be sent was refused
            self._traffic[number] = up + num_bytes(reply), down

    def refuse(self, node: int, number: int, phase: str, reason: str, rule: str = "") -> None:
        """What a site sent cannot be used; ``rule`` as in :class:`Refused`."""
        self._refused[node] = number, reason
        self.emit(
            Refused(
                f"{self._unit} {number}",
                self._sites[node],
                phase,
                reason,
                rule,
                self._clock.now() - self._start,
            )
        )

    def refused_by(self, node: int, number: int, reasons: Sequence[str]) -> None:
        """What a peer reports that it refuses: whose offer, why and, in brackets, by which key."""
        by, numbers = self._sites[node], {site.number: site for site in self._sites.values()}
        for said in reasons:
            found = _BY_PEER.fullmatch(said[:LONGEST_REASON])
            site = numbers.get(int(found[1])) if found else None
            reason, rule = (found[2], found[3] or "") if found and site else (said, "")
            what = (f"{self._unit} {number}", site or by, "exchange", printable(reason, 240), rule)
            self.emit(Refused(*what, self._clock.now() - self._start, f"site {by.number}"))

    def refusals(self, number: int) -> str:
        """What was refused in a round, update or step, and why."""
        return together(
            {
                f"site {self._sites[node].number}": why
                for node, (when, why) in self._refused.items()
                if when == number
            }
        )

    def write(
        self,
        number: int,
        split: str,
        of_sites: Mapping[int, Mapping[str, float]],
        together: Mapping[str, float] | None,
        moment: Moment | None = None,
    ) -> None:
        """Emit what each site reported, by node, and the mean over them.

        ``moment`` is when that was; by default now.
        """
        seconds, traffic = moment or self.moment()
        for node, site in self._sites.items():
            if node in of_sites:
                self.emit(
                    Reported(
                        number, seconds, site.number, split, of_sites[node], *traffic[site.number]
                    )
                )
        if together is not None:
            up, down = (sum(column) for column in zip(*traffic.values(), strict=True))
            self.emit(Reported(number, seconds, EVERYBODY, split, together, up, down))

    def test(
        self,
        number: int,
        found: Mapping[int, Mapping[str, float | list[float]]],
        moment: Moment,
        split: str = "test",
    ) -> dict[str, float]:
        """Emit what each site found in a test, by node, and what all found together.

        The latter is returned; {} where no site tested.
        """
        of_sites = dict[int, dict[str, float]]()
        for node, each in found.items():
            try:
                of_sites[node] = self.measure.of_site(each)
            except (
                Exception
            ) as error:  # metrics of one's own, of numbers that a site may have made up
                self.refuse(
                    node,
                    number,
                    "test",
                    f"training.task makes no metrics of it: {type(error).__name__}: {error}",
                )
        together = self.measure.together([found[node] for node in self._sites if node in of_sites])
        if isinstance(self._config.plan, PeerPlan):
            together |= self.measure.extremes(list(of_sites.values()))
        self.write(number, split, of_sites, together or None, moment)
        return together

    def progress(
        self,
        number: int,
        epochs: float | None,
        done: float,
        moment: Moment,
        train: Mapping[str, float],
        test: Mapping[str, float],
        tested: int | None = None,
    ) -> None:
        """Emit how far the run is; see :class:`Progress`."""
        config, headline = self._config, self.measure.task.headline
        total, seconds, sent = config.epochs, moment.seconds, moment.megabytes()
        self.emit(
            Progress(
                config.unit,
                number,
                epochs,
                done,
                total,
                seconds,
                sent,
                train,
                test,
                tested,
                headline,
            )
        )
