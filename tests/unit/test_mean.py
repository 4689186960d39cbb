"""The mean that does not depend on the order of arrival."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.averaging.mean import LARGEST, StreamingMean, fault


def mean_of(vectors: list[torch.Tensor], shares: list[float]) -> torch.Tensor:
    mean = StreamingMean(vectors[0].shape)
    for vector, share in zip(vectors, shares, strict=True):
        mean.add(vector, share)
    return mean.result()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**32 - 1), st.floats(-8, 5))
def test_order_of_arrival_does_not_change_a_bit(
    num_sites: int, seed: int, magnitude: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Magnitudes spread over six decades, where floating-point sums do depend on the order.
    scale = 10 ** (magnitude - 6 * torch.rand(1000, generator=generator))
    vectors = [torch.randn(1000, generator=generator) * scale for _ in range(num_sites)]
    weights = torch.rand(num_sites, generator=generator).double() + 0.1
    pairs = list(zip(vectors, (weights / weights.sum()).tolist(), strict=True))
    expected = mean_of(*map(list, zip(*pairs, strict=True)))
    random.Random(seed).shuffle(pairs)
    assert torch.equal(mean_of(*map(list, zip(*pairs, strict=True))), expected)


def test_floating_point_sums_depend_on_the_order_here() -> None:
    """The test above would pass for any sum if its numbers were too tame.

    These are of the same kind, and their sum depends on the order.
    """
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(8, 1000, generator=generator) * 10 ** (
        -6 * torch.rand(8, 1000, generator=generator)
    )
    forwards, backwards = torch.zeros(1000), torch.zeros(1000)
    for vector in vectors:
        forwards += vector
    for vector in vectors.flip(0):
        backwards += vector
    assert not torch.equal(forwards, backwards)


def test_mean_is_the_weighted_mean() -> None:
    # These are more than one block.
    vectors = torch.randn(5, 300_000, generator=torch.Generator().manual_seed(1))
    shares = [0.1, 0.2, 0.3, 0.15, 0.25]
    expected = (vectors.double() * torch.tensor(shares, dtype=torch.float64)[:, None]).sum(0)
    # Up to one step of float32.
    torch.testing.assert_close(
        mean_of(list(vectors), shares), expected.float(), rtol=2.0**-23, atol=5 * 2.0**-40
    )


def test_sites_that_did_not_answer_do_not_shrink_the_mean() -> None:
    vectors = [torch.full((3,), 2.0), torch.full((3,), 4.0)]
    assert mean_of(vectors, [0.25, 0.25]).tolist() == [3.0, 3.0, 3.0]
    assert mean_of(vectors, [0.1, 0.3]).tolist() == [3.5, 3.5, 3.5]


def test_mean_of_identical_models_is_that_model() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(mean_of([x] * 7, [1 / 7] * 7), x, rtol=0, atol=7 * 2.0**-40)


def test_inputs_are_not_written() -> None:
    x = torch.randn(10)
    before = x.clone()
    mean_of([x, x], [0.5, 0.5])
    assert torch.equal(x, before)


def test_largest_values_do_not_overflow() -> None:
    largest = torch.nextafter(torch.tensor(LARGEST), torch.tensor(0.0))
    vectors = [torch.stack([largest, -largest])] * 1000
    assert mean_of(vectors, [1 / 1000] * 1000).tolist() == [largest.item(), -largest.item()]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (float("nan"), "NaN or infinite"),
        (float("inf"), "NaN or infinite"),
        (-float("inf"), "NaN or infinite"),
        (-5e6, "diverged"),
    ],
)
def test_what_cannot_be_averaged_is_refused(value: float, reason: str) -> None:
    x = torch.zeros(1000)
    assert fault(x) is None
    x[617] = value
    assert reason in (fault(x) or "")


def test_mean_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing"):
        StreamingMean(torch.Size([3])).result()
