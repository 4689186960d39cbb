"""What ``benchmarks.speed`` times beside each other does the same work."""

from collections.abc import Callable

import pytest

from benchmarks import rivals, speed
from benchmarks.rivals import Run


@pytest.mark.parametrize(
    ("plain", "others", "number"),
    [
        (rivals.fedavg, [speed.laboratory, speed.batched], 2),
        (rivals.ring, [speed.relay, speed.batched_peers], 12),
    ],
    ids=["W1", "W2"],
)
def test_the_plain_loop_and_the_engines_end_with_the_same_models(
    plain: Callable[[int], Run], others: list[Callable[[int], Run]], number: int
) -> None:
    expected = plain(2)
    for other in others:
        found = other(2)
        assert len(found.ends) == len(expected.ends) == number
        assert found.ends == sorted(found.ends)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.accuracy == pytest.approx(expected.accuracy)
