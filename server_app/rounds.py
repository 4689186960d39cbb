"""Synchronous rounds: train everywhere, aggregate, test everywhere, until the epochs are used up."""

import math
from collections.abc import Callable, Iterable, Iterator
from logging import WARNING

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from server_app.census import Federation, RunError, Site
from server_app.exchange import LONGEST_WAIT_S, clock_of, exchange, why
from server_app.results import EVERYBODY, History, Progress
from strategies.averaging.average import NUM_EXAMPLES
from strategies.averaging.mean import refusal
from strategies.config import Config
from strategies.records import arrays_of, config_of, metrics_of, num_bytes, unpack

Traffic = dict[int, list[int]]  # of each node: bytes up, bytes down


class Rounds:
    """Drives a strategy over the sites of a federation.

    Where Flower's ``Strategy.start`` waits for all replies and stops at the first that does not fit, this hands each reply to the
    strategy when it arrives, leaves out a site whose reply cannot be used, and writes down what every site reported.

    Args:
        grid: the way to the sites.
        strategy: what happens to the models.
        federation: the sites.
        config: the run.
        history: is told everything.
    """

    def __init__(
        self,
        grid: Grid,
        strategy: Strategy,
        federation: Federation,
        config: Config,
        history: History,
    ) -> None:
        self._grid, self._strategy, self._config = grid, strategy, config
        self._federation, self._history = federation, history
        self._clock = clock_of(grid)
        self._sites = {site.node: site for site in federation.sites}
        self._traffic: Traffic = {node: [0, 0] for node in self._sites}
        self._start = self._clock.now()
        self._least = min(config.min_sites, len(self._sites))

    def run(self, arrays: ArrayRecord) -> ArrayRecord:
        """From the initial model to the last one.

        Raises:
            RunError: fewer than ``min-sites`` sites answered; what was reached so far is in the history.
        """
        total, done, round_number = self._config.epochs, 0, 0
        sizes = {name: array.shape[-1] for name, array in arrays.items()}
        self._start = self._clock.now()
        while done < total:
            round_number += 1
            messages = self._configure(self._strategy.configure_train, round_number, arrays, done)
            epochs = int(config_of(messages[0])["local-epochs"])  # type: ignore[arg-type]
            arrived: dict[int, MetricRecord] = {}
            replies = self._usable(messages, round_number, "train", sizes, arrived)
            newest, metrics = self._strategy.aggregate_train(round_number, replies)
            if len(arrived) < self._least or newest is None:
                raise RunError(
                    f"round {round_number}: {len(arrived)} sites sent a model that can be used, min-sites = {self._least}: stopped"
                )
            arrays, done = newest, done + epochs
            self._history.keep(arrays)
            self._record(round_number, "train", arrived, metrics, {"local-epochs": epochs})
            tested: dict[int, MetricRecord] = {}
            messages = self._configure(self._strategy.configure_evaluate, round_number, arrays, done)
            outcome = self._strategy.aggregate_evaluate(round_number, self._usable(messages, round_number, "test", None, tested))
            self._record(round_number, "test", tested, outcome, {})
            self._tell(round_number, epochs, done, metrics, outcome)
        return arrays

    def _configure(
        self,
        configure: Callable[[int, ArrayRecord, ConfigRecord, Grid], Iterable[Message]],
        round_number: int,
        arrays: ArrayRecord,
        done: int,
    ) -> list[Message]:
        """The messages of a phase. What they tell sites by default: an ordinary decay of the learning rate over the run."""
        total = self._config.epochs
        epochs = min(self._config.local_epochs, total - done)
        told = ConfigRecord(
            {
                "server-round": round_number,
                **self._federation.agreed(),
                "local-epochs": epochs,
                "epochs-left": total - done,
                "lr": self._config.lr,
                "cycle-from": done / total,
                "cycle-to": (done + epochs) / total,
            }
        )
        self._wait_for_enough(round_number)
        messages = [
            message for message in configure(round_number, arrays, told, self._grid) if message.metadata.dst_node_id in self._sites
        ]
        for message in messages:
            self._traffic[message.metadata.dst_node_id][1] += num_bytes(message)
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
        split: str,
        sizes: dict[str, int] | None,
        arrived: dict[int, MetricRecord],
    ) -> Iterator[Message]:
        """The replies that can be used, as they come; their metrics are put into ``arrived``, by node."""
        for node, reply in exchange(self._grid, messages, self._config.timeout_s):
            self._traffic[node][0] += num_bytes(reply)
            if reason := unusable(reply, sizes):
                self._warn(round_number, split, self._sites[node], reason)
                continue
            arrived[node] = metrics_of(reply)
            yield reply

    @staticmethod
    def _warn(round_number: int, split: str, site: Site, reason: str) -> None:
        phase = "training" if split == "train" else "test"
        log(WARNING, "round %d: %s (site %d) is left out of the %s: %s", round_number, site.name, site.number, phase, reason)

    def _record(
        self,
        round_number: int,
        split: str,
        arrived: dict[int, MetricRecord],
        together: MetricRecord | None,
        more: dict[str, float],
    ) -> None:
        seconds = self._clock.now() - self._start
        for node, site in self._sites.items():
            if node in arrived:
                up, down = self._traffic[node]
                self._history.record(round_number, seconds, site.number, split, _numbers(arrived[node]), up, down)
        if together is not None:
            up, down = (sum(column) for column in zip(*self._traffic.values(), strict=True))
            self._history.record(round_number, seconds, EVERYBODY, split, _numbers(together) | more, up, down)

    def _tell(self, round_number: int, epochs: int, done: int, trained: MetricRecord | None, tested: MetricRecord | None) -> None:
        megabytes = sum(map(sum, self._traffic.values())) / 1e6
        train, test = _numbers(trained or MetricRecord()), _numbers(tested or MetricRecord())
        seconds = self._clock.now() - self._start
        self._history.tell(Progress(round_number, epochs, done, self._config.epochs, seconds, megabytes, train, test))


def _numbers(record: MetricRecord) -> dict[str, float]:
    return {key: float(value) for key, value in record.items() if isinstance(value, int | float)}


def unusable(reply: Message, sizes: dict[str, int] | None) -> str | None:
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
