"""The world: what it refuses, and what it gives each site."""

import math
from typing import Any

import numpy as np
import pytest

from configuration.errors import ConfigError
from simulation.world import Lognormal, SiteWorld, World


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"bandwidth_mbps": -3},
            "bandwidth_mbps = -3: a number above 0, a list with one for each site, or Lognormal",
        ),
        ({"samples_per_s": [100, 0]}, r"samples_per_s = \[100, 0\]: a number above 0"),
        ({"latency_ms": -1}, "latency_ms = -1: a number 0 or more"),
        ({"jitter": math.inf}, "jitter = inf: must be a finite number"),
        (
            {"speed": 3},
            (
                "speed: unknown key; allowed: samples_per_s, bandwidth_mbps, latency_ms, "
                "jitter, offline"
            ),
        ),
        (
            {"offline": {0: [(5, 3)]}},
            r"offline = \{0: \[\(5.0, 3.0\)\]\}: periods \(from, to\) in order",
        ),
        ({"offline": {0: [(0, 9), (8, 12)]}}, "periods"),
        ({"mean_up_s": 60}, "mean_up_s = 60.0, mean_down_s = None: both or neither"),
    ],
)
def test_wrong_value_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        World(**values)


@pytest.mark.parametrize(
    ("world", "message"),
    [
        (World(samples_per_s=[1, 2]), r"samples_per_s = \[1.0, 2.0\]: 2 values for 3 sites"),
        (World(offline={3: [(1, 2)]}), "there is no site 3, sites are 0 to 2"),
        (World(offline={site: [(0, math.inf)] for site in range(3)}), "no site is ever there"),
    ],
)
def test_world_that_does_not_fit_the_run_is_named(world: World, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        world.sites(3, seed=1)


def test_speeds_are_a_number_for_all_a_list_or_lognormal() -> None:
    assert [site.samples_per_s for site in World(samples_per_s=7).sites(2, 1)] == [7, 7]
    assert [site.samples_per_s for site in World(samples_per_s=[7, 8]).sites(2, 1)] == [7, 8]
    drawn = np.log(
        [
            site.samples_per_s
            for site in World(samples_per_s=Lognormal(median=100, sigma=0.5)).sites(400, 1)
        ]
    )
    # Standard error of the mean; that of the deviation is smaller by sqrt(2).
    error = 0.5 / math.sqrt(400)
    assert abs(drawn.mean() - math.log(100)) < 3 * error
    assert abs(drawn.std() - 0.5) < 3 * error


def test_same_seed_same_world_and_another_seed_another() -> None:
    world = World(
        samples_per_s=Lognormal(median=100, sigma=1), jitter=0.3, mean_up_s=50, mean_down_s=5
    )

    def look(seed: int) -> list[Any]:
        return [
            (site.samples_per_s, site.travel_s(1000), site.next_outage(500))
            for site in world.sites(3, seed)
        ]

    assert look(1) == look(1)
    assert look(1) != look(2)
    for of_sites in zip(*look(1), strict=True):
        assert len(set(of_sites)) == 3


def test_transfer_takes_latency_and_bytes_over_bandwidth() -> None:
    (site,) = World(bandwidth_mbps=8, latency_ms=30).sites(1, 1)
    assert site.travel_s(2_000_000) == pytest.approx(0.03 + 2)


def test_jitter_multiplies_by_a_lognormal_factor() -> None:
    (site,) = World(bandwidth_mbps=8, latency_ms=0, jitter=0.2).sites(1, 1)
    factors = np.log([site.travel_s(1_000_000) for _ in range(400)])
    assert abs(factors.mean()) < 3 * 0.2 / math.sqrt(400)
    assert abs(factors.std() - 0.2) < 3 * 0.2 / math.sqrt(800)


def site_off(*periods: tuple[float, float]) -> SiteWorld:
    (site, _) = World(offline={0: list(periods)}).sites(2, 1)
    return site


def test_site_is_back_when_its_outage_ends_and_never_when_it_died() -> None:
    site = site_off((10, 20), (30, math.inf))
    assert [site.back_at(time) for time in (0, 10, 15, 20, 29, 30, 99)] == [
        0,
        20,
        20,
        20,
        29,
        math.inf,
        math.inf,
    ]
    assert [site.next_outage(time) for time in (0, 19, 20, 99)] == [
        (10, 20),
        (10, 20),
        (30, math.inf),
        (30, math.inf),
    ]


def test_whichever_outage_comes_first_counts() -> None:
    both = World(offline={0: [(1, 2)]}, mean_up_s=1e6, mean_down_s=1)
    (site,) = both.sites(1, 1)
    assert site.next_outage(0) == (1, 2)
    assert site.next_outage(3)[0] > 1000  # type: ignore[index]


def test_random_outages_have_the_mean_lengths_asked_for() -> None:
    (site,) = World(mean_up_s=90, mean_down_s=10).sites(1, 1)
    ups, downs, time = [], [], 0.0
    for _ in range(400):
        outage = site.next_outage(time)
        assert outage is not None
        ups.append(outage[0] - time)
        downs.append(outage[1] - outage[0])
        time = outage[1]
    # An exponential's deviation is its mean.
    assert abs(np.mean(ups) - 90) < 3 * 90 / math.sqrt(400)
    assert abs(np.mean(downs) - 10) < 3 * 10 / math.sqrt(400)
    assert site.next_outage(0) == (ups[0], ups[0] + downs[0])  # the past stays what it was
