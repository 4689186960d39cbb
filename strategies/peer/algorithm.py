"""The algorithm of a peer: what it does between two exchanges and in one.

Every function takes vectors [..., d] and reduces over the last axis only: one peer's [d] in the
app, all peers' [n, d] in fast simulation and in tests. A state is a NamedTuple of tensors, so
saving it, sending it and going on from it is one function. Inputs are never written.
"""

from collections.abc import Callable, Mapping
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

Vectors = tuple[Tensor, ...]


class State(Protocol):
    """The least that the state of an algorithm has.

    Further fields are tensors, an empty one where there is nothing to remember, or dictionaries of
    tensors by neighbour.
    """

    @property
    def x(self) -> Tensor:
        """The model [..., d]; here the next gradient is taken."""


S = TypeVar("S", bound=State)


class PeerAlgorithm(NamedTuple, Generic[S]):
    """An algorithm: local steps, then an exchange, and so on.

    Attributes:
        init: the state at a model [..., d].
        descend: a local step, by the gradient at ``state.x``, which nobody writes afterwards, and a
            learning rate.
        outgoing: what neighbours are offered after the last local step.
        mix: the exchange. Own vectors as neighbours decode them, and ``sum_j w_ij`` of everybody's
            decoded vectors, own included: ``x + mixed - sent`` keeps the mean of all peers whatever
            a codec lost.
    """

    init: Callable[[Tensor], S]
    descend: Callable[[S, Tensor, float], S]
    outgoing: Callable[[S], Vectors]
    mix: Callable[[S, Vectors, Vectors], S]


class LinkAlgorithm(NamedTuple, Generic[S]):
    """An algorithm that offers each neighbour something else, and mixes what came from each.

    Attributes:
        init: the state at a model [d].
        descend: as of :class:`PeerAlgorithm`.
        outgoing: what a neighbour, by its number, is offered after the last local step.
        mix: the exchange, with the vectors of each neighbour that sent them.
    """

    init: Callable[[Tensor], S]
    descend: Callable[[S, Tensor, float], S]
    outgoing: Callable[[S, int], Vectors]
    mix: Callable[[S, Mapping[int, Vectors]], S]


def exchange(
    algorithm: PeerAlgorithm[S], state: S, sent: Vectors, mixed: Vectors, gamma: float
) -> S:
    """The exchange with averaging rate ``gamma``.

    It is ``x + gamma (mixed - sent)`` where plain averaging has ``x + mixed - sent``.
    """
    if gamma != 1:
        mixed = tuple(
            torch.lerp(own, together, gamma) for own, together in zip(sent, mixed, strict=True)
        )
    return algorithm.mix(state, sent, mixed)
