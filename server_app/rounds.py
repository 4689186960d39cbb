"""Synchronous rounds: train everywhere, aggregate, test everywhere, until the epochs are used up.

The model of a round is tested with the message of the next round, before training goes on: a round
is one message to each site and one answer. Only the last model, and models of sites that learn
alone for a common prediction, are tested by messages of their own.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from logging import WARNING
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

from flwr.app import ArrayRecord, ConfigRecord, Message, Metadata, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from configuration.config import Config
from configuration.flower import log
from configuration.network import down_codec_of
from server_app.bound import FEW, Bound, Change
from server_app.discovery import LOG_EVERY_S, Federation, RunError, an_epoch
from server_app.events import Checkpoint, NewModel, Sink
from server_app.exchange import LONGEST_WAIT_S, Mailbox, clock_of, gone, wait_as_long_again
from server_app.report import Report, Snapshot
from server_app.roster import Roster
from server_app.spool import Waiting
from strategies.averaging.mean import extent, magnitude, too_large
from strategies.method import AlonePlan, ForeignPlan, LocalTraining, RoundStart
from strategies.protocol import (
    TEST,
    InvalidReply,
    Layout,
    Order,
    TestMetrics,
    Trained,
    TrainMetrics,
    read_order,
    read_tested,
    read_trained,
    reason_of,
    write_model,
    write_order,
)
from strategies.randomness import derive
from strategies.records import ARRAYS, STATS, X, arrays_of, config_of, pack, unpack
from strategies.schedules import rates

T = TypeVar("T")


class Answer(NamedTuple, Generic[T]):
    """A reply that can be used: whose it is, what it answers, and what it says."""

    node: int
    message: Message
    reply: Message
    found: T


@runtime_checkable
class Stateful(Protocol):
    """A strategy that remembers more than the model from round to round."""

    def state_dict(self) -> dict[str, Any]:
        """The state, as plain values and tensors."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state."""


class _TooFew(RuntimeError):
    """Too few sites answered in a round: their answers were not used."""


class Rounds:
    """Drives a strategy over the sites of a federation.

    Where Flower's ``Strategy.start`` waits for all replies and stops at the first that does not
    fit, this driver gives each reply to the strategy when it arrives, leaves out a site whose reply
    cannot be used, and reports what every site says. A site that is silent is waited for once: from
    then on it is called, but not waited for, until it answers. A round that too few answer since
    they are away is tried again when they are back.

    Args:
        grid: the way to the sites.
        strategy: what happens to the models.
        instruct: what sites do in a round that begins with a model [d], or with models [n, d] where
            they learn alone.
        federation: the sites.
        config: the run.
        layout: of a model.
        sink: gets every event.
    """

    def __init__(
        self,
        grid: Grid,
        strategy: Strategy,
        instruct: Callable[[RoundStart, Tensor], LocalTraining],
        federation: Federation,
        config: Config,
        layout: Layout,
        sink: Sink,
    ) -> None:
        self._grid, self._strategy, self._instruct, self._config = grid, strategy, instruct, config
        self._federation, self._layout = federation, layout
        self._an_epoch = an_epoch(federation, config.training.batch_size)
        self._clock = clock_of(grid)
        self._sites = {site.node: site for site in federation.sites}
        self._report = Report(federation, config, sink, self._clock, "round")
        self._mailbox = Mailbox(grid, config.timeout_s, self._report.update_connected)
        names = {site.node: f"site {site.number}" for site in federation.sites}
        self._roster = Roster(names, config.min_sites, config.patience_s)
        self._latest: dict[int, Metadata] = {}  # of the message to each site
        # The model that each site trains, before the codec.
        self._sent: dict[int, dict[str, Tensor]] = {}
        self._down = down_codec_of(config.wire)
        self._bounds: dict[str, Bound] = defaultdict(partial(Bound, config.max_change))
        # Whether a model is tested in the message that has it trained further.
        self._test_first = not (isinstance(config.plan, AlonePlan) and config.plan.ensemble)
        self._number, self._done = 0, 0.0  # rounds and epochs that are over
        # Of the last model, and of the last test.
        self._reached, self._tested = self._report.snapshot(), dict[str, float]()

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on after the round of a checkpoint."""
        self._number, self._done, self._tested = state["number"], state["done"], state["tested"]
        self._report.resume(Snapshot(*state["now"]))
        self._reached = Snapshot(*state["reached"])
        nodes = {site.number: site.node for site in self._sites.values()}
        for name, changes in state["bounds"].items():
            for number, change in changes.items():
                self._bounds[name].largest[nodes[number]] = change
        if isinstance(self._strategy, Stateful):
            self._strategy.load_state_dict(state["strategy"])

    def _checkpoint(self) -> dict[str, Any]:
        """The state that :meth:`resume` goes on from."""
        numbers = {node: site.number for node, site in self._sites.items()}
        return {
            "number": self._number,
            "done": self._done,
            "tested": self._tested,
            "now": tuple(self._report.snapshot()),
            "reached": tuple(self._reached),
            "bounds": {
                name: {numbers[node]: each for node, each in bound.largest.items()}
                for name, bound in self._bounds.items()
            },
            "strategy": self._strategy.state_dict() if isinstance(self._strategy, Stateful) else {},
        }

    def run(self, arrays: ArrayRecord, beside: Iterable[str] = ()) -> ArrayRecord:
        """Train from the initial model, or from that of a checkpoint, to the last one.

        Args:
            arrays: the model.
            beside: vectors of the model's size that sites send beside theirs.

        Raises:
            RunError: fewer than ``min-sites`` sites answered, or no site can test the last model;
                what was reached so far was emitted.
        """
        total = self._config.epochs
        sizes = dict(self._layout.sizes)
        self._layout = self._layout._replace(sizes=sizes | dict.fromkeys(beside, sizes[X]))
        short: float | None = None  # since when too few sites answer
        while self._done < total - 1e-9:
            number = self._number + 1
            local = self._instruct(
                RoundStart(number, self._done, total, self._an_epoch), unpack(arrays[X])
            )
            epochs = local.epochs or local.steps / self._an_epoch
            trained: dict[int, TrainMetrics] = {}
            tested: dict[int, TestMetrics] = {}
            with_test = self._test_first and number > 1
            try:
                newest, metrics = self._aggregate(
                    number, arrays, local, trained, tested if with_test else None
                )
            except _TooFew as error:
                short = self._clock.now() if short is None else short
                if reason := self._wait_for_more(number, len(trained), short):
                    if with_test:
                        self._report_test(number - 1, tested, self._reached)
                    raise RunError(f"{error}: {reason}") from None
                log(WARNING, "%s: tried again when sites are back", error)
                continue
            short = None
            if with_test:
                self._tested = self._report_test(number - 1, tested, self._reached)
            if newest is None:
                raise RunError(
                    f"round {number}: "
                    f"{self._config.strategy} makes no model of {len(trained)} answers"
                )
            arrays, self._number, self._done = newest, number, self._done + epochs
            self._reached = self._report.snapshot()
            self._report.emit(NewModel(arrays))
            train = _numbers(metrics) | {"local-epochs": float(epochs)}
            self._report.write(number, "train", _named(trained), train)
            at_once = not self._test_first or self._done >= total - 1e-9
            if at_once:
                tested = self._test(number, arrays)
                self._reached = self._report.snapshot()
                self._tested = self._report_test(number, tested, self._reached)
            before = None if at_once else number - 1
            self._report.progress(
                number, epochs, self._done, self._reached, train, self._tested, before
            )
            if self._done >= total - 1e-9 and not self._tested:
                raise RunError(f"round {number}: no site could test the model: it is of no use")
            self._report.emit(Checkpoint(self._checkpoint))
        if epochs := self._config.results.personalise_epochs:
            local = LocalTraining(self._config.training.rate, (0.0, 1.0), epochs=epochs)
            tested = self._test(self._number, arrays, local)
            self._report_test(self._number, tested, self._report.snapshot(), "personal")
        return arrays

    def _wait_for_more(self, number: int, usable: int, since: float) -> str | None:
        """Wait for sites that are away; or say why not.

        There is no waiting where the others would fail again, or after too long a time.
        """
        connected = set(self._grid.get_node_ids())
        self._report.update_connected(connected)
        away = [node for node in self._sites if node not in connected or self._roster.away(node)]
        left = since + self._config.patience_s - self._clock.now()
        if usable + len(away) < self._roster.least or left <= 0:
            return f"stopped. {self._report.refused_in(number)}"
        wait_as_long_again(self._clock, since, left)
        return None

    def _aggregate(
        self,
        number: int,
        arrays: ArrayRecord,
        local: LocalTraining,
        trained: dict[int, TrainMetrics],
        tested: dict[int, TestMetrics] | None,
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the strategy makes of the replies.

        What sites reported is put into ``trained`` and, if not None, ``tested``.

        Raises:
            RunError: it fails, or makes a model that is not finite.
        """
        messages = self._messages(
            self._strategy.configure_train, number, arrays, local, tested is not None
        )

        def replies() -> Iterator[Message]:
            answers = self._answers(number, "training", messages, self._read_trained)
            for answer in self._bounded(number, answers, local):
                trained[answer.node] = answer.found.metrics
                if tested is not None:
                    self._extract_test(number - 1, answer, tested)
                if self._layout.codec:  # the strategy sees models
                    _replace(answer.reply, pack(answer.found.vectors))
                    answer.found.vectors.clear()
                yield answer.reply
                del answer  # a model: before the next one comes
            if len(trained) < self._roster.least:  # before anything is made of them
                few = (
                    f"{len(trained)} sites sent a model that can be used, "
                    f"min-sites = {self._roster.least}"
                )
                raise _TooFew(f"round {number}: {few}")

        try:
            newest, metrics = self._strategy.aggregate_train(number, replies())
        except _TooFew:
            raise
        except Exception as error:
            raise RunError(
                f"round {number}: {self._config.strategy} fails: {type(error).__name__}: {error}"
            ) from error
        for vector in map(unpack, (newest or {}).values()):
            if reason := too_large(magnitude(vector)):
                raise RunError(
                    f"round {number}: {self._config.strategy}: {reason}; a smaller rate may help"
                )
        return newest, metrics

    def _extract_test(
        self, number: int, answer: Answer[Trained], tested: dict[int, TestMetrics]
    ) -> None:
        """Read the test in a training's answer; the strategy does not see it.

        If it cannot be used, only the site's test is left out, not its training.
        """
        try:
            tested[answer.node] = read_tested(
                answer.reply,
                self._sites[answer.node].num_test,
                beside=True,
                means=self._report.measure.means,
            )
        except InvalidReply as invalid:
            self._report.refuse(answer.node, number, "test", str(invalid))
        answer.reply.content.pop(TEST, None)

    def _test(
        self, number: int, arrays: ArrayRecord, personal: LocalTraining | None = None
    ) -> dict[int, TestMetrics]:
        """Test everywhere the model, or what each site makes of it by itself.

        Where fewer than a round needs can, since sites are away, they are waited for, too.
        """
        tested, since = dict[int, TestMetrics](), self._clock.now()
        while True:
            messages = self._messages(
                self._strategy.configure_evaluate, number, arrays, None, personal=personal
            )
            missing = [each for each in messages if each.metadata.dst_node_id not in tested]
            for answer in self._answers(number, "test", missing, self._read_tested):
                tested[answer.node] = answer.found
            enough = len(tested) >= self._roster.least
            if enough or self._wait_for_more(number, len(tested), since):
                return tested
            log(WARNING, "round %d: %d sites tested: others will when back", number, len(tested))

    def _report_test(
        self, number: int, tested: dict[int, TestMetrics], reached: Snapshot, split: str = "test"
    ) -> dict[str, float]:
        """Report a test as of a moment; what all sites found together, {} where nobody could."""
        return self._report.test(
            number, {node: found.named() for node, found in tested.items()}, reached, split
        )

    def _messages(
        self,
        configure: Callable[[int, ArrayRecord, ConfigRecord, Grid], Iterable[Message]],
        number: int,
        arrays: ArrayRecord,
        local: LocalTraining | None,
        test: bool = False,
        personal: LocalTraining | None = None,
    ) -> list[Message]:
        """The messages of a phase; ``personal`` is what sites do before a test."""
        self._wait_for_enough(number)
        order = Order(number, self._federation.agreed(), local or personal, test)
        messages = configure(number, arrays, write_order(order), self._grid)
        # Flower's strategies shuffle their sites; in the order of the sites, a run in virtual time
        # repeats itself exactly.
        known = [message for message in messages if message.metadata.dst_node_id in self._sites]
        if local:
            chosen = self._sample(number, {message.metadata.dst_node_id for message in known})
            known = [message for message in known if message.metadata.dst_node_id in chosen]
            self._sent = {message.metadata.dst_node_id: _model(message) for message in known}
            if self._down:
                for message in {
                    id(message.content): message for message in known
                }.values():  # most share one content
                    _replace(message, write_model(arrays_of(message), self._down))
        return sorted(known, key=lambda message: self._sites[message.metadata.dst_node_id].number)

    def _sample(self, number: int, nodes: set[int]) -> set[int]:
        """Those of the nodes that take part in a round: of who is here the first in its order.

        Who is away is called as ever, and comes back so.
        """
        here = sorted(
            nodes.intersection(self._roster.here()),
            key=lambda node: derive(self._config.seed, "sample", number, self._sites[node].number),
        )
        return nodes.difference(here[self._config.sampled(len(here)) :])

    def _wait_for_enough(self, number: int) -> None:
        """Wait until as many sites are connected as a round needs: lost ones may come back."""
        patience, least, logged, log_at = self._config.patience_s, self._roster.least, -1, 0.0
        deadline = self._clock.now() + patience
        while (present := self._count_connected()) < least:
            if self._clock.now() >= deadline:
                raise RunError(
                    f"round {number}: {present} sites are connected "
                    f"after patience-s = {patience:g}, min-sites = {least}: stopped"
                )
            if present != logged or self._clock.now() >= log_at:
                logged, log_at = present, self._clock.now() + LOG_EVERY_S
                log(
                    WARNING,
                    "round %d: waiting for sites: %d are connected, min-sites = %d",
                    number,
                    present,
                    least,
                )
            self._clock.wait(LONGEST_WAIT_S, deadline - self._clock.now())

    def _count_connected(self) -> int:
        """How many sites are connected; those that are again are waited for again."""
        connected = set(self._grid.get_node_ids())
        self._report.update_connected(connected)
        for node in self._roster.update_connected(connected, self._clock.now()):
            self._roster.answer(node)
        return len(connected & self._sites.keys())

    def _answers(
        self,
        number: int,
        phase: str,
        messages: list[Message],
        read: Callable[[int, Message, Message], T],
    ) -> Iterator[Answer[T]]:
        """The replies that can be used, as they come.

        All sites that are here are waited for; those that are away only where too few replies can
        be used without them.
        """
        sent = [message for message in messages if self._must_call(number, message)]
        calls = {message.metadata.dst_node_id: message.metadata for message in sent}
        self._latest |= calls
        self._report.sent(sent)
        self._mailbox.send(sent)
        missing, usable = set(calls), 0
        while missing and (usable < self._roster.least or not all(map(self._roster.away, missing))):
            for message, reply in self._mailbox.receive():
                node = message.metadata.dst_node_id
                late = calls.get(node) is not message.metadata
                self._note_reply(number, message, reply, late)
                if late:
                    continue
                missing.discard(node)
                found = self._report.receive(
                    node, reply, number, phase, partial(read, node, message)
                )
                if not isinstance(found, InvalidReply):
                    usable += 1
                    yield Answer(node, message, reply, found)
                del reply, found

    def _must_call(self, number: int, message: Message) -> bool:
        """Whether a message is sent: to a site that is away, in fewer and fewer rounds.

        Each such message may stay under way until the site is back.
        """
        node = message.metadata.dst_node_id
        if not self._roster.away(node):
            return True
        due = node in self._roster.due(number)
        if due:
            self._roster.call(node, number + self._roster.pause(node))
        return due

    def _note_reply(self, number: int, message: Message, reply: Message, late: bool) -> None:
        """A reply arrived, in time or too late: the site is here. Or there is none: it is away."""
        node, name = message.metadata.dst_node_id, self._sites[message.metadata.dst_node_id].name
        if gone(reply):
            if self._latest[node] is message.metadata:  # else it may have answered to another since
                self._roster.lose(node, reason_of(reply), self._clock.now(), call_from=number)
        elif self._roster.answer(node):
            log(WARNING, "round %d: %s answers again%s", number, name, ", but too late" * late)
        if late:
            self._report.count(node, reply)

    def _read_trained(self, node: int, message: Message, reply: Message) -> Trained:
        tested = read_order(config_of(message)).test
        found = read_trained(
            reply, self._layout, self._sites[node].num_train, self._sent[node], tested
        )
        if (
            found.metrics.loss is None
            and isinstance(self._config.plan, ForeignPlan)
            and self._config.plan.by_loss
        ):
            raise InvalidReply(
                f"it keeps its loss to itself, by which {self._config.strategy} weighs"
            )
        return found

    def _read_tested(self, node: int, message: Message, reply: Message) -> TestMetrics:
        models = 1 if self._test_first else len(self._sites)
        return read_tested(
            reply, self._sites[node].num_test, models, means=self._report.measure.means
        )

    def _bounded(
        self, number: int, answers: Iterator[Answer[Trained]], local: LocalTraining
    ) -> Iterator[Answer[Trained]]:
        """The answers that do not move the model further than others do.

        The first ones are all waited for, as they are compared with each other.
        """
        first = self._bounds[X].few
        others: dict[int, dict[str, Change]] = {}
        if first and len(self._sent) >= FEW:
            answers = self._all(answers, local, others)
        for answer in answers:
            changes, sent = self._changes(answer, local), self._sent[answer.node]
            for name, change in changes.items():
                each = {node: found[name] for node, found in others.items()} if first else None
                size = extent(sent.get(name, sent[X]))[1] if first else 0.0
                if reason := self._bounds[name].violation(change, size, each):
                    self._report.refuse(
                        answer.node, number, "training", f"{name}: {reason}", "max-change"
                    )
                    break
            else:
                for name, change in changes.items():
                    self._bounds[name].accept(answer.node, change)
                yield answer
            del answer  # a model: before the next one comes

    def _all(
        self,
        answers: Iterator[Answer[Trained]],
        local: LocalTraining,
        changes: dict[int, dict[str, Change]],
    ) -> Iterator[Answer[Trained]]:
        """The answers, once all have arrived and each site's changes are in ``changes``."""
        # On disk: in memory they would be as many models as there are sites.
        waiting, replies = deque[tuple[int, Message, Callable[[], Message]]](), Waiting(0)
        for answer in answers:
            changes[answer.node] = self._changes(answer, local)
            waiting.append((answer.node, answer.message, replies.put(answer.reply)))
            del answer
        while waiting:
            node, message, take = waiting.popleft()
            reply = take()
            del take  # it knows the reply
            yield Answer(node, message, reply, self._read_trained(node, message, reply))
            del reply

    def _changes(self, answer: Answer[Trained], local: LocalTraining) -> dict[str, Change]:
        """How far a site moved each vector, and by which learning rates."""
        keys = self._config.training
        epoch = self._sites[answer.node].batches(keys.batch_size)
        steps = local.steps or local.epochs * epoch
        cycle = (keys.lr_shape, keys.lr_ratio, keys.lr_steps, local.cycle)
        rate = rates(local.lr, *cycle, steps=steps, epoch=epoch, warmup=keys.lr_warmup)
        some = range(0, steps, max(1, steps // 1000))  # a site may say that it has many examples
        total = sum(map(rate, some)) * steps / len(some)
        return {
            name: Change(norm, total if name == X else 1.0)
            for name, norm in answer.found.change.items()
        }


def _replace(message: Message, arrays: ArrayRecord) -> None:
    """Replace the arrays of a message."""
    message.content.pop(ARRAYS)  # else Flower says that they are replaced
    message.content[ARRAYS] = arrays


def _model(message: Message) -> dict[str, Tensor]:
    """The model in a message; of what goes beside it sites send back something else."""
    return {name: unpack(array) for name, array in arrays_of(message).items() if name in (X, STATS)}


def _named(metrics: dict[int, TrainMetrics]) -> dict[int, dict[str, float]]:
    return {
        node: {key: float(value) for key, value in each.named().items()}
        for node, each in metrics.items()
    }


def _numbers(record: MetricRecord | None) -> dict[str, float]:
    """The metrics of a record that are single numbers."""
    return {
        key: float(value) for key, value in (record or {}).items() if isinstance(value, int | float)
    }
