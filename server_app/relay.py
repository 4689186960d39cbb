"""The relay between peers: it carries what they offer to their neighbours, and does no arithmetic on it.

Neighbour-synchronous: a peer gets its next message as soon as what its own neighbours offered is there; there is no global barrier.
One message a peer and exchange, two with neighbourhood gradients. A peer that fails or is silent is away: nobody waits for it, and
its neighbours keep its weight. It is called again whenever the others went on, rejoins with the state it has, and is waited for
again once it answered.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from logging import WARNING
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from configuration.config import Config
from server_app.census import Federation, RunError, an_epoch, budget
from server_app.exchange import GONE, LONGEST_WAIT_S, Mailbox, clock_of
from server_app.report import Moment, Report, numbers, unusable
from server_app.results import History, Progress
from strategies.averaging.average import NUM_EXAMPLES, weighted_metrics
from strategies.method import PeerPlan
from strategies.records import CONFIG, FROM, METRICS, OFFER, TO, arrays_of, config_of, metrics_of
from strategies.topology import Topology


@dataclass
class _Seat:
    """What the relay knows of a peer.

    Attributes:
        step: of the next message.
        joined: from this step on others wait for what it offers.
        away: whether nobody waits for it.
        failed: whether it is away since it answered with something that cannot be used, and will again.
        again: it is called again when the front of the run is there.
        failures: since it last answered.
        reason: why it is away.
    """

    step: int = 0
    joined: int = 0
    away: bool = False
    failed: bool = False
    again: int = 0
    failures: int = 0
    reason: str = ""


@dataclass
class _Test:
    """What peers reported when they tested after an exchange."""

    moment: Moment
    answers: dict[int, dict[str, float]] = field(default_factory=dict)
    train: dict[int, dict[str, float]] = field(default_factory=dict)


class Relay:
    """Runs peers over their graph.

    Args:
        grid: the way to the sites.
        topology: who hears whom; a site's number is its place.
        federation: the sites.
        config: the run.
        history: is told everything.

    Attributes:
        report: counts the bytes.
        exchanges: of the whole run.
    """

    def __init__(self, grid: Grid, topology: Topology, federation: Federation, config: Config, history: History) -> None:
        self._grid, self._topology, self._config, self._history = grid, topology, config, history
        self._federation, self._clock = federation, clock_of(grid)
        self.report = Report(federation, history, self._clock, "step")
        self._mailbox = Mailbox(grid, config.timeout_s)
        self._nodes = {site.number: site.node for site in federation.sites}
        self._numbers = {site.node: site.number for site in federation.sites}
        self._seats = {number: _Seat() for number in self._nodes}
        self._flying: set[int] = set()
        # What was offered on a link and not yet delivered: by sender and reader, the arrays of each step.
        self._links: dict[tuple[int, int], dict[int, dict[str, Array]]] = defaultdict(dict)
        # What a message under way delivers, and links on which a difference is missing (CHOCO): nothing more goes over such a link
        # until its sender starts anew.
        self._given: dict[int, list[tuple[int, int]]] = {}
        self._stale: set[tuple[int, int]] = set()
        self._choco = config.wire.error_feedback == "choco"
        assert isinstance(config.plan, PeerPlan)
        self._crossing = config.plan.gradient.at != "own"
        self._two_steps = config.plan.gradient.messages == 2
        self.exchanges, self._every = budget(config, config.plan, an_epoch(federation, config.training.batch_size))
        self._last = self.exchanges * (2 if self._two_steps else 1)  # the last step
        self._least = min(config.min_sites, len(self._nodes))
        self._tests: dict[int, _Test] = {}
        self._written = 0  # the exchange of the last test that was written down
        self._train: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._models: dict[int, ArrayRecord] = {}
        self._too_few_since: float | None = None
        self._links_bytes: dict[tuple[int, int], int] = defaultdict(int)

    def run(self) -> dict[int, ArrayRecord]:
        """All exchanges.

        Returns:
            The models of the peers by site number, where the server may have them.

        Raises:
            RunError: fewer than ``min-sites`` peers go on for ``timeout-s``.
        """
        while any(seat.step <= self._last for seat in self._present().values()) or not self._present():
            self._send()
            self._enough()
            for message, reply in self._mailbox.receive(once=any(seat.away for seat in self._seats.values())):
                self._answered(self._numbers[message.metadata.dst_node_id], int(config_of(message)["server-round"]), reply)  # type: ignore[arg-type]
        self._write_tests(finished=True)
        for (sender, reader), count in sorted(self._links_bytes.items()):
            self.report.write(self.exchanges, "links", {self._nodes[sender]: {f"bytes-to-{reader}": float(count)}}, None)
        return self._models

    def _present(self) -> dict[int, _Seat]:
        return {number: seat for number, seat in self._seats.items() if not seat.away}

    def _exchange_of(self, step: int) -> int:
        """The exchange, counted from 0, whose offers are delivered in a step."""
        return (step - 1) // (2 if self._two_steps else 1)

    def _is_cross(self, step: int) -> bool:
        return self._two_steps and step % 2 == 1

    def _hears(self, step: int, peer: int) -> dict[int, float]:
        """Whom a peer hears in a step, with their weights."""
        return self._topology.neighbours(self._exchange_of(step), peer) if step else {}

    def _ready(self, peer: int, step: int) -> bool:
        """Whether all that a peer must have for a step is there."""
        for j in self._hears(step, peer):
            other = self._seats.get(j)
            if other is None or other.away or step - 1 < other.joined:
                continue
            if other.step < step:  # it did not offer yet
                return False
        return True

    def _send(self) -> None:
        """Call every peer whose next step can be taken, and those that are away and may be back."""
        connected = set(self._grid.get_node_ids())
        front = max((seat.step for seat in self._present().values()), default=0)
        calls = []
        for peer, seat in self._seats.items():
            if peer in self._flying:
                continue
            if seat.away:
                if self._nodes[peer] not in connected or front < seat.again or front > self._last:
                    continue
                # Neighbourhood gradients begin with the models: an odd step.
                seat.step = max(seat.step, front)
                if self._two_steps and seat.step % 2 == 0 and seat.step:
                    seat.step += 1 if seat.step < self._last else -1
                calls.append(self._call(peer, rejoin=True))
            elif seat.step <= self._last and self._nodes[peer] not in connected:
                self._lose(peer, "not connected")
            elif seat.step <= self._last and self._ready(peer, seat.step):
                calls.append(self._call(peer, rejoin=False))
        self._mailbox.send(calls)

    def _call(self, peer: int, *, rejoin: bool) -> Message:
        step = self._seats[peer].step
        exchange_number = self._exchange_of(step)
        heard = self._hears(step, peer)
        last = step == self._last
        told: dict[str, Any] = {
            "server-round": step,
            **self._federation.agreed(),
            "neighbours": list(heard),
            "weights": list(heard.values()),
            "test": not self._is_cross(step) and (last or (step > 0 and (exchange_number + 1) % self._every == 0)),
            "last": last,
            "rejoin": rejoin,
            "fresh": any(sender == peer and not self._seats[reader].away for sender, reader in self._stale),
            # A plain step trains for the exchange after it; the steps of neighbourhood gradients for their own.
            "cycle-from": min(1.0, (exchange_number + (0 if step and self._crossing else 1)) / self.exchanges),
        }
        if self._config.wire.sealing != "off":
            # Who comes back may be heard later than in the next exchange.
            exchanges = range(len(self._topology.matrices)) if rejoin else [self._exchange_of(step + 1)]
            told["listeners"] = [
                reader for reader in self._nodes if any(peer in self._topology.neighbours(each, reader) for each in exchanges)
            ]
        if self._config.wire.sealing == "trust-on-first-use":
            told |= {f"key-{site.number}": site.key for site in self._federation.sites if site.number != peer}
        records: dict[str, Any] = {CONFIG: ConfigRecord(told)}
        for j in heard:
            # On a step of one kind, payloads of the other one are of no use.
            waiting = {s: arrays for s, arrays in self._links[j, peer].items() if not self._two_steps or (step - s) % 2}
            if self._choco:  # differences must all arrive
                steps = [s for s in waiting if s < step]
            else:  # of anything else the newest is enough; who comes back may find an older one
                steps = [max(waiting)] if rejoin and waiting else [s for s in waiting if s == step - 1]
            if steps:
                self._given.setdefault(peer, []).extend((j, s) for s in steps)
                arrays = {name: array for s in steps for name, array in waiting[s].items()}
                records[f"{FROM}{j}"] = ArrayRecord(arrays)
                self._links_bytes[j, peer] += sum(len(array.data) for array in arrays.values())
        message = Message(RecordDict(records), self._nodes[peer], "train.cross" if self._is_cross(step) else "train.peer")
        self._flying.add(peer)
        self.report.sent(message)
        return message

    def _answered(self, peer: int, step: int, reply: Message) -> None:
        """A peer took its step, or did not."""
        self._flying.discard(peer)
        seat = self._seats[peer]
        given = self._given.pop(peer, [])
        if not self.report.received(self._nodes[peer], reply, None, step, "exchange"):
            self._lose(peer, unusable(reply, None) or "", failed=not reply.has_error() or reply.error.code not in GONE)
            if self._config.wire.sealing != "off" and step < self._last:  # it may have done it, and takes a sealed step once only
                seat.step = step + 1
            return
        told: Any = config_of(reply)
        for refusal in told.get("refused", ()):
            log(WARNING, "step %d: site %d refuses what came from %s", step, peer, refusal)
        for j, s in given:
            self._links[j, peer].pop(s, None)
        self._stale |= {(j, peer) for j in told.get("broken", ())}
        if told.get("fresh"):
            self._stale -= {(peer, reader) for reader in self._present()}
            for reader in self._nodes:
                self._links[peer, reader].clear()
        seat.failures, seat.failed = 0, False
        if seat.away:  # back: it goes on where the others are
            seat.away = False
            front = max((other.step for number, other in self._present().items() if number != peer), default=step + 1)
            front = max(front, step + 1)
            front += (front - step - 1) % 2 if self._two_steps else 0
            seat.step = front if step == self._last else min(front, self._last)  # nobody leaves out the last step
            seat.joined = seat.step - 1
            how = ", remembers nothing of this run and starts anew" if told.get("anew") else ""
            log(WARNING, "step %d: site %d is back%s", step, peer, how)
        else:
            seat.step = step + 1
        arrays = arrays_of(reply)
        for reader in self._nodes:
            if reader == peer or peer not in self._hears(seat.step, reader):
                continue
            own, all_ = f"{TO}{reader}/", f"{OFFER}/"
            parts = {f"{step}/{name.partition('/')[2]}": array for name, array in arrays.items() if name.startswith((own, all_))}
            if not parts or (peer, reader) in self._stale:
                continue
            self._links[peer, reader][seat.step - 1] = parts
            if not self._choco:  # a reader that is away finds the newest
                other = self._seats[reader]
                first = seat.step - 2 if other.away else other.step - 1  # on a directed graph a reader may be far behind
                for old in [s for s in self._links[peer, reader] if s < first]:
                    del self._links[peer, reader][old]
        metrics = numbers(metrics_of(reply))
        if "disagreement" in metrics:  # before it trained on
            self._train[peer]["disagreement"].append(metrics["disagreement"])
        if self._crossing:
            self._trained(peer, metrics)
        if isinstance(model := reply.content.get("model"), ArrayRecord):
            self._models[peer] = model
        if "test-examples" in metrics:
            self._tested(peer, self._exchange_of(step) + 1, metrics)
        if not self._crossing:  # what it trained after it tested
            self._trained(peer, metrics)

    def _trained(self, peer: int, metrics: Mapping[str, float]) -> None:
        for name in ("loss", "lr-first", "lr-last"):
            if name in metrics:
                self._train[peer][name].append(metrics[name])

    def _lose(self, peer: int, reason: str, *, failed: bool = False) -> None:
        seat = self._seats[peer]
        seat.away, seat.failed, seat.reason = True, failed, reason
        self._given.pop(peer, None)
        if self._choco:  # it will miss differences, and may have missed these
            for sender, reader in list(self._links):
                if reader == peer:
                    self._links[sender, peer].clear()
                    self._stale.add((sender, peer))
        # Who fails again and again is called ever less often.
        seat.failures += 1
        seat.again = max(other.step for other in self._seats.values()) + min(1 << (seat.failures - 1), 64)
        self._write_tests()

    def _enough(self) -> None:
        """Wait for peers to come back where too few are left; not for ever."""
        there = len(self._present())
        if there >= self._least:
            self._too_few_since = None
            return
        now = self._clock.now()
        self._too_few_since = now if self._too_few_since is None else self._too_few_since
        left = self._too_few_since + self._config.timeout_s - now
        hope = sum(not seat.failed for seat in self._seats.values()) >= self._least
        if left <= 0 or not hope:
            when = f"after timeout-s = {self._config.timeout_s:g}" if hope else "and no others will"
            away = {f"site {peer}: {seat.reason}" for peer, seat in self._seats.items() if seat.away}
            raise RunError(f"{there} peers go on {when}, min-sites = {self._least}: stopped. {'; '.join(sorted(away))}")
        if not self._mailbox:
            for seat in self._seats.values():  # nobody moves the front: call them again
                seat.again = seat.again if seat.failed else 0
            self._send()
            if not self._mailbox:
                self._clock.wait(LONGEST_WAIT_S, left)

    def _tested(self, peer: int, exchange_number: int, metrics: Mapping[str, float]) -> None:
        if exchange_number <= self._written:  # it was away when the others took it
            return
        test = self._tests.setdefault(exchange_number, _Test(self.report.moment()))
        test.moment = self.report.moment()  # of the last answer
        test.answers[peer] = {
            NUM_EXAMPLES: metrics["test-examples"],
            **{name.removeprefix("test-"): value for name, value in metrics.items() if name in ("test-accuracy", "test-loss")},
        }
        trained = self._train.pop(peer, {})
        test.train[peer] = {name: sum(values) / len(values) for name, values in trained.items()}
        test.train[peer] |= {name: trained[name][place] for name, place in (("lr-first", 0), ("lr-last", -1)) if name in trained}
        self._write_tests()

    def _write_tests(self, *, finished: bool = False) -> None:
        """Write down the tests, in their order, that everybody took who will."""
        for number in sorted(self._tests):
            step = number * (2 if self._two_steps else 1)
            if not finished and any(
                peer not in self._tests[number].answers and seat.step <= step and seat.joined <= step
                for peer, seat in self._present().items()
            ):
                return
            self._write(number, self._tests.pop(number))

    def _write(self, number: int, test: _Test) -> None:
        nodes = self._nodes
        train = _means(test.train)
        train["local-epochs"] = (number - self._written) * self._config.epochs / self.exchanges
        self._written = number
        self.report.write(number, "train", {nodes[peer]: each for peer, each in test.train.items()}, train, test.moment)
        answers = [
            RecordDict({METRICS: MetricRecord({**each, NUM_EXAMPLES: int(each[NUM_EXAMPLES])})}) for each in test.answers.values()
        ]
        mean = numbers(weighted_metrics(answers, NUM_EXAMPLES))
        accuracies = [each["accuracy"] for each in test.answers.values()]
        mean |= {"accuracy-worst": min(accuracies), "accuracy-best": max(accuracies)}
        self.report.write(number, "test", {nodes[peer]: each for peer, each in test.answers.items()}, mean, test.moment)
        done = number * self._config.epochs / self.exchanges
        now = test.moment
        self._history.tell(Progress("exchange", number, None, done, self._config.epochs, now.seconds, now.megabytes(), train, mean))


def _means(of_peers: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    names = {name for each in of_peers.values() for name in each}
    found = {}
    for name in sorted(names):
        values = [each[name] for each in of_peers.values() if name in each and math.isfinite(each[name])]
        if values:
            found[name] = sum(values) / len(values)
    return found
