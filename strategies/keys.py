"""Types and keys that several methods' sections share, and what several plans have in common."""

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from strategies.asynchronous.rule import Weight, constant, hinge, polynomial
from strategies.method import LocalTraining, RoundStart, Run, Section

# Larger numbers are slips: they would end in an overflow, or never.
Positive = Annotated[int, Field(ge=1, le=10**6)]
Above0 = Annotated[float, Field(gt=0, le=1e9)]
NotNegative = Annotated[float, Field(ge=0, le=1e9)]
Share = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Only:
    """A key that has an effect only where a key beside it has one of some values.

    Args:
        own: whether it also has an effect with a value of one's own, ``package.module:NAME``.
        **values: by the name of the other key, the values with which this one has an effect.
    """

    def __init__(self, *, own: bool = False, **values: tuple[object, ...]) -> None:
        self.own, self.values = own, values


# Rounds.


class RoundKeys(Section):
    """The keys of methods in rounds."""

    local_epochs: Positive = 2
    """local epochs a round"""
    weighting: Literal["equal", "samples"] = "equal"
    """equal, or samples: sites count by their training examples"""


def decaying(local_epochs: int, run: Run) -> Callable[[RoundStart], LocalTraining]:
    """So many epochs a round, and one decay of the learning rate over the whole run."""

    def instruct(start: RoundStart) -> LocalTraining:
        epochs = min(local_epochs, round(start.total - start.done))
        end = (start.done + epochs) / start.total
        return LocalTraining(run.lr, (start.done / start.total, end), epochs=epochs)

    return instruct


# Arrivals.


class ArrivalKeys(Section):
    """The keys of asynchronous methods: a contribution changes the model when it arrives."""

    local_steps: Positive = 1
    """batches of a contribution; 1: a gradient"""


class StalenessKeys(ArrivalKeys):
    """The keys of methods that weight a contribution by its staleness."""

    staleness: Literal["constant", "polynomial", "hinge"] = "constant"
    """weight of a contribution by its staleness: constant, polynomial, hinge"""
    staleness_exponent: Annotated[NotNegative, Only(staleness=("polynomial", "hinge"))] = 0.5
    """polynomial: (1 + staleness)^-a; hinge: 1 / (a (staleness - border) + 1) above the border"""
    staleness_border: Annotated[NotNegative, Only(staleness=("hinge",))] = 4.0
    """of hinge"""

    def weight(self) -> Weight:
        """The function that weights a contribution by its staleness."""
        match self.staleness:
            case "constant":
                return constant
            case "polynomial":
                return polynomial(self.staleness_exponent)
            case "hinge":
                return hinge(self.staleness_exponent, self.staleness_border)


class DescentKeys(StalenessKeys):
    """The keys of asynchronous descent."""

    server_lr: Above0 = 1.0
    """factor on the sites' own steps"""


# Peers.


class PeerKeys(Section):
    """The keys of peers without a server: they train, then exchange with their neighbours."""

    local_steps: Positive = 1
    """batches between two exchanges"""


class MomentumKeys(Section):
    """The keys of peers with momentum of their own."""

    momentum: Decay = 0.9
    """beta"""
    nesterov: bool = False
    """look ahead"""


class SharpKeys(Section):
    """The keys of sharpness-aware peers."""

    rho: Above0 = 0.05
    """radius of sharpness-aware minimization"""
