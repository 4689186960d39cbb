"""When a contribution changes the model.

Oracles of the schedules, on made-up sites whose every number is known.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from flwr.app import Error, Message, RecordDict
from torch import Tensor

from configuration.config import Config, configuration
from strategies.protocol import TrainMetrics, write_trained
from strategies.records import STATS, X, arrays_of
from tests.app.stubs import NETWORK, SIZE, TRAIN, Answer, Outcome, outcome

GSGM: dict[str, Any] = {"window": 1, "momentum": 0.0}
PLAIN = {"lr": 0.1, "lr_ratio": 1.0, "batch_size": 8}  # one batch an epoch


def gsgm(sites: int, epochs: int, gsgm: dict[str, Any] | None = None, **changes: Any) -> Config:
    common: dict[str, Any] = {"model": {"name": NETWORK}, "training": PLAIN, "strategy": "gsgm"}
    return configuration(
        num_sites=sites, epochs=epochs, gsgm=GSGM | (gsgm or {}), **common | changes
    )


def ages(found: Outcome) -> Counter[int]:
    rows = found.metrics[found.metrics["metric"].str.startswith("staleness-")]
    return Counter(
        {
            int(str(name).removeprefix("staleness-")): int(n)
            for name, n in rows.groupby("metric")["value"].sum().items()
        }
    )


def seconds(*of_sites: float) -> Callable[[int, Message], float]:
    """Seconds of training; a test takes a millisecond."""
    return lambda site, message: (
        of_sites[site] if message.metadata.message_type == "train" else 1e-3
    )


def delta(site: int, number: int) -> Tensor:
    """What a site's contribution number ``number`` moves, from 0.1 on."""
    return torch.full((SIZE,), 0.1 + 0.01 * site + 0.001 * number)


class Numbered:
    """Sites whose contributions are known by their number."""

    def __init__(self, stats: Callable[[int, int], float] = lambda site, number: 0.0) -> None:
        self.counts: Counter[int] = Counter()
        self._stats = stats

    def __call__(self, site: int, message: Message, content: RecordDict) -> Answer:
        if message.metadata.message_type != "train":
            return content
        number = self.counts[site]
        self.counts[site] += 1
        metrics = TrainMetrics(
            loss=1.0, lr_first=0.1, lr_last=0.1, num_examples=TRAIN, samples=TRAIN
        )
        stats = torch.full((4,), self._stats(site, number))
        return write_trained({X: delta(site, number), STATS: stats}, metrics)


# --- refill ---------------------------------------------------------------------------------------


def test_refill_makes_the_kth_arrival_of_a_list_k_minus_1_old() -> None:
    found = outcome(gsgm(5, 8, {"schedule": "refill"}), seconds=seconds(1.0, 1.3, 1.9, 2.2, 7.0))
    assert found.error is None
    assert ages(found) == {0: 8, 1: 8, 2: 8, 3: 8, 4: 8}


def test_list_makes_them_twice_as_old_after_the_first() -> None:
    """All but those of the first list were sent the model of their release.

    Four others came before each of them.
    """
    found = outcome(gsgm(5, 8, {"schedule": "list"}), seconds=seconds(1.0, 1.3, 1.9, 2.2, 7.0))
    assert ages(found)[4] == 7 * 5 + 1
    assert sum(ages(found).values()) == 40


def test_refill_sends_all_sites_the_same_newest_model() -> None:
    sent: list[tuple[int, bytes]] = []

    def look(site: int, message: Message, content: RecordDict) -> Answer:
        if message.metadata.message_type == "train":
            sent.append((site, arrays_of(message)[X].data))
        return content

    outcome(gsgm(4, 5, {"schedule": "refill"}), look, seconds=seconds(1.0, 3.0, 2.0, 9.0))
    assert len(sent) == 4 * 5
    for start in range(0, len(sent), 4):
        assert sorted(site for site, _ in sent[start : start + 4]) == [0, 1, 2, 3]
        assert len({data for _, data in sent[start : start + 4]}) == 1
    assert len({data for _, data in sent}) == 5


def test_refill_does_not_wait_for_a_site_that_failed() -> None:
    def fail(site: int, message: Message, content: RecordDict) -> Answer:
        return (
            Error(2, "out of memory")
            if site == 2 and message.metadata.message_type == "train"
            else content
        )

    found = outcome(gsgm(4, 5, {"schedule": "refill"}), fail, seconds=seconds(1.0, 3.0, 2.0, 9.0))
    assert found.error is None
    assert sum(ages(found).values()) == 4 * 5
    assert set(ages(found)) <= {0, 1, 2}


# --- local ----------------------------------------------------------------------------------------


def reference(
    x: Tensor, contributions: list[list[tuple[Tensor, int]]], strength: float
) -> list[Tensor]:
    """The models after each contribution.

    It is of its parts' deltas, each compensated against the model of its own version:
    ``x' = x - mean_p s(age_p) (delta_p + strength / lr delta_p^2 (x - x_p))`` with
    ``s(a) = 1 / (1 + a)`` and lr 0.1.
    """
    versions = [x]
    for parts in contributions:
        x, total = versions[-1], torch.zeros(SIZE)
        for moved, version in parts:
            age = len(versions) - 1 - version
            total += (
                (moved + strength / 0.1 * moved**2 * (x - versions[version]))
                / (1 + age)
                / len(parts)
            )
        versions.append(x - total)
    return versions


def test_local_averages_what_a_waiting_site_made_each_part_of_its_own_model() -> None:
    """Sites take 1, 2.6 and 6.5 seconds; every arrival is worked out by hand.

    Of each: site, second, and the version that it was made of.
    """
    contributions = [
        [(delta(0, 0), 0)],  # 0 at 1
        [(delta(1, 0), 0)],  # 1 at 2.6
        [(delta(2, 0), 0)],  # 2 at 6.5: the first list is done, and who waited is next
        # 0 at 2 and at 3 with what it was sent at 1 and 2; at 4, 5 and 6 with what it was sent
        # from 3 on, after 2.6.
        [(delta(0, 1), 1), (delta(0, 2), 1), (delta(0, 3), 2), (delta(0, 4), 2), (delta(0, 5), 2)],
        [(delta(1, 1), 2)],  # 1 at 5.2
    ]
    keys = {
        "schedule": "local",
        "base": "dc-asgd-c",
        "compensation": 0.5,
        "staleness": "polynomial",
        "staleness-exponent": 1.0,
    }
    config = gsgm(3, 2, keys, results={"evaluate_every": 1})
    found = outcome(config, Numbered(), seconds=seconds(1.0, 2.6, 6.5))
    first = found.new_models[0][X] + delta(0, 0)
    expected = reference(first, contributions, 0.5)
    for kept, wanted in zip(found.new_models, expected[1:], strict=False):
        torch.testing.assert_close(kept[X], wanted)
    # Ages 0; 1; 2; 2, 2, 1, 1, 1 of the parts, whose mean is rounded; 2.
    assert ages(found) - Counter(ages(found).keys() - {0, 1, 2}) >= Counter({0: 1, 1: 2, 2: 2})


# --- statistics -----------------------------------------------------------------------------------


def test_statistics_are_a_running_mean_over_the_sites() -> None:
    """Each arrival moves them by one of three parts, also where the contribution still waits."""
    values = {0: [3.0, 9.0, 5.0, 0.0], 1: [6.0, 12.0, 0.0], 2: [1.5, 4.5, 0.0]}
    config = gsgm(3, 2, {"schedule": "list"}, results={"evaluate_every": 1}, max_change=10.0)
    found = outcome(
        config, Numbered(lambda site, number: values[site][number]), seconds=seconds(1.0, 1.5, 2.2)
    )
    arrived = [
        values[0][0],
        values[1][0],
        values[0][1],
        values[2][0],
        values[1][1],
        values[0][2],
        values[2][1],
    ]
    stats = [torch.tensor([0.0, 0.0, 1.0, 1.0])]
    for value in arrived:
        stats.append(stats[-1] + (value - stats[-1]) / 3)
    assert len(found.new_models) == 6
    for kept, arrivals in zip(found.new_models, (1, 2, 4, 4, 5, 7), strict=True):
        torch.testing.assert_close(kept[STATS], stats[arrivals])
