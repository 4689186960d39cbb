"""Asynchronous training: every site works all the time; the model changes with each arrival.

A site is sent the newest model as soon as its last contribution was applied. When one is applied is the white list's affair, what
it does to the model the rule's. Tests go out after every so many updates, on the model of that moment, and nobody waits for them.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from configuration.config import Config
from server_app.census import Federation, RunError, an_epoch, budget
from server_app.exchange import GONE, LONGEST_WAIT_S, Mailbox, clock_of
from server_app.report import Moment, Report, numbers
from server_app.results import History, Progress
from strategies.asynchronous.rule import Update
from strategies.asynchronous.white_list import WhiteList
from strategies.averaging.average import NUM_EXAMPLES, weighted_metrics
from strategies.method import ArrivalPlan, Local
from strategies.records import ARRAYS, CONFIG, METRICS, STATS, X, arrays_of, metrics_of, order, pack, unpack


class _Flight(NamedTuple):
    """A training message under way."""

    base: Tensor
    version: int


class _Contribution(NamedTuple):
    """What a site sent; several of them averaged where it did not wait for its turn."""

    update: Update
    version: int
    parts: int


@dataclass
class _Period:
    """What arrived since the last test."""

    losses: dict[int, list[float]] = field(default_factory=dict)
    staleness: dict[int, list[int]] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)


@dataclass
class _Test:
    """A test under way: what was true when it began, and the answers so far."""

    moment: Moment
    waiting: set[int]
    train: dict[str, float]
    answers: dict[int, MetricRecord] = field(default_factory=dict)


class Asynchronous:
    """Drives a rule over the sites of a federation.

    A site that fails is left out until the next test, one that is silent or gone until it is back; nobody waits for them.

    Args:
        grid: the way to the sites.
        plan: what an arrival does to the model, and when.
        federation: the sites.
        config: the run.
        history: is told everything.
    """

    def __init__(
        self,
        grid: Grid,
        plan: ArrivalPlan,
        federation: Federation,
        config: Config,
        history: History,
    ) -> None:
        self._grid, self._plan, self._federation, self._config, self._history = grid, plan, federation, config, history
        self._rule = plan.rule
        self._clock = clock_of(grid)
        self._report = Report(federation, history, self._clock, "update")
        self._mailbox = Mailbox(grid, config.timeout_s)
        self._nodes = [site.node for site in federation.sites]
        self._list = WhiteList(self._nodes, math.inf if plan.schedule.kind == "arrival" else plan.schedule.slack)
        self._blocking = plan.schedule.kind != "local"
        self._flying: dict[int, _Flight] = {}
        self._waiting: dict[int, _Contribution] = {}
        self._failed: set[int] = set()
        self._gone: dict[int, float] = {}  # silent, or gone from the grid: since when
        self._absent: set[int] = set()  # those gone from the grid
        self._least = min(config.min_sites, len(self._nodes))
        batches = an_epoch(federation, config.training.batch_size) * len(federation.sites)
        self._total, self._every = budget(config, plan, batches)
        self._updates = 0
        self._period = _Period()
        self._tests: dict[int, _Test] = {}

    def run(self, arrays: ArrayRecord) -> ArrayRecord:
        """From the initial model to the last one.

        Raises:
            RunError: fewer than ``min-sites`` sites work; what was reached so far is in the history.
        """
        self._sizes = {name: array.shape[-1] for name, array in arrays.items()}
        self._state = self._rule.init(unpack(arrays[X]))
        self._stats = unpack(arrays[STATS]).clone() if STATS in arrays else torch.empty(0)
        self._dispatch(self._nodes)
        while self._updates < self._total or self._tests:
            self._readmit()
            for message, reply in self._mailbox.receive(once=bool(self._gone)):
                node = message.metadata.dst_node_id
                if message.metadata.message_type == MessageType.EVALUATE:
                    self._tested(int(message.metadata.group_id), node, reply)
                else:
                    self._arrived(node, reply)
        return self._model()

    def _model(self) -> ArrayRecord:
        return pack({X: self._state.x, STATS: self._stats})

    def _dispatch(self, nodes: list[int]) -> None:
        """Send the newest model to sites to train on."""
        nodes = [node for node in nodes if node not in self._flying]
        if not nodes or self._updates >= self._total:
            return
        model, cycle = self._model(), (self._updates / self._total, (self._updates + 1) / self._total)
        local = Local(self._config.training.rate, cycle, steps=self._plan.steps, proximal=self._plan.proximal, delta=True)
        told = ConfigRecord(
            {
                "server-round": self._updates + 1,
                **self._federation.agreed(),
                **order(local),
            }
        )
        connected = set(self._grid.get_node_ids())
        messages = []
        for node in nodes:
            if node not in connected:
                self._lose(node)
                continue
            self._failed.discard(node)
            messages.append(Message(RecordDict({ARRAYS: model, CONFIG: told}), node, MessageType.TRAIN))
            self._flying[node] = _Flight(unpack(model[X]), self._state.version)
        for message in messages:
            self._report.sent(message)
        self._mailbox.send(messages)

    def _arrived(self, node: int, reply: Message) -> None:
        """A site has trained."""
        flight = self._flying.pop(node)
        if not self._report.received(node, reply, self._sizes, self._updates):
            if reply.has_error() and reply.error.code in GONE:
                self._lose(node)
            else:
                self._gone.pop(node, None)
                self._failed.add(node)
                if len(self._nodes) - len(self._failed) < self._least:
                    raise RunError(
                        f"update {self._updates}: {len(self._nodes) - len(self._failed)} sites send what can be used, "
                        f"min-sites = {self._least}: stopped"
                    )
                self._apply(self._list.set_aside(node))
            return
        self._gone.pop(node, None)
        if self._updates >= self._total:  # it came too late to matter
            return
        metrics, arrays = numbers(metrics_of(reply)), arrays_of(reply)
        self._period.losses.setdefault(node, []).append(metrics["loss"])
        self._period.rates.append(metrics["lr-first"])
        if STATS in arrays:
            self._stats.lerp_(unpack(arrays[STATS]), 1 / len(self._nodes))
        update = Update(unpack(arrays[X]), flight.base, metrics["lr-sum"], 0)
        self._waiting[node] = self._merged(node, update, flight.version)
        released = self._list.arrive(node)
        if not self._blocking and node not in released:
            self._dispatch([node])
        self._apply(released)

    def _merged(self, node: int, update: Update, version: int) -> _Contribution:
        """What a site contributes: the mean of all that it sent since its last turn, as old as the first of it."""
        known = self._waiting.get(node)
        if known is None:
            return _Contribution(update, version, 1)
        delta = torch.lerp(known.update.delta, update.delta, 1 / (known.parts + 1))
        return known._replace(update=known.update._replace(delta=delta), parts=known.parts + 1)

    def _apply(self, nodes: list[int]) -> None:
        """The contributions of sites, one after the other; then these sites go on with the newest model."""
        for node in nodes:
            contribution = self._waiting.pop(node)
            if self._updates >= self._total:
                continue
            staleness = self._state.version - contribution.version
            self._state = self._rule.absorb(self._state, contribution.update._replace(staleness=staleness))
            self._updates += 1
            self._period.staleness.setdefault(node, []).append(staleness)
            if node not in self._flying:
                self._dispatch([node])
            if self._updates % self._every == 0 or self._updates == self._total:
                self._test()

    def _lose(self, node: int) -> None:
        """A site is silent or gone."""
        self._failed.discard(node)
        self._gone.setdefault(node, self._clock.now())
        self._apply(self._list.set_aside(node))

    def _readmit(self) -> None:
        """Sites that may be back get the newest model; without enough that answer the run waits for ``timeout-s``."""
        connected = set(self._grid.get_node_ids()) if self._gone else set()
        for node in self._gone:
            if node not in connected:
                self._absent.add(node)
            elif node in self._absent:  # from now on it has its time to answer
                self._absent.discard(node)
                self._gone[node] = self._clock.now()
        self._dispatch([node for node in self._gone if node in connected])
        working = len(self._nodes) - len(self._gone) - len(self._failed)
        if working >= self._least or self._updates >= self._total:
            return
        # Since when there are too few: since as many were gone as leave one too few.
        since = sorted(self._gone.values())[min(len(self._gone), len(self._nodes) - len(self._failed) - self._least + 1) - 1]
        left = self._config.timeout_s - (self._clock.now() - since)
        if left <= 0:
            raise RunError(
                f"update {self._updates}: {working} sites answer after timeout-s = {self._config.timeout_s:g}, "
                f"min-sites = {self._least}: stopped"
            )
        if not self._mailbox:
            self._clock.wait(LONGEST_WAIT_S, left)

    def _test(self) -> None:
        """Send the newest model to all sites for a test; who failed may train again."""
        self._history.keep(model := self._model())
        self._dispatch([node for node in self._nodes if node in self._failed])
        connected = set(self._grid.get_node_ids())
        told = ConfigRecord({"server-round": self._updates, **self._federation.agreed()})
        messages = [
            Message(RecordDict({ARRAYS: model, CONFIG: told}), node, MessageType.EVALUATE, group_id=str(self._updates))
            for node in self._nodes
            if node in connected
        ]
        for message in messages:
            self._report.sent(message)
        train = self._train_metrics()
        if messages:  # else nobody is there to test it
            nodes = {message.metadata.dst_node_id for message in messages}
            self._tests[self._updates] = _Test(self._report.moment(), nodes, train)
            self._mailbox.send(messages)

    def _train_metrics(self) -> dict[str, float]:
        """Write down what training reported since the last test; the means."""
        period, self._period = self._period, _Period()
        staleness = [each for of_site in period.staleness.values() for each in of_site]
        losses = [each for of_site in period.losses.values() for each in of_site]
        of_sites = {
            node: {
                "updates": float(len(period.staleness.get(node, ()))),
                "staleness": _mean(period.staleness.get(node, ())),
                "loss": _mean(period.losses.get(node, ())),
            }
            for node in self._nodes
        }
        together = {"updates": float(len(staleness)), "staleness": _mean(staleness), "loss": _mean(losses)}
        together["local-epochs"] = len(staleness) * self._config.epochs / self._total
        together |= {"lr-first": period.rates[0], "lr-last": period.rates[-1]} if period.rates else {}
        counts = {f"staleness-{each}": float(count) for each, count in sorted(Counter(staleness).items())}
        known = {node: {key: value for key, value in row.items() if not math.isnan(value)} for node, row in of_sites.items()}
        together = {key: value for key, value in together.items() if not math.isnan(value)}
        self._report.write(self._updates, "train", known, together | counts)
        return together

    def _tested(self, number: int, node: int, reply: Message) -> None:
        """A site has tested; when all have, that is written down."""
        test = self._tests[number]
        test.waiting.discard(node)
        if self._report.received(node, reply, None, number):
            test.answers[node] = metrics_of(reply)
        if test.waiting:
            return
        del self._tests[number]
        answers = [RecordDict({METRICS: metrics}) for metrics in test.answers.values()]
        mean = numbers(weighted_metrics(answers, NUM_EXAMPLES)) if answers else {}
        answered = {each: numbers(metrics) for each, metrics in test.answers.items()}
        self._report.write(number, "test", answered, mean or None, test.moment)
        done = number * self._config.epochs / self._total
        now = test.moment
        progress = Progress("update", number, None, done, self._config.epochs, now.seconds, now.megabytes(), test.train, mean)
        self._history.tell(progress)


def _mean(values: Any) -> float:
    return sum(values) / len(values) if values else float("nan")
