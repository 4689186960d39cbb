"""Sites that train alone: each gets its own model back.

The yardstick for every way of learning together.

    x_k' = what site k made of x_k

The record holds the models of all sites, a row each: ``x`` [K, d] and ``stats`` [K, b]. ``local``
evaluates every model on its own site; ``ensemble`` sends all models to all sites, which average
their predictions (probabilities), not their weights.
"""

from collections.abc import Iterable, Mapping

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from strategies.averaging.average import NUM_EXAMPLES, weighted_metrics
from strategies.records import ARRAYS, CONFIG, METRICS, arrays_of, metrics_of, pack, unpack


class Alone(Strategy):
    """Trains every site on its own.

    Args:
        rows: each node's row in the record.
        ensemble: evaluate the mean prediction of all models instead of each site's own.
    """

    def __init__(self, rows: Mapping[int, int], *, ensemble: bool) -> None:
        self._rows = rows
        self._ensemble = ensemble
        self._models: dict[str, Tensor] = {}

    def summary(self) -> None:
        """Flower's summary of the strategy, which is empty."""

    def _messages(
        self, arrays: ArrayRecord, config: ConfigRecord, grid: Grid, kind: str
    ) -> list[Message]:
        connected = set(grid.get_node_ids())  # asked once: each time is a request to the SuperLink
        shared = pack(self._models) if self._ensemble and kind == MessageType.EVALUATE else None
        return [
            Message(
                RecordDict(
                    {
                        ARRAYS: shared
                        or pack({name: models[row] for name, models in self._models.items()}),
                        CONFIG: config,
                    }
                ),
                node,
                kind,
            )
            for node, row in self._rows.items()
            if node in connected
        ]

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Each site's own model; a single model, as at the start of a run, is everybody's."""
        vectors = {name: unpack(array) for name, array in arrays.items()}
        self._models = {
            name: (vector if vector.dim() == 2 else vector.expand(len(self._rows), -1)).clone()
            for name, vector in vectors.items()
        }
        return self._messages(arrays, config, grid, MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The rows of the sites that answered; the others keep what they had."""
        contents = []
        for reply in replies:
            for name, array in arrays_of(reply).items():
                self._models[name][self._rows[reply.metadata.src_node_id]] = unpack(array)
            contents.append(RecordDict({METRICS: metrics_of(reply)}))
        if not contents:
            return None, None
        return pack(self._models), weighted_metrics(contents, NUM_EXAMPLES)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send each site its own model, or all models to each site, to test."""
        return self._messages(arrays, config, grid, MessageType.EVALUATE)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Means over sites, weighted by their test examples."""
        contents = [reply.content for reply in replies]
        return weighted_metrics(contents, NUM_EXAMPLES) if contents else None
