"""Any strategy that Flower ships, run on our records.

Three things differ from ours. Flower's strategies treat every array alike, and an adaptive or
robust rule makes no sense of BatchNorm statistics: these are taken out, plainly averaged, and put
back. And they add floating-point numbers in the order of arrival: replies are handed over in the
order of the sites, so that the same seed gives the same model. And they stop where sites report
different metrics: a metric that one site keeps to itself is left out of the others' replies, too.

They are handed all replies at once: median, Krum and their like need them, and Flower's means are
written so. The server's memory therefore grows by a model a site, where ours stays the same.

They weigh models by the examples that sites say they have: where one of the sites that answered has
more than its share may be, these numbers are changed so that it is that. Where a robust mean is
asked for, a strategy that averages is handed this mean, as if one site had sent it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from strategies.averaging.average import CHANGE, NUM_EXAMPLES, weighted_metrics
from strategies.averaging.mean import StreamingMean, relative_change
from strategies.records import ARRAYS, METRICS, STATS, X, arrays_of, metrics_of, pack, unpack
from strategies.robust import PLAIN, Robust, capped, mean_of


class Shipped(Strategy):
    """A strategy of Flower, with BatchNorm statistics carried beside it.

    Args:
        strategy: the one to run.
        shares: each node's share in the mean of the statistics, in the order of the sites.
        most: of a site in the mean of the models.
        robust: another mean of the models.
    """

    def __init__(
        self,
        strategy: Strategy,
        shares: Mapping[int, float],
        most: float = 1.0,
        robust: Robust = PLAIN,
    ) -> None:
        self._strategy = strategy
        self._shares, self._most, self._robust = shares, most, robust
        self._order = {node: place for place, node in enumerate(shares)}
        self._sent = ArrayRecord()
        self._stats: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """The attributes of Flower's object that are numbers or hold arrays."""
        found = {name: _plain(value) for name, value in vars(self._strategy).items()}
        return {name: value for name, value in found.items() if value is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state."""
        for name, value in state.items():
            setattr(self._strategy, name, _theirs(value))

    def summary(self) -> None:
        """The summary of Flower's strategy."""
        self._strategy.summary()

    def _with_stats(self, messages: Iterable[Message], arrays: ArrayRecord) -> list[Message]:
        messages = list(messages)
        for message in messages:
            message.content[ARRAYS] = arrays
        return messages

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The strategy's messages, with the statistics."""
        self._sent = arrays
        plain = ArrayRecord({X: arrays[X]})
        return self._with_stats(
            self._strategy.configure_train(server_round, plain, config, grid), arrays
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the strategy makes of the models, and the mean of the statistics."""
        stats = dict.fromkeys(self._sent, None).keys() & {STATS}
        mean = StreamingMean(unpack(self._sent[STATS]).shape) if stats else None

        def without_stats() -> Iterator[Message]:
            for reply in replies:
                if mean is not None:
                    mean.add(
                        unpack(arrays_of(reply).pop(STATS)),
                        self._shares[reply.metadata.src_node_id],
                    )
                yield reply

        ordered = sorted(without_stats(), key=lambda reply: self._order[reply.metadata.src_node_id])
        records = [metrics_of(reply) for reply in ordered]
        for record in records:
            for name in [name for name in record if not all(name in other for other in records)]:
                del record[name]
        _cap(records, self._most)
        if self._robust.on and ordered:
            ordered = [self._as_one(ordered, records)]
        arrays, metrics = self._strategy.aggregate_train(server_round, ordered)
        if arrays is None:
            return None, metrics
        x = unpack(arrays[X]).float()
        if metrics is not None:
            metrics[CHANGE] = relative_change(x, unpack(self._sent[X]))
        return pack({X: x} | ({STATS: mean.result()} if mean else {})), metrics

    def _as_one(self, replies: Sequence[Message], records: Sequence[MetricRecord]) -> Message:
        """The first reply, with the robust mean of all models and the mean of what sites report."""
        models = [unpack(arrays_of(reply)[X]) for reply in replies]
        together = weighted_metrics(
            [RecordDict({METRICS: record}) for record in records], NUM_EXAMPLES
        )
        first = replies[0]
        for name, record in (
            (ARRAYS, pack({X: mean_of(models, self._robust)})),
            (METRICS, together),
        ):
            first.content.pop(name)  # else Flower says that they are replaced
            first.content[name] = record
        return first

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The strategy's messages, with the statistics."""
        plain = ArrayRecord({X: arrays[X]})
        return self._with_stats(
            self._strategy.configure_evaluate(server_round, plain, config, grid), arrays
        )

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """The strategy's mean of the sites' metrics."""
        return self._strategy.aggregate_evaluate(server_round, replies)


def _plain(value: object) -> Any:
    """Numbers, and arrays as tensors; None for anything else."""
    match value:
        case bool() | int() | float():
            return value
        case np.ndarray():
            return torch.from_numpy(value)
        case ArrayRecord():
            return {"record": {name: unpack(array) for name, array in value.items()}}
        case dict() if value and all(isinstance(each, np.ndarray) for each in value.values()):
            return {"arrays": {name: torch.from_numpy(each) for name, each in value.items()}}
        case list() if value and all(isinstance(each, np.ndarray) for each in value):
            return [torch.from_numpy(each) for each in value]
        case _:
            return None


def _theirs(value: Any) -> Any:
    match value:
        case Tensor():
            return value.numpy()
        case {"record": found}:
            return pack(found)
        case {"arrays": found}:
            return {name: each.numpy() for name, each in found.items()}
        case list():
            return [each.numpy() for each in value]
        case _:
            return value


def _cap(records: Sequence[MetricRecord], most: float) -> None:
    """Change the examples that sites say they have so that none has more than its share."""
    counts: list[Any] = [record[NUM_EXAMPLES] for record in records]
    total = sum(counts)
    shares = {k: count / total for k, count in enumerate(counts)}
    if (allowed := capped(shares, most)) != shares:
        for k, record in enumerate(records):
            record[NUM_EXAMPLES] = allowed[k] * total
