"""The relay between peers: it carries what they offer to neighbours; it computes nothing.

Neighbour-synchronous: a peer gets its next message as soon as what its own neighbours offered is
there; there is no global barrier. One message a peer and exchange, two with neighbourhood
gradients. A peer that fails or is silent is away: nobody waits for it, and its neighbours keep its
weight. It is called again whenever the others went on, rejoins with the state it has, and is waited
for again once it answered.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from logging import WARNING
from typing import Any

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from configuration.config import Config
from configuration.flower import log
from server_app.discovery import Federation, RunError, an_epoch, budget
from server_app.events import Checkpoint, Sink
from server_app.exchange import LONGEST_WAIT_S, Mailbox, clock_of, gone
from server_app.links import Links
from server_app.report import Report, Snapshot
from server_app.roster import Roster
from server_app.tally import Tally
from strategies.method import PeerPlan, Vectors
from strategies.protocol import (
    InvalidReply,
    Layout,
    Offer,
    PeerOrder,
    StepMetrics,
    read_offer,
    write_peer_order,
)
from strategies.records import CONFIG, FROM
from strategies.topology import Topology


@dataclass
class _Course:
    """How far a peer is: its next step, and from which step on others wait for what it offers."""

    step: int = 0
    joined: int = 0


class Relay:
    """Runs peers over their graph.

    Args:
        grid: the way to the sites.
        plan: what peers do; here, how many messages that takes.
        topology: who hears whom; a site's number is its place.
        federation: the sites.
        config: the run.
        layout: of a model.
        sink: gets every event.

    Attributes:
        report: counts the bytes.
        exchanges: of the whole run.
    """

    def __init__(
        self,
        grid: Grid,
        plan: PeerPlan,
        topology: Topology,
        federation: Federation,
        config: Config,
        layout: Layout,
        sink: Sink,
    ) -> None:
        self._grid, self._topology, self._config, self._layout = grid, topology, config, layout
        self._federation, self._clock = federation, clock_of(grid)
        self.report = Report(federation, config, sink, self._clock, "step")
        self._mailbox = Mailbox(grid, config.timeout_s, self.report.update_connected)
        self._sites = {site.number: site for site in federation.sites}
        self._numbers = {site.node: site.number for site in federation.sites}
        names = {number: f"site {number}" for number in self._sites}
        self._roster = Roster(names, config.min_sites, config.patience_s)
        self._courses = {number: _Course() for number in self._sites}
        self._in_flight: dict[int, PeerOrder] = {}
        self._delivering: dict[int, list[tuple[int, int]]] = {}  # what a message under way delivers
        self._choco = config.wire.error_feedback == "choco"
        self._plan, self._messages = plan, plan.gradient.messages
        self._links = Links(chained=self._choco, messages=self._messages)
        self._nonces = {site.number: site.nonce for site in federation.sites if site.nonce}
        self.exchanges, self._every = budget(
            config, plan, an_epoch(federation, config.training.batch_size)
        )
        self._last = self.exchanges * self._messages  # the last step
        self._tally = Tally(before=plan.gradient.at != "own")
        self._written = 0  # the exchange of the last test that was reported
        self._models: dict[int, Vectors] = {}

    def resume(self, state: Mapping[str, Any], offers: Mapping[str, Mapping[str, Array]]) -> None:
        """Go on from a checkpoint.

        A peer whose answer is not in it is asked for the same step again, and answers the same.
        """
        self.report.resume(Snapshot(*state["now"]))
        self._courses = {number: _Course(*course) for number, course in state["courses"].items()}
        self._roster.load_state_dict(state["roster"], self._clock.now())
        self._links.load_state_dict(state["links"], offers)
        self._tally.load_state_dict(state["tally"])
        self._models, self._written = state["models"], state["written"]

    def _checkpoint(self) -> dict[str, Any]:
        """The state that :meth:`resume` goes on from, beside the offers."""
        return {
            "now": tuple(self.report.snapshot()),
            "courses": {
                number: (course.step, course.joined) for number, course in self._courses.items()
            },
            "roster": self._roster.state_dict(),
            "links": self._links.state_dict(),
            "tally": self._tally.state_dict(),
            "models": self._models,
            "written": self._written,
        }

    def run(self) -> dict[int, Vectors]:
        """Run all exchanges.

        Returns:
            The models of the peers by site number, where the server may have them.

        Raises:
            RunError: fewer than ``min-sites`` peers go on for ``timeout-s``.
        """
        while (
            any(course.step <= self._last for course in self._present().values())
            or not self._present()
        ):
            self._send()
            self._enough()
            for message, reply in self._mailbox.receive(
                once=len(self._present()) < len(self._sites)
            ):
                self._answered(self._numbers[message.metadata.dst_node_id], reply)
                # Before the peer is asked for more.
                self.report.emit(Checkpoint(self._checkpoint, self._links.offers))
        self._report_tests(finished=True)
        for (sender, reader), count in sorted(self._links.delivered.items()):
            node = self._sites[sender].node
            self.report.write(
                self.exchanges, "links", {node: {f"bytes-to-{reader}": float(count)}}, None
            )
        return self._models

    def _present(self) -> dict[int, _Course]:
        return {number: self._courses[number] for number in self._roster.here()}

    def _front(self) -> int:
        return max((course.step for course in self._present().values()), default=0)

    def _is_cross(self, step: int) -> bool:
        return self._messages == 2 and step % 2 == 1

    def _neighbours(self, step: int, peer: int) -> dict[int, float]:
        """Whose offers a peer gets in a step, with their weights."""
        return self._topology.neighbours(self._plan.exchange(step), peer) if step else {}

    def _ready(self, peer: int, step: int) -> bool:
        """Whether all that a peer must have for a step is there."""
        others = [
            (j, self._courses[j])
            for j in self._neighbours(step, peer)
            if j in self._courses and not self._roster.away(j)
        ]
        return all(other.step >= step or step - 1 < other.joined for _, other in others)

    # Calls.

    def _send(self) -> None:
        """Call every peer whose next step can be taken, and those that are away and may be back."""
        self.report.update_connected(connected := set(self._grid.get_node_ids()))
        self._roster.update_connected(
            {number for number, site in self._sites.items() if site.node in connected},
            self._clock.now(),
        )
        front = self._front()
        due = self._roster.due(front) if front <= self._last else []
        calls = []
        for peer, course in self._courses.items():
            if peer in self._in_flight:
                continue
            if self._roster.away(peer):
                if peer in due:
                    self._catch_up(course, front)
                    self._roster.call(peer)
                    calls.append(self._call(peer, rejoin=True))
            elif course.step <= self._last and self._sites[peer].node not in connected:
                self._lose(peer, "not connected")
            elif course.step <= self._last and self._ready(peer, course.step):
                calls.append(self._call(peer, rejoin=False))
        self.report.sent(calls)
        self._mailbox.send(calls)

    def _catch_up(self, course: _Course, front: int) -> None:
        """A peer that was away goes on near the front, the step of the others.

        Neighbourhood gradients begin with the models, in an odd step.
        """
        course.step = max(course.step, front)
        if self._messages == 2 and course.step % 2 == 0 and course.step:
            course.step += 1 if course.step < self._last else -1

    def _call(self, peer: int, *, rejoin: bool) -> Message:
        step = self._courses[peer].step
        number, last, config = self._plan.exchange(step), step == self._last, self._config
        trusting = config.wire.sealing == "trust-on-first-use"
        listeners = None if config.wire.sealing == "off" else self._listeners(peer, step, rejoin)
        neighbours = self._neighbours(step, peer)
        order = self._in_flight[peer] = PeerOrder(
            step=step,
            agreed=self._federation.agreed(),
            neighbours=neighbours,
            test=not self._is_cross(step)
            and (last or (step > 0 and (number + 1) % self._every == 0)),
            last=last,
            rejoin=rejoin,
            reset=any(
                sender == peer and not self._roster.away(reader)
                for sender, reader in self._links.stale
            ),
            done=self._plan.done(step, self.exchanges),
            listeners=listeners,
            keys={
                site.number: site.key
                for site in self._federation.sites
                if trusting and site.number != peer
            },
            nonces={
                each: self._nonces[each]
                for each in sorted({*neighbours, *(listeners or ())} & self._nonces.keys())
            },
        )
        records: dict[str, Any] = {CONFIG: write_peer_order(order)}
        for j in order.neighbours:
            keys = self._links.waiting(j, peer, step, rejoin=rejoin)
            self._delivering.setdefault(peer, []).extend((j, key) for key in keys)
            if arrays := self._links.get(j, peer, keys):
                records[f"{FROM}{j}"] = ArrayRecord(arrays)
        kind = "train.cross" if self._is_cross(step) else "train.peer"
        return Message(RecordDict(records), self._sites[peer].node, kind)

    def _listeners(self, peer: int, step: int, rejoin: bool) -> tuple[int, ...]:
        """Who may read what a peer offers.

        An offer of a peer that rejoins may be read later than in the next exchange.
        """
        exchanges = (
            range(len(self._topology.matrices)) if rejoin else [self._plan.exchange(step + 1)]
        )
        of = self._topology.neighbours
        return tuple(
            reader for reader in self._sites if any(peer in of(each, reader) for each in exchanges)
        )

    # Answers.

    def _answered(self, peer: int, reply: Message) -> None:
        """Take in the answer of a peer, or its error."""
        order, site, config = self._in_flight.pop(peer), self._sites[peer], self._config
        step, given = order.step, self._delivering.pop(peer, [])
        sealed = config.wire.sealing != "off"
        read = partial(
            read_offer,
            order=order,
            layout=self._layout,
            num_examples=site.num_train,
            num_tests=site.num_test,
            readers=self._sites.keys(),
            model=order.last and config.wire.collect_models and not sealed,
            means=self.report.measure.means,
        )
        offer = self.report.receive(site.node, reply, step, "exchange", read)
        if isinstance(offer, InvalidReply):
            self._lose(peer, str(offer), failed=not gone(reply))
            # It may have taken the step, and takes a sealed step only once.
            if sealed and step < self._last:
                self._courses[peer].step = step + 1
            return
        for j, key in given:
            self._links.deliver(j, peer, key)
        self._handle_notes(peer, step, offer)
        self._advance(peer, step, offer)
        self._store(peer, step, offer.arrays)
        if offer.model is not None:
            self._models[peer] = offer.model
        elif offer.flaw:
            self.report.refuse(site.node, step, "mean of the models", offer.flaw)
        self._record_metrics(peer, step, offer.metrics)

    def _handle_notes(self, peer: int, step: int, offer: Offer) -> None:
        """Act on a peer's notes: payloads that it refuses, channels to reset, its nonce."""
        self.report.refused_by_peer(self._sites[peer].node, step, offer.notes.refused)
        self._links.stale |= {(j, peer) for j in offer.notes.broken}
        if offer.notes.nonce is not None:  # another one than before if it lost its memory
            self._nonces[peer] = offer.notes.nonce
        if offer.notes.reset:
            self._links.stale -= {(peer, reader) for reader in self._present()}
            for reader in self._sites:
                self._links.clear(peer, reader)

    def _advance(self, peer: int, step: int, offer: Offer) -> None:
        """The next step of a peer; who is back goes on where the others are."""
        course = self._courses[peer]
        if not self._roster.answer(peer):
            course.step = step + 1
            return
        front = max(
            (other.step for number, other in self._present().items() if number != peer),
            default=step + 1,
        )
        front = max(front, step + 1)
        front += (front - step - 1) % 2 if self._messages == 2 else 0
        # No peer leaves out the last step.
        course.step = front if step == self._last else min(front, self._last)
        course.joined = course.step - 1
        how = ", has lost its memory of this run and starts again" if offer.notes.lost else ""
        log(WARNING, "step %d: site %d is back%s", step, peer, how)

    def _store(self, peer: int, step: int, arrays: Mapping[str, Array]) -> None:
        """Put what a peer offers on the links to those who hear it next."""
        at = self._courses[peer].step
        readers = [
            reader
            for reader in self._sites
            if reader != peer and peer in self._neighbours(at, reader)
        ]
        self._links.put(peer, readers, at - 1, step, arrays)
        if (
            not self._choco
        ):  # a reader that is away finds the newest; on a directed graph one may be far behind
            for reader in readers:
                first = at - 2 if self._roster.away(reader) else self._courses[reader].step - 1
                self._links.drop_before(peer, reader, first)

    def _lose(self, peer: int, reason: str, *, failed: bool = False) -> None:
        self._delivering.pop(peer, None)
        if self._choco:  # it will miss differences, and may have missed these
            self._links.miss(peer)
        # Who fails again and again is called ever less often.
        call_from = max(other.step for other in self._courses.values()) + self._roster.pause(peer)
        self._roster.lose(peer, reason, self._clock.now(), failed=failed, call_from=call_from)
        self._report_tests()

    def _enough(self) -> None:
        """Wait for peers to come back where too few are left; not for ever."""
        left = self._roster.left_s(self._clock.now())
        if left == math.inf:
            return
        if left <= 0:
            raise RunError(self._roster.shortage("peers"))
        if not self._mailbox:
            self._roster.call_silent_now()
            self._send()
            if not self._mailbox:
                self._clock.wait(LONGEST_WAIT_S, left)

    # Tests.

    def _record_metrics(self, peer: int, step: int, metrics: StepMetrics) -> None:
        """Record what a peer reports of its training and, where it tested, of the test."""
        number = self._plan.exchange(step) + 1
        # If the test is older, the peer was away when the others took it.
        tested = metrics.test_examples is not None and number > self._written
        self._tally.add(peer, metrics, number if tested else None, self.report.snapshot())
        self._report_tests()

    def _report_tests(self, *, finished: bool = False) -> None:
        """Report the tests, in their order, that everybody took who will."""
        for number in self._tally.pending():
            step, missing = (
                number * self._messages,
                self._present().keys() - self._tally.answered(number),
            )
            waiting = (self._courses[peer] for peer in missing)
            if not finished and any(
                course.step <= step and course.joined <= step for course in waiting
            ):
                return
            self._report_test(number)

    def _report_test(self, number: int) -> None:
        test, epochs = self._tally.pop(number), self._config.epochs
        train = test.train_means() | {
            "local-epochs": (number - self._written) * epochs / self.exchanges
        }
        self._written = number
        nodes = {peer: self._sites[peer].node for peer in test.answers}
        self.report.write(
            number,
            "train",
            {nodes[peer]: each for peer, each in test.train.items()},
            train,
            test.snapshot,
        )
        mean = self.report.test(
            number, {nodes[peer]: each for peer, each in test.answers.items()}, test.snapshot
        )
        self.report.progress(
            number, None, number * epochs / self.exchanges, test.snapshot, train, mean
        )
