"""How a vector crosses the wire: fewer bits a number, or fewer numbers.

A codec works layer by layer, since layers differ in scale. What it makes of a vector, a *payload*,
is what is sent: bytes are those of its tensors. Decoding needs nothing but the payload and the
sizes of the layers, which everybody knows.

``CODECS`` names those of this file; one's own is ``package.module:function`` (see
``examples/my_codec.py``).

Sources: QSGD: Alistarh et al., NeurIPS 2017; top-k and random-k: Stich et al., "Sparsified SGD with
Memory", NeurIPS 2018; scaled sign: Karimireddy et al., "Error Feedback Fixes SignSGD", ICML 2019.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from strategies.imported import imported

Payload = dict[str, Tensor]
TYPES = (
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.float32,
    torch.float64,
)
BITS = (2, 4, 8, 16)  # what packs evenly into bytes
# Elements worked on at a time: what is computed on the way needs no memory of the vector's size.
_BLOCK = 1 << 18


class Codec(NamedTuple):
    """A way to write a vector.

    Attributes:
        encode: a vector [d] and a generator to draw from, to a payload.
        decode: a payload to a vector [d], of the type that was encoded.
        exact: whether nothing is lost.
    """

    encode: Callable[[Tensor, torch.Generator], Payload]
    decode: Callable[[Payload], Tensor]
    exact: bool = False


def num_bytes(payload: Payload) -> int:
    """Bytes of a payload's numbers."""
    return sum(part.numel() * part.element_size() for part in payload.values())


def identity(sizes: Sequence[int] = ()) -> Codec:
    """Send the numbers as they are."""
    return Codec(
        lambda vector, _: {"values": vector}, lambda payload: payload["values"], exact=True
    )


def rounded(dtype: torch.dtype) -> Codec:
    """The nearest number of a shorter floating-point type, beyond its range the largest one.

    It is decoded as float32.
    """
    largest = torch.finfo(dtype).max

    def encode(vector: Tensor, _: torch.Generator) -> Payload:
        # As integers of the same bits: numpy, which writes Flower's arrays, knows no bfloat16.
        values = torch.empty(vector.shape, dtype=dtype, device=vector.device)
        for block, target in zip(vector.split(_BLOCK), values.split(_BLOCK), strict=True):
            target.copy_(block.clamp(-largest, largest))
        return {"values": values.view(torch.int16)}

    return Codec(encode, lambda payload: payload["values"].view(dtype).float())


def fp16(sizes: Sequence[int]) -> Codec:
    """Round to 16 bits: 5 of exponent, 10 of mantissa."""
    return rounded(torch.float16)


def bf16(sizes: Sequence[int]) -> Codec:
    """Round to 16 bits: 8 of exponent, 7 of mantissa."""
    return rounded(torch.bfloat16)


def qsgd(sizes: Sequence[int], bits: int) -> Codec:
    """A sign and one of ``s = 2^(bits - 1) - 1`` levels, by chance the upper or the lower one.

        C(v) = m sign(v) (floor(s |v| / m) + Bernoulli(rest)) / s,   m = max |v| of the layer

    The expectation is the number itself.
    Differs from the paper's analysis: scaled by the largest number, as in its experiments, not by
    the Euclidean norm, which in a layer of many thousand numbers leaves most of them below the
    first level. ``bits`` counts the sign.
    """
    if bits not in BITS:
        raise ValueError(f"bits = {bits}: {', '.join(map(str, BITS))}")
    levels, sign_bit = (1 << (bits - 1)) - 1, 1 << (bits - 1)
    in_a_byte = max(1, 8 // bits)
    total = sum(sizes)

    def parts(
        vector: Tensor, scales: Tensor, codes: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Blocks of the vector, each with its layer's scale [] and its codes."""
        for layer, scale, code in zip(
            vector.split(list(sizes)), scales, codes.split(list(sizes)), strict=True
        ):
            for block, part in zip(layer.split(_BLOCK), code.split(_BLOCK), strict=True):
                yield block, scale, part

    def encode(vector: Tensor, generator: torch.Generator) -> Payload:
        scales = torch.stack(
            [torch.linalg.vector_norm(layer, torch.inf) for layer in vector.split(list(sizes))]
        )
        codes = vector.new_zeros(
            total + -total % in_a_byte, dtype=torch.int16 if bits == 16 else torch.uint8
        )
        steps = levels / scales.clamp_min(torch.finfo(vector.dtype).tiny)
        for block, step, code in parts(vector, steps, codes[:total]):
            # Drawn on the CPU: every device sees the same numbers.
            chance = torch.rand(len(block), generator=generator).to(block)
            level = (block.abs() * step).add_(chance).to(torch.int32).clamp_(max=levels)
            # The sign bit of an int16 counts below 0.
            code.copy_(level.add_(block < 0, alpha=sign_bit if bits < 16 else -sign_bit))
        packed = codes[::in_a_byte].clone()
        for place in range(1, in_a_byte):
            packed |= codes[place::in_a_byte] << place * bits
        return {"codes": packed, "scales": scales}

    def decode(payload: Payload) -> Tensor:
        packed, scales = payload["codes"], payload["scales"]
        codes = packed.new_empty(len(packed) * in_a_byte)
        for place in range(in_a_byte):
            codes[place::in_a_byte] = packed >> place * bits
        vector = scales.new_empty(total)
        for target, step, code in parts(vector, scales / levels, codes[:total]):
            whole = code.to(torch.int32)
            magnitude = (whole & levels).to(step.dtype) * step
            target.copy_(torch.where((whole & sign_bit) != 0, -magnitude, magnitude))
        return vector

    return Codec(encode, decode)


def top_k(sizes: Sequence[int], share: float) -> Codec:
    """The largest numbers of each layer and their places (4 bytes each); of equals, the first."""
    starts = np.cumsum([0, *sizes[:-1]])

    def encode(vector: Tensor, _: torch.Generator) -> Payload:
        # Few numbers are often equal; topk, which is faster, takes any of them.
        places = [
            start
            + torch.sort(layer.abs(), descending=True, stable=True).indices[
                : _num_sent(len(layer), share)
            ]
            if len(layer) <= 64
            else start + layer.abs().topk(_num_sent(len(layer), share), sorted=False).indices
            for start, layer in zip(starts.tolist(), vector.split(list(sizes)), strict=True)
        ]
        chosen = torch.cat(places).sort().values
        return {"values": vector[chosen], "places": chosen.to(torch.int32)}

    def decode(payload: Payload) -> Tensor:
        return _scatter(payload["values"], payload["places"].long(), sum(sizes))

    return Codec(encode, decode)


def random_k(sizes: Sequence[int], share: float) -> Codec:
    """Numbers of each layer at random places, which follow from a seed of 8 bytes; unscaled."""

    def places(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        return torch.cat(
            [
                start + torch.randperm(size, generator=generator)[: _num_sent(size, share)]
                for start, size in zip(starts, sizes, strict=True)
            ]
        )

    def encode(vector: Tensor, generator: torch.Generator) -> Payload:
        seed = torch.randint(0, 1 << 62, (1,), generator=generator)
        return {"values": vector[places(int(seed)).to(vector.device)], "seed": seed}

    def decode(payload: Payload) -> Tensor:
        values = payload["values"]
        return _scatter(values, places(int(payload["seed"])).to(values.device), sum(sizes))

    return Codec(encode, decode)


def sign(sizes: Sequence[int]) -> Codec:
    """The sign of each number, a bit, and the mean magnitude of each layer; 0 is positive."""
    total = sum(sizes)

    def encode(vector: Tensor, _: torch.Generator) -> Payload:
        scales = torch.stack([layer.abs().mean() for layer in vector.split(list(sizes))])
        bits = np.packbits((vector >= 0).cpu().numpy())
        return {"signs": torch.from_numpy(bits), "scales": scales}

    def decode(payload: Payload) -> Tensor:
        scales = payload["scales"]
        bits = np.unpackbits(payload["signs"].cpu().numpy(), count=total)
        signs = torch.from_numpy(bits).to(scales.device, scales.dtype) * 2 - 1
        return signs * _spread(scales, sizes)

    return Codec(encode, decode)


class Kind(NamedTuple):
    """A named codec.

    Attributes:
        build: takes the layers' numbers of parameters, whose sum is d, and the keys.
        rounds: whether it does no more than round each number to so many digits.
        biased: whether its mean over what is drawn is not the vector: it needs error feedback.
    """

    build: Callable[..., Codec]
    rounds: bool = False
    biased: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the run configuration that it takes."""
        return tuple(inspect.signature(self.build).parameters)[1:]


CODECS = {
    "identity": Kind(identity, rounds=True),
    "fp16": Kind(fp16, rounds=True),
    "bf16": Kind(bf16, rounds=True),
    "qsgd": Kind(qsgd),
    "top-k": Kind(top_k, biased=True),
    "random-k": Kind(random_k, biased=True),
    "sign": Kind(sign, biased=True),
}


def codec(name: str, sizes: Sequence[int], key: str = "wire.codec", **keys: Any) -> Codec:
    """The codec of a run configuration.

    Args:
        name: one of ``CODECS``, or the import path of one's own: a function of ``sizes``.
        sizes: parameters of each layer; their sum is d.
        key: where ``name`` stands, for the error.
        keys: what it takes, and it may be more.

    Raises:
        ValueError: there is none of this name.
    """
    if name in CODECS:
        kind = CODECS[name]
        return kind.build(sizes, **{key: keys[key] for key in kind.keys})
    try:
        found: object = imported(name, FunctionType, CODECS, "function")(sizes)
    except Exception as error:
        raise ValueError(f"{key} = {name!r}: {error}") from error
    if not isinstance(found, Codec):
        raise ValueError(f"{key} = {name!r}: a Codec is expected; got {type(found).__name__}")
    return found


def trial(found: Codec, d: int) -> str | None:
    """Why a codec of one's own cannot be used on vectors [d], or None."""
    vector = torch.linspace(-1, 1, d)
    before = vector.clone()
    try:
        payload = found.encode(vector, torch.Generator())
        for name, part in payload.items():
            if (
                not re.fullmatch(r"[a-z0-9.-]{1,24}", name)
                or not part.numel()
                or part.dtype not in TYPES
            ):
                return (
                    f"it sends {name!r}, {part.dtype} [{part.numel()}]; "
                    f"a name of a-z, 0-9, -, numbers of {TYPES}, at least one"
                )
        decoded = found.decode(payload)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if not torch.equal(vector, before):
        return "it writes in the vector that it encodes"
    if decoded.shape != vector.shape or decoded.dtype != vector.dtype:
        return (
            f"it decodes {decoded.dtype} of shape {tuple(decoded.shape)} "
            f"where {vector.dtype} of shape ({d},) was encoded"
        )
    return None


def _num_sent(size: int, share: float) -> int:
    return max(1, int(size * share + 1e-9))


def _spread(scales: Tensor, sizes: Sequence[int]) -> Tensor:
    """Each layer's number, as often as the layer has parameters: [d]."""
    return torch.cat([scale.expand(size) for scale, size in zip(scales, sizes, strict=True)])


def _scatter(values: Tensor, places: Tensor, d: int) -> Tensor:
    # A neighbour's numbers; a GPU would stop the process.
    if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < d:
        raise ValueError(
            f"places from {int(places.min())} to {int(places.max())} in a vector of {d}"
        )
    return values.new_zeros(d).index_put_((places,), values)
