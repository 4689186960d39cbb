"""Co-learning: the learning rate cycles inside every round, and rounds grow longer when the average stops moving.

    CLR   eta = g^i eta_max r^u            u in [0, 1): fraction of the round done; the rate is back at its top with the new average
    ILE   delta_i = |x_{i+1} - x_i| / |x_i|
          T_{i+1} = min(2 T_i, T_max) if delta_i <= epsilon else T_i

Source: Xu et al., "Collaborative Deep Learning Across Multiple Data Centers", arXiv 1810.06877 (2018); Mi et al., Science China
Information Sciences 63, 182102 (2020). **Reconstructed from the abstracts**, which say that averaging works with "the cyclical
learning rate and the increased number of epochs for local model training". The formulas of both, their constants, the norm, the
doubling, the cap ``T_max`` and the envelope ``g`` are ours; no number of the paper is reproduced or claimed.
Special cases: r = 1, epsilon = 0, g = 1 is FedAvg at a constant rate; epsilon = 0 is CLR alone; r = 1 is ILE alone.
"""

from collections.abc import Iterable, Mapping

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from strategies.averaging.average import CHANGE, Averaging


def next_local_epochs(local_epochs: int, change: float, epsilon: float, largest: int) -> int:
    """Local epochs of the next round, given how far the average moved in this one. Never fewer; 0 for ``epsilon`` never grows."""
    return max(local_epochs, min(2 * local_epochs, largest)) if epsilon > 0 and change <= epsilon else local_epochs


class CoLearning(Averaging):
    """Averaging with a cyclical learning rate (CLR) and an increasing number of local epochs (ILE).

    Args:
        shares: each node's share in the mean; together 1.
        lr: the rate at the start of the first cycle.
        envelope: factor on ``lr`` from one cycle to the next.
        local_epochs: of the first round.
        max_local_epochs: cap on the growth.
        epsilon: relative change of the average at or below which local epochs double.
    """

    def __init__(
        self,
        shares: Mapping[int, float],
        *,
        lr: float,
        envelope: float,
        local_epochs: int,
        max_local_epochs: int,
        epsilon: float,
    ) -> None:
        super().__init__(shares)
        self.local_epochs = local_epochs
        self._lr, self._envelope = lr, envelope
        self._max_local_epochs, self._epsilon = max_local_epochs, epsilon

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """A whole cycle of the rate in each round; ``epochs-left``, where given, bounds the local epochs."""
        left = config.get("epochs-left", self.local_epochs)
        assert isinstance(left, int)
        cycle = ConfigRecord(dict(config))
        cycle["local-epochs"] = min(self.local_epochs, left)
        cycle["lr"] = self._lr * self._envelope ** (server_round - 1)
        cycle["cycle-from"], cycle["cycle-to"] = 0.0, 1.0
        return super().configure_train(server_round, arrays, cycle, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The mean; where it hardly moved, local epochs double from the next round on."""
        arrays, metrics = super().aggregate_train(server_round, replies)
        if metrics is not None:
            change = metrics[CHANGE]
            assert isinstance(change, float)
            self.local_epochs = next_local_epochs(self.local_epochs, change, self._epsilon, self._max_local_epochs)
        return arrays, metrics
