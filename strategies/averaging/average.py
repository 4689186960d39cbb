"""Model averaging (FedAvg): the server's next model is the mean of the models that sites return.

    x' = sum_k s_k x_k / sum_k s_k      s_k = 1/K (equal) or n_k/n (samples), over the sites that answered

BatchNorm statistics are averaged likewise. Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from
Decentralized Data", AISTATS 2017, algorithm 1. Differs: every site takes part in every round; equal shares are offered.
Special cases: one site keeps what it returns; the mean of K identical models is that model (to 2^-40 K).
"""

import math
from collections.abc import Iterable, Mapping

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from strategies.averaging.mean import StreamingMean, weighted_mean
from strategies.records import METRICS, X, arrays_of, metrics_of, pack, unpack

NUM_EXAMPLES, CHANGE = "num-examples", "model-change"


def weighted_metrics(contents: list[RecordDict], weight_key: str) -> MetricRecord:
    """Means of the sites' metrics, weighted by ``weight_key`` and independent of the order of the sites."""
    records = [next(iter(content.metric_records.values())) for content in contents]
    rows = [{key: float(value) for key, value in record.items() if isinstance(value, int | float)} for record in records]
    return MetricRecord(dict(weighted_mean(rows, weight_key)))


def relative_change(new: Tensor, old: Tensor) -> float:
    """``|x' - x| / |x|``, Euclidean norms over all trainable parameters [d]; in blocks, so that no third vector is needed."""
    moved = size = 0.0
    for a, b in zip(new.split(1 << 18), old.split(1 << 18), strict=True):
        moved += torch.dist(a, b).item() ** 2
        size += torch.linalg.vector_norm(b).item() ** 2
    return math.sqrt(moved) / (math.sqrt(size) + 1e-12)


class Averaging(FedAvg):
    """Flower's ``FedAvg`` with an average that streams: a reply is added when it arrives, then forgotten.

    Args:
        shares: each node's share in the mean; together 1.
    """

    def __init__(self, shares: Mapping[int, float]) -> None:
        super().__init__(
            min_train_nodes=1,
            min_evaluate_nodes=1,
            min_available_nodes=1,
            train_metrics_aggr_fn=weighted_metrics,
            evaluate_metrics_aggr_fn=weighted_metrics,
        )
        self._shares = shares
        self._sent = ArrayRecord()

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """The same model and configuration for every site."""
        self._sent = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The mean of the sites' models, and of their metrics with ``model-change`` beside them."""
        means: dict[str, StreamingMean] = {}
        metrics: list[RecordDict] = []
        for reply in replies:
            share = self._shares[reply.metadata.src_node_id]
            for name, array in arrays_of(reply).items():
                vector = unpack(array)
                means.setdefault(name, StreamingMean(vector.shape)).add(vector, share)
            metrics.append(RecordDict({METRICS: metrics_of(reply)}))
        if not metrics:
            return None, None
        mean = {name: means.pop(name).result() for name in list(means)}
        summary = weighted_metrics(metrics, NUM_EXAMPLES)
        summary[CHANGE] = relative_change(mean[X], unpack(self._sent[X]))
        return pack(mean), summary
