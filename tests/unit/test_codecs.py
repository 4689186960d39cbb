"""Codecs: bytes, round trips, what is lost and what is not."""

from typing import Any

import pytest
import torch

from configuration.config import configuration
from configuration.errors import ConfigError
from strategies.codecs import BITS, CODECS, Codec, codec, num_bytes

SIZES = (300, 7, 1000)
D = sum(SIZES)
CHOICES: list[tuple[str, dict[str, Any]]] = [
    ("identity", {}),
    ("fp16", {}),
    ("bf16", {}),
    *(("qsgd", {"bits": bits}) for bits in BITS),
    ("top-k", {"share": 0.1}),
    ("random-k", {"share": 0.1}),
    ("sign", {}),
    ("examples.my_codec:few_digits", {}),
]


def build(name: str, sizes: tuple[int, ...] = SIZES, **changes: Any) -> Codec:
    return codec(name, sizes, **{"bits": 8, "share": 0.1} | changes)


def draw(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layers(scale: float = 30.0) -> torch.Tensor:
    """Numbers whose layers differ in scale."""
    vector = torch.randn(D, generator=draw(5))
    vector[: SIZES[0]] *= scale
    return vector


@pytest.mark.parametrize(("name", "changes"), CHOICES)
def test_zero_survives(name: str, changes: dict[str, Any]) -> None:
    found = build(name, **changes)
    assert torch.equal(found.decode(found.encode(torch.zeros(D), draw())), torch.zeros(D))


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("identity", {}, 4 * D),
        ("fp16", {}, 2 * D),
        ("bf16", {}, 2 * D),
        ("qsgd", {"bits": 16}, 2 * D + 12),
        ("qsgd", {"bits": 8}, D + 12),
        ("qsgd", {"bits": 4}, -(-D // 2) + 12),
        ("qsgd", {"bits": 2}, -(-D // 4) + 12),
        ("top-k", {}, (30 + 1 + 100) * 8),
        ("random-k", {}, (30 + 1 + 100) * 4 + 8),
        ("sign", {}, -(-D // 8) + 12),
        ("examples.my_codec:few_digits", {}, D + 4),
    ],
)
def test_bytes_are_exact(name: str, changes: dict[str, Any], expected: int) -> None:
    assert num_bytes(build(name, **changes).encode(layers(), draw())) == expected


@pytest.mark.parametrize(("name", "changes"), CHOICES)
def test_decoded_follows_the_original_with_slope_one(name: str, changes: dict[str, Any]) -> None:
    """Least squares, layer by layer: of what was decoded on the original.

    The other way round where the codec is biased.
    """
    found, vector = build(name, **changes), layers()
    decoded = found.decode(found.encode(vector, draw()))
    assert decoded.shape == vector.shape
    parts = list(zip(vector.split(SIZES), decoded.split(SIZES), strict=True))
    for original, got in (parts[0], parts[2]):
        slope = float(original @ got / (original @ original if name == "qsgd" else got @ got))
        assert slope == pytest.approx(1, abs=0.15 if changes.get("bits") == 2 else 0.05)


def nothing(sizes: tuple[int, ...]) -> int:
    return 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qsdg", "allowed: identity, .*package.module:function; did you mean 'qsgd'"),
        ("nowhere:codec", "cannot be imported"),
        (f"{__name__}:SIZES", "a function is expected, it is a tuple"),
        (f"{__name__}:nothing", "a Codec is expected; got int"),
    ],
)
def test_codec_of_ones_own_is_checked(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"wire.codec = '{name}': .*{message}"):
        build(name)


@pytest.mark.parametrize("name", CODECS)
def test_table_says_what_a_codec_does(name: str) -> None:
    """Rounding errs by a small share of each number; unbiased codecs are exact in the mean."""
    vector, found, generator = layers()[250:350], build(name, (50, 50)), draw()
    draws = torch.stack(
        [found.decode(found.encode(vector, generator)) for _ in range(500)]
    ).double()
    assert CODECS[name].rounds == bool(((draws - vector).abs() <= vector.abs() / 100).all())
    assert CODECS[name].biased == bool((draws.mean(0) - vector).abs().max() > 1)
    assert found.exact == torch.equal(draws[0], vector.double()) == (name == "identity")


@pytest.mark.parametrize(
    ("size", "share", "kept"), [(19, 0.1, 1), (100, 0.29, 29), (300, 0.1, 30), (3, 0.1, 1)]
)
def test_of_a_share_whole_numbers_are_kept_and_at_least_one(
    size: int, share: float, kept: int
) -> None:
    """Cut down, but not for a rounding error: 0.29 of 100 is 28.999999999999996."""
    for name in ("top-k", "random-k"):
        found = build(name, (size,), share=share)
        assert len(found.encode(torch.randn(size, generator=draw()), draw())["values"]) == kept


@pytest.mark.parametrize("bits", BITS)
def test_quantizer_is_unbiased(bits: int) -> None:
    """The mean of 4,000 draws, within five standard errors."""
    vector, found = layers()[250:350], build("qsgd", (50, 50), bits=bits)
    generator = draw()
    draws = torch.stack(
        [found.decode(found.encode(vector, generator)) for _ in range(4000)]
    ).double()
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - vector).abs() <= 5 * error + 1e-5).all()


@pytest.mark.parametrize(("bits", "step"), [(2, 1.0), (4, 1 / 7), (8, 1 / 127), (16, 1 / 32767)])
def test_quantizer_errs_by_less_than_a_level_of_its_layer(bits: int, step: float) -> None:
    vector, found = layers(), build("qsgd", bits=bits)
    error = (found.decode(found.encode(vector, draw())) - vector).abs()
    for original, wrong in zip(vector.split(SIZES), error.split(SIZES), strict=True):
        assert wrong.max() <= original.abs().max() * step * 1.001
        assert wrong.max() > original.abs().max() * step * 0.2


def test_top_k_keeps_the_largest_of_each_layer_exactly() -> None:
    vector, found = layers(), build("top-k")
    decoded = found.decode(found.encode(vector, draw()))
    for original, got, kept in zip(
        vector.split(SIZES), decoded.split(SIZES), (30, 1, 100), strict=True
    ):
        largest = original.abs().topk(kept).indices
        expected = torch.zeros_like(original)
        expected[largest] = original[largest]
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["top-k", "random-k"])
def test_sparse_codecs_contract_by_one_minus_the_share(name: str) -> None:
    """|C(v) - v|^2 is at most (1 - k/d) |v|^2 for top-k, and that on average for random-k.

    Within five standard errors.
    """
    vector, found = torch.randn(1000, generator=draw(2)), build(name, (1000,), share=0.25)
    generator = draw()
    lost = (
        torch.stack(
            [
                ((found.decode(found.encode(vector, generator)) - vector) ** 2).sum()
                for _ in range(400)
            ]
        )
        / (vector**2).sum()
    )
    if name == "top-k":
        assert lost.max() <= 0.75
    else:
        assert abs(float(lost.mean()) - 0.75) < 5 * float(lost.std()) / 20


@pytest.mark.parametrize("name", ["top-k", "random-k"])
def test_share_of_one_is_the_identity(name: str) -> None:
    found, vector = build(name, share=1.0), layers()
    assert torch.equal(found.decode(found.encode(vector, draw())), vector)


def test_sign_by_hand() -> None:
    found = build("sign", (2, 3))
    payload = found.encode(torch.tensor([1.0, -3.0, 0.0, 6.0, -3.0]), draw())
    assert payload["signs"].tolist() == [0b10110000]
    assert found.decode(payload).tolist() == [2.0, -2.0, 3.0, 3.0, -3.0]


def test_short_floats_are_rounded_and_saturate() -> None:
    vector = torch.tensor([1.0, 1 / 3, 1e6, -1e6])
    half = build("fp16").decode(build("fp16").encode(vector, draw()))
    assert half.tolist() == [1.0, float(torch.tensor(1 / 3).half()), 65504.0, -65504.0]


@pytest.mark.parametrize(("name", "changes"), CHOICES)
def test_input_is_not_written_and_same_seed_same_payload(
    name: str, changes: dict[str, Any]
) -> None:
    found, vector = build(name, **changes), layers()
    before = vector.clone()
    one, two = found.encode(vector, draw(3)), found.encode(vector, draw(3))
    found.decode(one)
    assert torch.equal(vector, before)
    assert all(torch.equal(one[key], two[key]) for key in one)


def plain(**changes: Any) -> Codec:
    return Codec(lambda vector, _: {"v": vector}, lambda payload: payload["v"])._replace(**changes)


def of_truths(sizes: Any) -> Codec:
    return plain(encode=lambda vector, _: {"v": vector > 0})


def of_nothing(sizes: Any) -> Codec:
    return plain(encode=lambda vector, _: {"v": vector, "rest": vector[:0]})


def in_capitals(sizes: Any) -> Codec:
    return plain(encode=lambda vector, _: {"V": vector})


def in_place(sizes: Any) -> Codec:
    return plain(encode=lambda vector, _: {"v": vector.mul_(2)})


def in_doubles(sizes: Any) -> Codec:
    return plain(decode=lambda payload: payload["v"].double())


def shorter(sizes: Any) -> Codec:
    return plain(decode=lambda payload: payload["v"][:-1])


def failing(sizes: Any) -> Codec:
    return plain(decode=lambda payload: payload["w"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("of_truths", "it sends 'v', torch.bool"),
        ("of_nothing", r"it sends 'rest', torch.float32 \[0\]"),
        ("in_capitals", "it sends 'V'"),
        ("in_place", "it writes in the vector"),
        ("in_doubles", "it decodes torch.float64 of shape"),
        ("shorter", r"it decodes torch.float32 of shape \(7,\)"),
        ("failing", "KeyError: 'w'"),
    ],
)
def test_codec_of_ones_own_is_tried_before_the_run(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"wire.codec = '{__name__}:{name}': {message}"):
        configuration(strategy="d-psgd", wire={"codec": f"{__name__}:{name}"})
