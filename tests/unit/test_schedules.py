"""Learning rates against their closed forms."""

import itertools
import math

import pytest

from strategies.schedules import decay, progress, rates


@pytest.mark.parametrize("shape", ["exponential", "linear", "cosine"])
def test_every_shape_starts_at_one_ends_at_the_ratio_and_falls(shape: str) -> None:
    values = [decay(shape, 0.25, step / 100) for step in range(101)]
    assert values[0] == 1
    assert values[-1] == pytest.approx(0.25, rel=1e-12)
    assert all(later < earlier for earlier, later in itertools.pairwise(values))


def test_values_half_way() -> None:
    assert decay("exponential", 0.25, 0.5) == pytest.approx(0.5)  # the geometric mean of 1 and 0.25
    assert decay("linear", 0.25, 0.5) == pytest.approx(0.625)  # the arithmetic mean
    assert decay("cosine", 0.25, 0.5) == pytest.approx(0.625)
    assert decay("cosine", 0.0001, 0.25) == pytest.approx(
        0.0001 + 0.9999 * (1 + math.sqrt(0.5)) / 2
    )


@pytest.mark.parametrize("shape", ["exponential", "linear", "cosine"])
def test_ratio_one_is_a_constant_rate(shape: str) -> None:
    assert {decay(shape, 1.0, step / 7) for step in range(8)} == {1.0}


def test_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="sine"):
        decay("sine", 0.5, 0.5)


def test_progress_by_batch_and_by_epoch() -> None:
    assert [progress(step, 8, 4, "batch") for step in range(8)] == [
        0,
        1 / 8,
        2 / 8,
        3 / 8,
        4 / 8,
        5 / 8,
        6 / 8,
        7 / 8,
    ]
    assert [progress(step, 8, 4, "epoch") for step in range(8)] == [0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5]


def test_curve_depends_only_on_the_fraction_of_the_round() -> None:
    short = {
        progress(step, 20, 10, "batch"): decay("exponential", 0.25, progress(step, 20, 10, "batch"))
        for step in range(20)
    }
    long = {
        progress(step, 80, 10, "batch"): decay("exponential", 0.25, progress(step, 80, 10, "batch"))
        for step in range(80)
    }
    assert all(long[u] == rate for u, rate in short.items())


def test_warm_up_rises_by_batch_from_above_zero_and_the_shape_goes_over_the_rest() -> None:
    rate = rates(2.0, "linear", 0.5, "batch", (0.0, 1.0), steps=20, epoch=10, warmup=0.2)
    expected = [0.5, 1.0, 1.5, 2.0, *(2 - step / 16 for step in range(16))]
    assert [rate(step) for step in range(20)] == pytest.approx(expected)
    by_epoch = rates(2.0, "linear", 0.5, "epoch", (0.0, 1.0), steps=20, epoch=10, warmup=0.2)
    assert [by_epoch(step) for step in range(20)] == pytest.approx(
        [0.5, 1.0, 1.5, *[2.0] * 7, *[2 - 0.3 / 0.8] * 10]
    )


def test_warm_up_goes_on_from_round_to_round_and_none_changes_nothing() -> None:
    """One cycle in rounds of 3, 1 and 16 batches, as DiLoCo has them, is one of 20."""
    whole = rates(2.0, "cosine", 0.1, "batch", (0.0, 1.0), steps=20, epoch=10, warmup=0.3)
    parts = [
        rates(
            2.0,
            "cosine",
            0.1,
            "batch",
            (start / 20, stop / 20),
            steps=stop - start,
            epoch=10,
            warmup=0.3,
        )
        for start, stop in ((0, 3), (3, 4), (4, 20))
    ]
    found = [
        part(step) for part, steps in zip(parts, (3, 1, 16), strict=True) for step in range(steps)
    ]
    assert found == pytest.approx([whole(step) for step in range(20)])
    plain = rates(0.3, "cosine", 0.1, "batch", (0.1, 0.7), steps=7, epoch=7)
    assert [plain(step) for step in range(7)] == [
        0.3 * decay("cosine", 0.1, 0.1 + (0.7 - 0.1) * (step / 7)) for step in range(7)
    ]
