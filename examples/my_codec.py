"""A codec of one's own: ``wire.codec = "examples.my_codec:few_digits"``.

A function of the layers' sizes, whose sum is d; it returns a Codec: how a vector [d] becomes a
payload of named tensors, and how such a payload becomes a vector again. What is drawn comes from
the generator, so that a run can be repeated. Bytes are those of the payload.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from strategies.codecs import Codec, Payload

LEVELS = 127


def few_digits(sizes: Sequence[int]) -> Codec:
    """A byte a number, rounded to the nearest of 255 multiples of the vector's largest / 127."""

    def encode(vector: Tensor, _: torch.Generator) -> Payload:
        step = vector.abs().max().clamp_min(1e-30) / LEVELS
        return {"codes": (vector / step).round().to(torch.int8), "step": step[None]}

    def decode(payload: Payload) -> Tensor:
        return payload["codes"] * payload["step"]

    return Codec(encode, decode)
