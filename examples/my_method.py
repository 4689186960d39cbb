"""A method of one's own: FedAvg whose server goes a part of the way (a server's learning rate).

make run SET='strategy="examples.my_method:METHOD" my-method.step=0.5'
"""

from typing import NamedTuple

from torch import Tensor

from strategies.keys import RoundKeys, Share, decaying
from strategies.method import Method, RoundPlan, Run


class Keys(RoundKeys):
    """What it takes: local-epochs and weighting, as every method in rounds, and one key more."""

    step: Share = 0.5
    """how far the server goes"""


class State(NamedTuple):
    """What the server remembers; a second tensor could be a momentum."""

    x: Tensor


def plan(keys: Keys, run: Run) -> RoundPlan[State]:
    """The plan that a driver executes."""
    instruct = decaying(keys.local_epochs, run)
    return RoundPlan(
        init=State,
        instruct=lambda state, start: instruct(start),
        absorb=lambda state, mean: State(state.x.lerp(mean.x, keys.step)),
        weighting=keys.weighting,
    )


METHOD = Method("my-method", Keys, plan)
