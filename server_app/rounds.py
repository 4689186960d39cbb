"""Synchronous rounds: train everywhere, aggregate, test everywhere, until the epochs are used up."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from logging import WARNING

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from configuration.config import Config
from server_app.census import Federation, RunError, an_epoch
from server_app.exchange import LONGEST_WAIT_S, clock_of, exchange
from server_app.report import Report, numbers
from server_app.results import History, Progress
from strategies.method import Local, Moment
from strategies.records import X, metrics_of, order, unpack


class Rounds:
    """Drives a strategy over the sites of a federation.

    Where Flower's ``Strategy.start`` waits for all replies and stops at the first that does not fit, this hands each reply to the
    strategy when it arrives, leaves out a site whose reply cannot be used, and writes down what every site reported.

    Args:
        grid: the way to the sites.
        strategy: what happens to the models.
        instruct: what sites do in a round that begins with a model [d], or with models [n, d] where they learn alone.
        federation: the sites.
        config: the run.
        history: is told everything.
    """

    def __init__(
        self,
        grid: Grid,
        strategy: Strategy,
        instruct: Callable[[Moment, Tensor], Local],
        federation: Federation,
        config: Config,
        history: History,
    ) -> None:
        self._grid, self._strategy, self._config = grid, strategy, config
        self._instruct = instruct
        self._an_epoch = an_epoch(federation, config.training.batch_size)
        self._federation, self._history = federation, history
        self._clock = clock_of(grid)
        self._sites = {site.node: site for site in federation.sites}
        self._report = Report(federation, history, self._clock, "round")
        self._least = min(config.min_sites, len(self._sites))

    def run(self, arrays: ArrayRecord, beside: Iterable[str] = ()) -> ArrayRecord:
        """From the initial model to the last one.

        Args:
            arrays: the initial model.
            beside: vectors of the model's size that sites send beside theirs.

        Raises:
            RunError: fewer than ``min-sites`` sites answered; what was reached so far is in the history.
        """
        total, done, round_number = self._config.epochs, 0.0, 0
        sizes = {name: array.shape[-1] for name, array in arrays.items()}
        sizes |= dict.fromkeys(beside, sizes[X])
        while done < total - 1e-9:
            round_number += 1
            local = self._instruct(Moment(round_number, done, total, self._an_epoch), unpack(arrays[X]))
            epochs = local.epochs or local.steps / self._an_epoch
            messages = self._configure(self._strategy.configure_train, round_number, arrays, order(local))
            arrived: dict[int, MetricRecord] = {}
            replies = self._usable(messages, round_number, sizes, arrived)
            newest, metrics = self._strategy.aggregate_train(round_number, replies)
            if len(arrived) < self._least or newest is None:
                raise RunError(
                    f"round {round_number}: {len(arrived)} sites sent a model that can be used, min-sites = {self._least}: stopped"
                )
            arrays, done = newest, done + epochs
            self._history.keep(arrays)
            train = numbers(metrics or MetricRecord()) | {"local-epochs": float(epochs)}
            self._report.write(round_number, "train", {node: numbers(each) for node, each in arrived.items()}, train)
            tested: dict[int, MetricRecord] = {}
            messages = self._configure(self._strategy.configure_evaluate, round_number, arrays, {})
            outcome = self._strategy.aggregate_evaluate(round_number, self._usable(messages, round_number, None, tested))
            test = None if outcome is None else numbers(outcome)
            self._report.write(round_number, "test", {node: numbers(each) for node, each in tested.items()}, test)
            now = self._report.moment()
            self._history.tell(
                Progress("round", round_number, epochs, done, total, now.seconds, now.megabytes(), train, test or {})
            )
        return arrays

    def _configure(
        self,
        configure: Callable[[int, ArrayRecord, ConfigRecord, Grid], Iterable[Message]],
        round_number: int,
        arrays: ArrayRecord,
        instructions: Mapping[str, bool | int | float | str],
    ) -> list[Message]:
        """The messages of a phase."""
        told = ConfigRecord({"server-round": round_number, **self._federation.agreed(), **instructions})
        self._wait_for_enough(round_number)
        messages = [
            message for message in configure(round_number, arrays, told, self._grid) if message.metadata.dst_node_id in self._sites
        ]
        for message in messages:
            self._report.sent(message)
        # Flower's strategies shuffle their sites; in the order of the sites, a run in virtual time repeats itself exactly.
        return sorted(messages, key=lambda message: self._sites[message.metadata.dst_node_id].number)

    def _wait_for_enough(self, round_number: int) -> None:
        """A round that cannot succeed is not begun: sites that went may come back."""
        deadline, said = self._clock.now() + self._config.timeout_s, -1
        while (there := len(set(self._grid.get_node_ids()) & self._sites.keys())) < self._least:
            if self._clock.now() >= deadline:
                raise RunError(
                    f"round {round_number}: {there} sites are connected after timeout-s = {self._config.timeout_s:g}, "
                    f"min-sites = {self._least}: stopped"
                )
            if there != said:
                said = there
                log(WARNING, "round %d: waiting for sites: %d are connected, min-sites = %d", round_number, there, self._least)
            self._clock.wait(LONGEST_WAIT_S, deadline - self._clock.now())

    def _usable(
        self,
        messages: list[Message],
        round_number: int,
        sizes: dict[str, int] | None,
        arrived: dict[int, MetricRecord],
    ) -> Iterator[Message]:
        """The replies that can be used, as they come; their metrics are put into ``arrived``, by node."""
        for node, reply in exchange(self._grid, messages, self._config.timeout_s):
            if self._report.received(node, reply, sizes, round_number):
                arrived[node] = metrics_of(reply)
                yield reply
