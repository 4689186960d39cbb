"""How a vector crosses the wire: fewer bits a number, or fewer numbers.

A codec works layer by layer, since layers differ in scale. What it makes of a vector, a *payload*, is what is sent: bytes are
those of its tensors. Decoding needs nothing but the payload and the sizes of the layers, which everybody knows.

Sources: QSGD: Alistarh et al., NeurIPS 2017; top-k and random-k: Stich et al., "Sparsified SGD with Memory", NeurIPS 2018; scaled
sign: Karimireddy et al., "Error Feedback Fixes SignSGD", ICML 2019.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Payload = dict[str, Tensor]
BITS = (2, 4, 8, 16)  # what packs evenly into bytes


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


def codec(name: str, sizes: Sequence[int], *, bits: int, share: float) -> Codec:
    """The codec of a run configuration.

    Args:
        name: identity, fp16, bf16, qsgd, top-k, random-k or sign.
        sizes: parameters of each layer; their sum is d.
        bits: of qsgd.
        share: of the numbers that top-k and random-k send.
    """
    match name:
        case "identity":
            return identity()
        case "fp16":
            return rounded(torch.float16)
        case "bf16":
            return rounded(torch.bfloat16)
        case "qsgd":
            return qsgd(sizes, bits)
        case "top-k":
            return top_k(sizes, share)
        case "random-k":
            return random_k(sizes, share)
        case "sign":
            return sign(sizes)
    raise ValueError(f"no codec {name!r}")


def identity() -> Codec:
    """The numbers themselves."""
    return Codec(lambda vector, _: {"values": vector}, lambda payload: payload["values"], exact=True)


def rounded(dtype: torch.dtype) -> Codec:
    """The nearest number of a shorter floating-point type, the largest one where there is none; decoded as float32."""
    largest = torch.finfo(dtype).max

    def encode(vector: Tensor, _: torch.Generator) -> Payload:
        # As integers of the same bits: numpy, which writes Flower's arrays, knows no bfloat16.
        return {"values": vector.clamp(-largest, largest).to(dtype).view(torch.int16)}

    return Codec(encode, lambda payload: payload["values"].view(dtype).float())


def qsgd(sizes: Sequence[int], bits: int) -> Codec:
    """A sign and one of ``s = 2^(bits - 1) - 1`` levels, rounded up or down by chance so that the mean is right.

        C(v) = m sign(v) (floor(s |v| / m) + Bernoulli(rest)) / s,   m = max |v| of the layer

    Differs from the paper's analysis: scaled by the largest number, as in its experiments, not by the Euclidean norm, which in a
    layer of many thousand numbers leaves most of them below the first level. ``bits`` counts the sign.
    """
    if bits not in BITS:
        raise ValueError(f"bits = {bits}: {', '.join(map(str, BITS))}")
    levels, sign_bit = (1 << (bits - 1)) - 1, 1 << (bits - 1)
    in_a_byte = max(1, 8 // bits)
    total = sum(sizes)

    def encode(vector: Tensor, generator: torch.Generator) -> Payload:
        scales = torch.stack([layer.abs().max() for layer in vector.split(list(sizes))])
        exact = vector.abs() * (levels / _spread(scales.clamp_min(torch.finfo(vector.dtype).tiny), sizes))
        # Drawn on the CPU: every device sees the same numbers.
        level = (exact + torch.rand(total, generator=generator).to(vector)).to(torch.int32).clamp_(max=levels)
        code = level + (vector < 0) * sign_bit
        if bits == 16:
            return {"codes": (code - (code >= 1 << 15) * (1 << 16)).to(torch.int16), "scales": scales}
        code = torch.nn.functional.pad(code, (0, -total % in_a_byte)).view(-1, in_a_byte)
        shifts = torch.arange(0, 8, bits, device=code.device)[:in_a_byte]
        return {"codes": (code << shifts).sum(1).to(torch.uint8), "scales": scales}

    def decode(payload: Payload) -> Tensor:
        code = payload["codes"].to(torch.int32)
        if bits < 16:
            shifts = torch.arange(0, 8, bits, device=code.device)[:in_a_byte]
            code = ((code[:, None] >> shifts) & ((1 << bits) - 1)).view(-1)[:total]
        magnitude = (code & levels).to(payload["scales"].dtype) * _spread(payload["scales"] / levels, sizes)
        return torch.where((code & sign_bit) != 0, -magnitude, magnitude)

    return Codec(encode, decode)


def top_k(sizes: Sequence[int], share: float) -> Codec:
    """The largest numbers of each layer and their places (4 bytes each); of equal ones, those that come first."""
    starts = np.cumsum([0, *sizes[:-1]])

    def encode(vector: Tensor, _: torch.Generator) -> Payload:
        places = [
            start + torch.sort(layer.abs(), descending=True, stable=True).indices[: _kept(len(layer), share)]
            if len(layer) <= 64  # few numbers are often equal; topk, which is faster, takes any of them
            else start + layer.abs().topk(_kept(len(layer), share), sorted=False).indices
            for start, layer in zip(starts.tolist(), vector.split(list(sizes)), strict=True)
        ]
        chosen = torch.cat(places).sort().values
        return {"values": vector[chosen], "places": chosen.to(torch.int32)}

    def decode(payload: Payload) -> Tensor:
        return _scatter(payload["values"], payload["places"].long(), sum(sizes))

    return Codec(encode, decode)


def random_k(sizes: Sequence[int], share: float) -> Codec:
    """Numbers of each layer at random places, which the seed of 8 bytes tells; not scaled up."""

    def places(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        return torch.cat(
            [
                start + torch.randperm(size, generator=generator)[: _kept(size, share)]
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
    """The sign of each number, a bit, and the mean magnitude of each layer. Zero counts as positive."""
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


def _kept(size: int, share: float) -> int:
    return max(1, int(size * share + 1e-9))


def _spread(scales: Tensor, sizes: Sequence[int]) -> Tensor:
    """Each layer's number, as often as the layer has parameters: [d]."""
    return torch.cat([scale.expand(size) for scale, size in zip(scales, sizes, strict=True)])


def _scatter(values: Tensor, places: Tensor, d: int) -> Tensor:
    if (
        places.numel() and not 0 <= int(places.min()) <= int(places.max()) < d
    ):  # a neighbour's numbers; a GPU would stop the process
        raise ValueError(f"places from {int(places.min())} to {int(places.max())} in a vector of {d}")
    return values.new_zeros(d).index_put_((places,), values)
