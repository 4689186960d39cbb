"""How a peer's vector reaches neighbours: through a codec, with or without memory of its losses.

    none           q = C(v)                                 neighbours decode q
    deep-squeeze   q = C(v + e),  e = v + e - q             neighbours decode q
    choco          q = C(v - v_hat),  v_hat = v_hat + q     neighbours add q to their copy of v_hat

With ``choco``, neighbours use their copy of v_hat.

Sources: Tang et al., "DeepSqueeze", 2019; Koloskova et al., "Decentralized Stochastic Optimization
and Gossip Algorithms with Compressed Communication", ICML 2019, in that order (the hat moves first,
then peers average). Differs: a neighbour that missed messages gets them later, in order, so that
its copy of a hat is never wrong for long.
Invariant: what was sent plus what is remembered is what was wanted.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from strategies.codecs import Codec, Payload

FEEDBACKS = ("none", "deep-squeeze", "choco")


class Channel(NamedTuple):
    """One vector's way, in both directions.

    Attributes:
        init: memory for vectors like this one; empty where nothing is remembered.
        encode: memory, vector [d] and a generator to the payload, the new memory, and the vector as
            neighbours have it.
        decode: a neighbour's payload and the last vector that came from it (zeros at first) to the
            vector that came now.
        exact: whether neighbours have exactly what was offered, so that nothing needs to be
            remembered.
        chained: whether a payload goes on from the one before it, which a neighbour must have.
    """

    init: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor, Tensor, torch.Generator], tuple[Payload, Tensor, Tensor]]
    decode: Callable[[Payload, Tensor], Tensor]
    exact: bool = False
    chained: bool = False


def channel(codec: Codec, feedback: str) -> Channel:
    """A channel; ``feedback`` is one of ``FEEDBACKS``."""

    def plain(
        memory: Tensor, vector: Tensor, generator: torch.Generator
    ) -> tuple[Payload, Tensor, Tensor]:
        payload = codec.encode(vector, generator)
        return payload, memory, codec.decode(payload)

    def squeezed(
        memory: Tensor, vector: Tensor, generator: torch.Generator
    ) -> tuple[Payload, Tensor, Tensor]:
        wanted = vector + memory
        payload = codec.encode(wanted, generator)
        own = codec.decode(payload)
        return payload, wanted - own, own

    def difference(
        memory: Tensor, vector: Tensor, generator: torch.Generator
    ) -> tuple[Payload, Tensor, Tensor]:
        payload = codec.encode(vector - memory, generator)
        hat = memory + codec.decode(payload)
        return payload, hat, hat

    match feedback:
        case "none":
            return Channel(
                lambda vector: vector.new_empty(0),
                plain,
                lambda payload, _: codec.decode(payload),
                exact=codec.exact,
            )
        case "deep-squeeze":
            return Channel(torch.zeros_like, squeezed, lambda payload, _: codec.decode(payload))
        case "choco":
            return Channel(
                torch.zeros_like,
                difference,
                lambda payload, last: last + codec.decode(payload),
                chained=True,
            )
    raise ValueError(f"feedback {feedback!r}: {', '.join(FEEDBACKS)}")
