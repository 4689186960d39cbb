"""The types of :mod:`strategies.peer.step`: a peer, its state, what it gets and answers."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from strategies.codecs import Payload
from strategies.method import PeerPlan
from strategies.peer.algorithm import Vectors
from strategies.peer.channel import Channel
from strategies.peer.neighbourhood import Regular
from strategies.robust import Robust

Metrics = dict[str, float | int | list[float]]


class Peer(NamedTuple):
    """One peer of a run: what is the same in each of its steps.

    Attributes:
        plan: the method.
        channel: how offered vectors reach its neighbours.
        cross: how gradients do.
        regular: clipping and weight decay.
        averaging_rate: gamma, how far it goes to its neighbours' mean.
        number: counts from 0.
        seed: of the run; codecs draw from it.
        loss_batches: the loss is reported as a mean over at least so many batches.
        robust: the mean of what neighbours send.
        max_change: what is further from the own than so many times the own's norm is refused; 0: no
            bound.
    """

    plan: PeerPlan
    channel: Channel
    cross: Channel
    regular: Regular
    averaging_rate: float
    number: int
    seed: int
    loss_batches: int = 1
    robust: Robust = Robust()
    max_change: float = 0.0


class Pending(NamedTuple):
    """The first half of an exchange of neighbourhood gradients.

    Attributes:
        gradient: the own gradient [d] at the own model.
        loss: the own loss [].
        mixed: the weighted means of the vectors that came.
    """

    gradient: Tensor
    loss: Tensor
    mixed: Vectors


class Hat(NamedTuple):
    """The copy of a neighbour's vectors to which its differences are added (CHOCO); their step."""

    step: int
    vectors: Vectors


class PeerState(NamedTuple):
    """All that a peer remembers from step to step.

    Attributes:
        algorithm: the algorithm's state.
        stats: BatchNorm statistics [b].
        step: that was taken last; -1 before the first.
        batches: that it trained on.
        seen: of each neighbour, the step of the last payload that came.
        memories: the channel's, one a vector; none before the first offer.
        sent: own vectors as neighbours have them; none where the channel is exact.
        hats: of each neighbour, where the channel is chained.
        cross: of each neighbour, the memory of the channel of gradients.
        offered: the step of the last offer; -1 before the first.
        reset: whether a chained channel is reset: its next payload goes on from zeros.
        shift: how far the own model was perturbed for the neighbours; empty where it was not.
        pending: an exchange of neighbourhood gradients that has begun.
        done: the fraction of the run that was over in the last step.
        losses: the sum over the batches whose loss was not reported yet.
        unreported: how many these are.
    """

    algorithm: Any
    stats: Tensor
    shift: Tensor
    step: int = -1
    batches: int = 0
    seen: Mapping[int, int] = {}
    memories: Vectors = ()
    sent: Vectors = ()
    hats: Mapping[int, Hat] = {}
    cross: Mapping[int, Tensor] = {}
    offered: int = -1
    reset: bool = True
    pending: Pending | None = None
    done: float = 0.0
    losses: float = 0.0
    unreported: int = 0

    @property
    def x(self) -> Tensor:
        """The model [d]."""
        x: Tensor = self.algorithm.x
        return x


class Order(NamedTuple):
    """What a message asks for.

    Attributes:
        step: counts from 0.
        neighbours: whose offers it mixes, with their weights.
        readers: who mixes what it offers now.
        lr: the learning rate.
        done: the fraction of the run that is over, from 0 to 1.
        test: whether the model is tested before it is trained.
        last: whether the run ends with the exchange of this step.
        rejoin: whether the peer was away: the reply to its last message may be lost.
        reset: whether a chained channel must be reset, as a neighbour lacks a difference.
    """

    step: int
    neighbours: Mapping[int, float]
    lr: float
    done: float = 0.0
    readers: tuple[int, ...] = ()
    test: bool = False
    last: bool = False
    rejoin: bool = False
    reset: bool = False


class Received(NamedTuple):
    """A neighbour's payload of a step, and where it could not be opened, why."""

    sender: int
    step: int
    payload: Payload
    problem: str = ""


class RefusedPayload(NamedTuple):
    """The sender of a payload that cannot be used, and why."""

    sender: int
    reason: str


class Oracle(Protocol):
    """A peer's network on its data."""

    def gradient(self, x: Tensor, stats: Tensor, batch: int, /) -> tuple[Tensor, Tensor, Tensor]:
        """Loss [] and gradient [d] at a model on a batch, and BatchNorm statistics after it.

        Batches are counted over the whole run. The gradient may be overwritten by the next call.
        """
        ...

    def test(self, x: Tensor, stats: Tensor, /) -> Mapping[str, float | int | list[float]]:
        """Metrics of a model on the test part."""
        ...


class Result(NamedTuple):
    """The result of a step.

    Attributes:
        state: to be remembered.
        offers: a payload for all neighbours (None), or one for each.
        metrics: what is reported.
        refused: what neighbours sent that cannot be used.
        reset: whether a chained channel was reset.
    """

    state: PeerState
    offers: Mapping[int | None, Payload]
    metrics: Metrics
    refused: tuple[RefusedPayload, ...] = ()
    reset: bool = False
