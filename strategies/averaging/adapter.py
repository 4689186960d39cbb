"""Any :class:`~strategies.method.RoundPlan` as a ``flwr.serverapp.Strategy``.

For our own driver, Flower's wrappers and other apps.

    x_mean = sum_k s_k x_k / sum_k s_k      over the sites that answered
    state  = absorb(state, x_mean)

BatchNorm statistics are averaged likewise.

The mean streams: a reply is added when it arrives, then forgotten. Memory is that of the model that
was sent, of the sum (two models) and of a reply, however many sites there are. A robust mean
(:mod:`strategies.robust`) takes its place where one is asked for: replies wait for each other on
disk (:mod:`strategies.averaging.collected`), and shares count for nothing.
"""

import math
from collections.abc import Iterable, Mapping
from tempfile import TemporaryFile
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from strategies.averaging.average import CHANGE, NUM_EXAMPLES, weighted_metrics
from strategies.averaging.collected import Collected
from strategies.averaging.mean import StreamingMean, relative_change
from strategies.method import LocalTraining, Mean, RoundPlan, RoundStart
from strategies.protocol import write_local
from strategies.records import METRICS, STATS, X, arrays_of, metrics_of, pack, unpack
from strategies.robust import PLAIN, Robust


class Planned(FedAvg):
    """A plan of rounds as Flower's kind of strategy.

    Used in another app, it tells sites what to do by itself; our own driver does that (it knows how
    long the run is).

    Args:
        plan: what is done.
        shares: each node's share in the mean, together 1; by default all count the same.
        robust: another mean.
        total: epochs a site in the whole run.
        an_epoch: batches an epoch, the mean over the sites.

    Attributes:
        state: the plan's, after the last round; None before the first.
    """

    def __init__(
        self,
        plan: RoundPlan[Any],
        shares: Mapping[int, float] | None = None,
        *,
        robust: Robust = PLAIN,
        total: int = 1,
        an_epoch: float = 1.0,
    ) -> None:
        super().__init__(
            min_train_nodes=1,
            min_evaluate_nodes=1,
            min_available_nodes=1,
            train_metrics_aggr_fn=weighted_metrics,
            evaluate_metrics_aggr_fn=weighted_metrics,
        )
        self.state: Any = None
        self._plan, self._shares, self._robust = plan, shares, robust
        self._total, self._an_epoch, self._done = total, an_epoch, 0.0
        self._sent: Mapping[str, Tensor] = {}
        self._equal = 1.0

    def instruct(self, start: RoundStart, x: Tensor) -> LocalTraining:
        """What sites do in a round that begins with the model ``x`` [d]."""
        if self.state is None:
            self.state = self._plan.init(x)
        elif not self.state.x.numel():  # of a checkpoint
            self.state = self.state._replace(x=x)
        return self._plan.instruct(self.state, start)

    def state_dict(self) -> dict[str, Any]:
        """The plan's state without the model, which whoever saves it has."""
        return {} if self.state is None else {"state": self.state._replace(x=self.state.x[:0])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state, for the model of the next round."""
        self.state = state.get("state")

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The same model, what the plan sends beside it and the same order for every site."""
        vectors = {name: unpack(array) for name, array in arrays.items()}
        if "lr" not in config:  # nobody has told what to do
            start = RoundStart(server_round, self._done, self._total, self._an_epoch)
            local = self.instruct(start, vectors[X])
            self._done += local.epochs or local.steps / self._an_epoch
            config = ConfigRecord({**config, **write_local(local)})
        if self.state is None:
            self.state = self._plan.init(vectors[X])
        self._sent = vectors
        if beside := self._plan.beside(self.state):
            arrays = ArrayRecord({**arrays, **pack(beside)})
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._equal = 1 / max(1, len(messages))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The plan's next model, and the mean of the sites' metrics with ``model-change``."""
        metrics: list[RecordDict] = []
        mean, answered = (self._robustly if self._robust.on else self._streaming)(replies, metrics)
        if not metrics:
            return None, None
        stats = mean.pop(STATS, torch.empty(0))
        before = self.state.x
        version = before._version  # torch's count of writes
        self.state = self._plan.absorb(self.state, Mean(mean, answered))
        x, sent = self.state.x, self._sent[X]
        if before._version != version:
            raise TypeError(
                "absorb writes into the x that it is given, which is the model that was sent"
            )
        if (x.dtype, x.shape) != (sent.dtype, sent.shape):
            raise TypeError(
                f"absorb made x {x.dtype} {list(x.shape)} of {sent.dtype} {list(sent.shape)}"
            )
        summary = weighted_metrics(metrics, NUM_EXAMPLES)
        summary[CHANGE] = relative_change(self.state.x, self._sent[X])
        made = pack({X: self.state.x, STATS: stats})
        self.state, self._sent = self.state._replace(x=unpack(made[X])), {}  # one model, not two
        return made, summary

    def _share(self, reply: Message) -> float:
        return self._shares[reply.metadata.src_node_id] if self._shares else self._equal

    def _streaming(
        self, replies: Iterable[Message], metrics: list[RecordDict]
    ) -> tuple[dict[str, Tensor], float]:
        """The mean of each vector, and the share of the sites that answered.

        What they report is added to ``metrics``.
        """
        means: dict[str, StreamingMean] = {}
        for reply in replies:
            _add(means, reply, self._share(reply))
            metrics.append(RecordDict({METRICS: metrics_of(reply)}))
            del reply  # before the next one comes
        answered = means[X].share if means else 0.0
        return {name: means.pop(name).result() for name in list(means)}, answered

    def _robustly(
        self, replies: Iterable[Message], metrics: list[RecordDict]
    ) -> tuple[dict[str, Tensor], float]:
        """Aggregate with the robust mean."""
        shares: list[float] = []
        with TemporaryFile(buffering=0) as file:
            found = Collected(self._robust, file)
            for reply in replies:
                vectors = {name: unpack(array) for name, array in arrays_of(reply).items()}
                found.add({X: vectors.pop(X), **vectors}, reply.metadata.src_node_id)
                shares.append(self._share(reply))
                metrics.append(RecordDict({METRICS: metrics_of(reply)}))
                del reply, vectors  # before the next one comes
            return (found.result(), math.fsum(shares)) if shares else ({}, 0.0)


def _add(means: dict[str, StreamingMean], reply: Message, share: float) -> None:
    for name, array in arrays_of(reply).items():
        vector = unpack(array)
        means.setdefault(name, StreamingMean(vector.shape)).add(vector, share)
