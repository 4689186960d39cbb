"""Co-learning: the rate cycles in every round, and rounds grow when the average stops moving.

    CLR   eta = g^i eta_max r^u            u in [0, 1): fraction of the round done
    ILE   delta_i = |x_{i+1} - x_i| / |x_i|
          T_{i+1} = min(2 T_i, T_max) if delta_i <= epsilon else T_i

The rate is back at its top with the new average.

Source: Xu et al., "Collaborative Deep Learning Across Multiple Data Centers", arXiv 1810.06877
(2018); Mi et al., Science China Information Sciences 63, 182102 (2020). **Reconstructed from the
abstracts**, which say that averaging works with "the cyclical learning rate and the increased
number of epochs for local model training". The formulas of both, their constants, the norm, the
doubling, the cap ``T_max`` and the envelope ``g`` are ours; no number of the paper is reproduced or
claimed.
Special cases: r = 1, epsilon = 0, g = 1 is FedAvg at a constant rate; epsilon = 0 is CLR alone;
r = 1 is ILE alone.
"""

from typing import NamedTuple, Self

from pydantic import model_validator
from torch import Tensor

from strategies.averaging.mean import relative_change
from strategies.keys import Above0, NotNegative, Positive, RoundKeys
from strategies.method import LocalTraining, Mean, Method, RoundPlan, RoundStart, Run


class Keys(RoundKeys):
    """The keys of Co-learning."""

    local_epochs: Positive = 2
    """local epochs of the first round"""
    max_local_epochs: Positive = 16
    """cap on the local epochs of a round"""
    epsilon: NotNegative = 0.08
    """local epochs double when the averaged model's relative change falls to this; 0: never"""
    lr_envelope: Above0 = 1.0
    """factor on training.lr from one round to the next"""

    @model_validator(mode="after")
    def _cap(self) -> Self:
        if self.max_local_epochs < self.local_epochs:
            raise ValueError(
                f"max-local-epochs = {self.max_local_epochs}: at least local-epochs, "
                f"which is {self.local_epochs}"
            )
        return self


class Cycle(NamedTuple):
    """The model, and the local epochs of the next round."""

    x: Tensor
    local_epochs: int


def next_local_epochs(local_epochs: int, change: float, epsilon: float, largest: int) -> int:
    """Local epochs of the next round, given how far the average moved in this one.

    They never become fewer; with ``epsilon`` = 0 they never become more.
    """
    return (
        max(local_epochs, min(2 * local_epochs, largest))
        if epsilon > 0 and change <= epsilon
        else local_epochs
    )


def plan(keys: Keys, run: Run) -> RoundPlan[Cycle]:
    """A whole cycle of the learning rate in each round.

    Where the mean hardly moved, local epochs double from the next round on.
    """

    def instruct(state: Cycle, start: RoundStart) -> LocalTraining:
        epochs = min(state.local_epochs, round(start.total - start.done))
        return LocalTraining(
            run.lr * keys.lr_envelope ** (start.round_number - 1), (0.0, 1.0), epochs=epochs
        )

    def absorb(state: Cycle, mean: Mean) -> Cycle:
        change = relative_change(mean.x, state.x)
        return Cycle(
            mean.x,
            next_local_epochs(state.local_epochs, change, keys.epsilon, keys.max_local_epochs),
        )

    return RoundPlan(
        lambda x: Cycle(x, keys.local_epochs), instruct, absorb, weighting=keys.weighting
    )


METHOD = Method("co-learning", Keys, plan)
