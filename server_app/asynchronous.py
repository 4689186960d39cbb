"""Asynchronous training: every site works all the time; the model changes with each arrival.

A site is sent the newest model as soon as its last contribution was applied. The schedule says when
one is applied, the rule what it does to the model. Tests are sent after every so many updates, with
the model of that moment, and nobody waits for them.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from configuration.config import Config
from configuration.network import down_codec_of
from server_app.bound import Bound, Change
from server_app.discovery import Federation, RunError, an_epoch, budget
from server_app.events import Checkpoint, NewModel, Sink
from server_app.exchange import LONGEST_WAIT_S, Mailbox, clock_of, gone, wait_as_long_again
from server_app.period import PendingTest, Period
from server_app.report import Report, Snapshot
from server_app.roster import Roster
from strategies.asynchronous.rule import Update
from strategies.asynchronous.white_list import WhiteList
from strategies.averaging.mean import LARGEST, extent, magnitude
from strategies.method import ArrivalPlan, LocalTraining
from strategies.protocol import (
    InvalidReply,
    Layout,
    Order,
    Trained,
    read_tested,
    read_trained,
    write_model,
    write_order,
)
from strategies.records import ARRAYS, CONFIG, STATS, X, pack, unpack
from strategies.schedules import rates

FASTEST = 10.0  # times the median speed: a site that answers at once is no measure for the others
UNSAFE = f"with it the model may hold more than {LARGEST:.3g}; a smaller lr or server-lr may help"


class _Flight(NamedTuple):
    """A training message under way: vectors, version of the model, the task, and the time.

    Attributes:
        sent: the vectors; ``x`` is empty where the rule does without it, so that no model is stored
            here for each site.
        norms: of the vectors, as long as a bound needs them.
    """

    sent: dict[str, Tensor]
    norms: dict[str, float]
    version: int
    local: LocalTraining
    at: float


class _Part(NamedTuple):
    """A site's update, the version it began with, its batches, its largest magnitude."""

    update: Update
    version: int
    steps: int
    largest: float


class _Extremes(NamedTuple):
    """Largest magnitudes of all models and updates so far, and smallest sum of learning rates."""

    x: float = 0.0
    delta: float = 0.0
    lr: float = math.inf


class Asynchronous:
    """Drives a plan over the sites of a federation.

    A site that fails is left out until the next test, one that is silent or gone until it is back;
    nobody waits for either.

    Args:
        grid: the way to the sites.
        plan: what an arrival does to the model, and when.
        federation: the sites.
        config: the run.
        layout: of a model.
        sink: gets every event.
    """

    def __init__(
        self,
        grid: Grid,
        plan: ArrivalPlan,
        federation: Federation,
        config: Config,
        layout: Layout,
        sink: Sink,
    ) -> None:
        self._grid, self._plan, self._federation, self._config = grid, plan, federation, config
        self._layout, self._clock = layout, clock_of(grid)
        self._report = Report(federation, config, sink, self._clock, "update")
        self._mailbox = Mailbox(grid, config.timeout_s, self._report.update_connected)
        self._sites = {site.node: site for site in federation.sites}
        names = {site.node: f"site {site.number}" for site in federation.sites}
        self._roster = Roster(names, config.min_sites, config.patience_s)
        self._list = WhiteList(
            self._sites, math.inf if plan.schedule.kind == "arrival" else plan.schedule.slack
        )
        self._in_flight: dict[int, _Flight] = {}
        self._waiting: dict[int, list[_Part]] = defaultdict(list)
        self._bounds = {name: Bound(config.max_change) for name in layout.sizes}
        self._extremes = _Extremes()
        self._speeds: dict[int, float] = {}  # examples a second
        batches = an_epoch(federation, config.training.batch_size) * len(federation.sites)
        self._total, self._every = budget(config, plan, batches)
        self._updates = self._tested = 0
        self._done = 0.0  # updates, each as a part of a whole one where sites take fewer batches
        self._period = Period(0.0)
        self._tests: dict[int, PendingTest] = {}
        self._later: dict[int, float] = {}  # when sites whose service is away are called again
        # Whether nobody could take the newest test, and when it was first sent.
        self._blind, self._test_since = False, 0.0
        # The last checkpoint, and whether there was a test since.
        self._saved, self._tested_since = self._clock.now(), False
        self._resumed: Mapping[str, Any] = {}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        What sites did since then is lost: they are sent the newest model again.
        """
        self._resumed = dict(state)
        self._report.resume(Snapshot(*state["now"]))
        self._extremes, self._updates, self._tested, self._done, start = state["counts"]
        self._period = Period(start)
        nodes = {site.number: site.node for site in self._sites.values()}
        self._list.counts |= {nodes[number]: count for number, count in state["list"].items()}
        self._speeds = {nodes[number]: speed for number, speed in state["speeds"].items()}
        for name, changes in state["bounds"].items():
            self._bounds[name].largest |= {
                nodes[number]: change for number, change in changes.items()
            }

    def _checkpoint(self) -> dict[str, Any]:
        """The state that :meth:`resume` goes on from."""
        number = {node: site.number for node, site in self._sites.items()}
        return {
            "now": tuple(self._report.snapshot()),
            "rule": self._state,
            "stats": self._stats,
            "counts": (self._extremes, self._updates, self._tested, self._done, self._period.start),
            "list": {number[node]: count for node, count in self._list.counts.items()},
            "speeds": {number[node]: speed for node, speed in self._speeds.items()},
            "bounds": {
                name: {number[node]: each for node, each in bound.largest.items()}
                for name, bound in self._bounds.items()
            },
        }

    def _save(self) -> None:
        """Offer a checkpoint after a test, and when the last one is old.

        What is being tested must be reported first.
        """
        minutes = self._config.results.checkpoint_minutes
        untested = self._blind and self._done >= self._total  # nobody could go on from there
        old = self._clock.now() - self._saved > 60 * minutes > 0
        if not self._tests and not untested and (self._tested_since or old):
            self._saved, self._tested_since = self._clock.now(), False
            self._report.emit(Checkpoint(self._checkpoint))

    def run(self, arrays: ArrayRecord) -> ArrayRecord:
        """Train from the initial model, or from that of a checkpoint, to the last one.

        Raises:
            RunError: fewer than ``min-sites`` sites work, or no site can test the last model; what
                was reached so far was emitted.
        """
        known, stats = (
            self._resumed,
            unpack(arrays[STATS]).clone() if STATS in arrays else torch.empty(0),
        )
        self._state = known["rule"] if known else self._plan.rule.init(unpack(arrays[X]))
        self._stats: Tensor = known["stats"] if known else stats
        del arrays
        self._resumed = {}
        self._dispatch(list(self._sites))
        while self._done < self._total or self._tests:
            away = self._readmit()
            for message, reply in self._mailbox.receive(once=away):
                node = message.metadata.dst_node_id
                if message.metadata.message_type == MessageType.EVALUATE:
                    self._answered(int(message.metadata.group_id), node, reply)
                else:
                    self._arrived(node, reply)
                del reply  # a model: before the next one comes
            self._save()
        if self._blind:
            raise RunError(f"update {self._updates}: no site could test the model: it is of no use")
        return self._model()

    def _model(self) -> ArrayRecord:
        return pack({X: self._state.x, STATS: self._stats})

    # Sites.

    def _dispatch(self, nodes: list[int]) -> None:
        """Send the newest model to sites to train on."""
        nodes = [node for node in nodes if node not in self._in_flight]
        if not nodes or self._done >= self._total:
            return
        model, now, messages = self._model(), self._clock.now(), []
        sent = {name: unpack(array) for name, array in model.items()}
        norms = {name: extent(vector)[1] for name, vector in sent.items() if self._bounds[name].few}
        sent |= {} if self._plan.rule.based else {X: sent[X].new_empty(0)}
        down = down_codec_of(self._config.wire)
        model = write_model(model, down) if down else model
        connected = set(self._grid.get_node_ids())
        for node in nodes:
            if node not in connected:
                continue
            self._roster.call(node)
            local = self._local(node)
            order = write_order(Order(self._updates + 1, self._federation.agreed(), local))
            messages.append(
                Message(RecordDict({ARRAYS: model, CONFIG: order}), node, MessageType.TRAIN)
            )
            self._in_flight[node] = _Flight(sent, norms, self._state.version, local, now)
        self._report.sent(messages)
        self._mailbox.send(messages)
        # Last: that others need not wait for one that is lost may send them the newest model.
        for node in nodes:
            if node not in connected and not self._roster.away(node):
                self._lose(node, "not connected")

    def _local(self, node: int) -> LocalTraining:
        """The instruction for a site.

        With ``by_speed``, so many batches that all sites take equally long (DyLU).
        """
        plan, steps = self._plan, self._plan.steps
        if plan.by_speed and node in self._speeds:
            speeds = [self._speeds.get(other, 0.0) for other in {node, *self._roster.here()}]
            fastest = min(max(speeds), FASTEST * median(speeds)) or max(speeds)
            # 1e-6: clocks round.
            steps = max(1, math.floor(steps * min(1.0, self._speeds[node] / fastest) + 1e-6))
        cycle = self._done / self._total, min(1.0, (self._done + steps / plan.steps) / self._total)
        return LocalTraining(
            self._config.training.rate, cycle, steps=steps, proximal=plan.proximal, delta=True
        )

    def _lose(self, node: int, reason: str, *, failed: bool = False) -> None:
        """A site is silent or gone; or it failed, and is called again after the next test."""
        self._roster.lose(
            node, reason, self._clock.now(), failed=failed, call_from=self._tested + failed
        )
        self._apply(self._list.set_aside(node))

    def _readmit(self) -> bool:
        """Sites that may be back get the newest model; whether any is away.

        Raises:
            RunError: too few are here.
        """
        if len(self._roster.here()) == len(self._sites):
            return False
        self._report.update_connected(connected := set(self._grid.get_node_ids()))
        self._roster.update_connected(connected, self._clock.now())
        self._dispatch(
            [
                node
                for node in self._roster.due(self._tested)
                if self._later.get(node, 0.0) <= self._clock.now()
            ]
        )
        left = self._roster.left_s(self._clock.now())
        if left == math.inf or self._done >= self._total:
            return True
        if left <= 0:
            raise RunError(f"update {self._updates}: {self._roster.shortage()}")
        if not self._mailbox:
            self._clock.wait(LONGEST_WAIT_S, left)
        return True

    # Contributions.

    def _arrived(self, node: int, reply: Message) -> None:
        """Take in the contribution of a site."""
        flight, site = self._in_flight.pop(node), self._sites[node]
        # Of x the site sends the change itself.
        sent = {name: vector for name, vector in flight.sent.items() if name != X}
        read = partial(read_trained, layout=self._layout, num_examples=site.num_train, sent=sent)
        found = self._report.receive(node, reply, self._updates, "training", read)
        if isinstance(found, InvalidReply):
            self._later[node] = self._clock.now() + self._roster.pause(node)
            self._lose(node, str(found), failed=not gone(reply))
            return
        part = self._part(node, flight, found)
        if not self._safe(self._reached([part])):
            self._refuse(node, UNSAFE)
            return
        if reason := self._too_far(node, flight, found, part.update.lr):
            self._refuse(node, reason, "max-change")
            return
        self._roster.answer(node)
        if (elapsed := self._clock.now() - flight.at) > 0:
            self._speeds[node] = (
                part.steps
                / site.batches(self._config.training.batch_size)
                * site.num_train
                / elapsed
            )
        if self._done >= self._total:  # it came too late to matter
            return
        self._period.trained(node, found.metrics)
        if STATS in found.vectors:
            self._stats.lerp_(found.vectors[STATS], 1 / len(self._sites))
        self._waiting[node].append(part)
        released = self._list.arrive(node)
        if self._plan.schedule.kind == "local" and node not in released:
            self._dispatch([node])
        self._apply(released)

    def _part(self, node: int, flight: _Flight, found: Trained) -> _Part:
        keys, site, local = self._config.training, self._sites[node], flight.local
        cycle = (keys.lr_shape, keys.lr_ratio, keys.lr_steps, local.cycle)
        rate = rates(
            local.lr,
            *cycle,
            steps=local.steps,
            epoch=site.batches(keys.batch_size),
            warmup=keys.lr_warmup,
        )
        total = sum(map(rate, range(local.steps)))
        return _Part(
            Update(found.vectors[X], flight.sent[X], total, 0, site=node),
            flight.version,
            local.steps,
            found.largest,
        )

    def _too_far(self, node: int, flight: _Flight, found: Trained, total: float) -> str | None:
        """Whether a site moves the model further than others do."""
        changes = {
            name: Change(norm, total if name == X else 1.0) for name, norm in found.change.items()
        }
        for name, change in changes.items():
            size = flight.norms[name] if self._bounds[name].few else 0.0
            if reason := self._bounds[name].violation(change, size):
                return f"{name}: {reason}"
        for name, change in changes.items():
            self._bounds[name].accept(node, change)
        return None

    def _refuse(self, node: int, reason: str, rule: str = "") -> None:
        self._report.refuse(node, self._updates, "training", reason, rule)
        self._lose(node, reason, failed=True)

    def _apply(self, nodes: list[int]) -> None:
        """Apply the sites' contributions in turn; these sites go on with the newest model."""
        refill = self._plan.schedule.kind == "refill"
        for node in nodes:
            parts = self._waiting.pop(node)
            if self._done >= self._total:
                continue
            ages = [self._state.version - part.version for part in parts]
            *earlier, last = (
                part.update._replace(staleness=age) for part, age in zip(parts, ages, strict=True)
            )
            update = last._replace(earlier=tuple(earlier))
            if not self._safe(reached := self._reached(parts)):
                self._refuse(node, UNSAFE)
                continue
            self._extremes, steps = reached, sum(part.steps for part in parts) / len(parts)
            self._state = self._plan.rule.absorb(self._state, update)
            del parts, earlier, last, update
            self._period.applied(node, ages)
            before, self._updates = self._done, self._updates + 1
            self._done += steps / self._plan.steps
            if not refill:
                self._dispatch([node])
            if self._done // self._every > before // self._every or self._done >= self._total:
                self._test()
        if refill and self._list.even:
            self._dispatch(self._roster.here())

    def _reached(self, parts: list[_Part]) -> _Extremes:
        """The extremes of all sites if these contributions were accepted."""
        old = self._extremes
        return _Extremes(
            max(magnitude(self._state.x), old.x),
            max(old.delta, *(part.largest for part in parts)),
            min(old.lr, *(part.update.lr for part in parts)),
        )

    def _safe(self, reached: _Extremes) -> bool:
        """Whether the model surely stays within bounds, so that nothing need ever be taken back."""
        return magnitude(self._state.x) + self._plan.rule.reach(*reached) < LARGEST

    # Tests.

    def _test(self) -> None:
        """Have all sites test the newest model; who failed may train again."""
        self._tested += 1
        self._report.emit(NewModel(self._model()))
        self._test_since = self._clock.now()
        messages = self._test_messages()
        of_sites, train = self._period.means(list(self._sites))
        train["local-epochs"] = (
            (self._done - self._period.start) * self._config.epochs / self._total
        )
        self._period = Period(self._done)
        self._report.write(self._updates, "train", of_sites, train)
        self._send_test(messages, train)

    def _testers(self) -> list[int]:
        """The sites that are asked to test: those that are here.

        The last model waits for some to be, as long as ``patience-s`` says.
        """
        is_last = self._done >= self._total
        while True:
            self._report.update_connected(connected := set(self._grid.get_node_ids()))
            there = [node for node in self._sites if node in connected]
            if there or not is_last or (left := self._patience_left_s()) <= 0:
                break
            self._clock.wait(LONGEST_WAIT_S, left)
        here = [node for node in there if not self._roster.silent(node)]
        return here or (there if is_last else [])

    def _patience_left_s(self) -> float:
        return self._test_since + self._config.patience_s - self._clock.now()

    def _test_messages(self) -> list[Message]:
        model = self._model()
        order = write_order(Order(self._updates, self._federation.agreed()))
        messages = [
            Message(
                RecordDict({ARRAYS: model, CONFIG: order}),
                node,
                MessageType.EVALUATE,
                group_id=str(self._updates),
            )
            for node in self._testers()
        ]
        self._report.sent(messages)
        return messages

    def _send_test(self, messages: list[Message], train: Mapping[str, float]) -> None:
        self._blind = not messages
        if messages:  # else nobody is there to test it
            nodes = {message.metadata.dst_node_id for message in messages}
            self._tests[self._updates] = PendingTest(
                self._report.snapshot(), self._done, nodes, train
            )
            self._mailbox.send(messages)

    def _answered(self, number: int, node: int, reply: Message) -> None:
        """Take in the test of a site; report the test when all sites have answered."""
        test = self._tests[number]
        test.waiting.discard(node)
        read = partial(
            read_tested, num_examples=self._sites[node].num_test, means=self._report.measure.means
        )
        found = self._report.receive(node, reply, number, "test", read)
        if not isinstance(found, InvalidReply):
            test.answers[node] = found.named()
        test.lost |= gone(reply)
        if test.waiting:
            return
        del self._tests[number]
        if number == self._updates:  # an older one may end after it
            self._blind = not test.answers
            left = self._patience_left_s() if self._blind and test.lost else 0.0
            if self._done >= self._total and left > 0:
                wait_as_long_again(self._clock, self._test_since, left)
                self._send_test(self._test_messages(), test.train)
                return
        self._tested_since = True
        mean = self._report.test(number, test.answers, test.snapshot)
        self._report.progress(
            number,
            None,
            test.done * self._config.epochs / self._total,
            test.snapshot,
            test.train,
            mean,
        )
