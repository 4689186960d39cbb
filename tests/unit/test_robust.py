"""Robust means against independent implementations, and what a hostile row may do to them."""

import errno
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.server.strategy.aggregate import aggregate_krum, aggregate_median, aggregate_trimmed_avg
from flwr.serverapp.strategy.multikrum import select_multikrum
from scipy.stats import trim_mean
from torch import Tensor

from configuration.config import Config
from configuration.errors import ConfigError
from configuration.graph import graph_of
from strategies import robust
from strategies.asynchronous.fedbuff import fedbuff
from strategies.asynchronous.robust import robust_window
from strategies.asynchronous.rule import Update, constant
from strategies.averaging.collected import Collected
from strategies.robust import (
    Kind,
    Robust,
    capped,
    clipped,
    krum,
    mean_of,
    median,
    neighbourhood_mean,
    trimmed_mean,
)
from strategies.topology import TopologyError


def rows(count: int, size: int = 50, seed: int = 1) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [3, 4, 5, 8])
def test_median_is_numpys_and_flowers(count: int) -> None:
    x = rows(count)
    np.testing.assert_allclose(median(x), np.median(x.numpy(), axis=0), rtol=1e-6)
    np.testing.assert_allclose(
        median(x), aggregate_median([([row.numpy()], 1) for row in x])[0], rtol=1e-6
    )


@pytest.mark.parametrize(("count", "faulty"), [(5, 1), (5, 2), (8, 2), (9, 4)])
def test_trimmed_mean_is_scipys_and_flowers(count: int, faulty: int) -> None:
    x = rows(count)
    share = faulty / count + 1e-9
    np.testing.assert_allclose(
        trimmed_mean(x, faulty), trim_mean(x.numpy(), share), rtol=2e-5, atol=1e-6
    )
    flowers = aggregate_trimmed_avg([([row.numpy()], 1) for row in x], share)
    np.testing.assert_allclose(trimmed_mean(x, faulty), flowers[0], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("count", "faulty"), [(5, 1), (9, 2), (12, 4)])
def test_krum_is_flowers(count: int, faulty: int) -> None:
    x = rows(count)
    contents = [
        RecordDict({"a": ArrayRecord([row.numpy()]), "m": MetricRecord({"row": k})})
        for k, row in enumerate(x)
    ]
    chosen = [content["m"]["row"] for content in select_multikrum(contents, faulty, count - faulty)]
    squares = torch.cdist(x.double(), x.double()).square()
    assert krum(squares, faulty) == sorted(chosen)  # type: ignore[type-var]
    old = aggregate_krum([([row.numpy()], 1) for row in x], faulty, count - faulty)
    np.testing.assert_allclose(
        mean_of(list(x), Robust("krum", faulty)), old[0], rtol=2e-5, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["median", "trimmed-mean", "krum"])
def test_hostile_rows_do_not_take_the_mean_with_them(kind: Kind) -> None:
    honest = rows(8)
    for bad in (torch.full((2, 50), 4e6), -10 * honest[:2], 100 * rows(2, seed=2)):
        found = mean_of([*honest, *bad], Robust(kind, 2))
        assert bool((found >= honest.min(0).values).all())
        assert bool((found <= honest.max(0).values).all())


@pytest.mark.parametrize("kind", ["trimmed-mean", "krum"])
def test_against_nobody_it_is_the_mean(kind: Kind) -> None:
    x = rows(6)
    torch.testing.assert_close(mean_of(list(x), Robust(kind, 0)), x.mean(0))


@pytest.mark.parametrize("kind", ["median", "trimmed-mean", "krum"])
def test_equal_rows_are_their_mean(kind: Kind) -> None:
    x = rows(1).expand(5, -1)
    torch.testing.assert_close(mean_of(list(x), Robust(kind, 1)), x[0])


def test_of_too_few_rows_the_middle_stays() -> None:
    x = rows(3)
    assert torch.equal(trimmed_mean(x, 7), median(x))
    assert torch.equal(mean_of([x[0]], Robust("krum", 2)), x[0])
    torch.testing.assert_close(mean_of([x[0], x[1]], Robust("trimmed-mean", 2)), x[:2].mean(0))


# --- on disk --------------------------------------------------------------------------------------


class Full(FileIO):
    """A disk with room for so many bytes."""

    room = 10**9

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


@pytest.mark.parametrize("room", [10**9, 500, 0])
@pytest.mark.parametrize("kind", ["median", "trimmed-mean", "krum"])
def test_rows_on_disk_in_any_order_are_as_those_in_memory(
    kind: Kind, room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robust, "BLOCK", 35)  # 7 numbers of 5 rows
    x, stats, rule = rows(5, 40), rows(5, 9, seed=2), Robust(kind, 1)
    with Full(tmp_path / "rows", "w+") as file:
        file.room = room
        found = Collected(rule, file)
        for k in (3, 0, 4, 1, 2):
            found.add({"x": x[k].clone(), "stats": stats[k].clone()}, k)
        result = found.result()
    assert list(result) == ["x", "stats"]
    torch.testing.assert_close(result["x"], mean_of(list(x), rule))
    if kind == "krum":
        kept = krum(torch.cdist(x.double(), x.double()).square(), 1)
        torch.testing.assert_close(result["stats"], stats[kept].mean(0))
    else:
        torch.testing.assert_close(result["stats"], mean_of(list(stats), rule))


# --- peers ----------------------------------------------------------------------------------------


def test_clipped_gossip_pulls_the_furthest_to_the_others_distance() -> None:
    """On a ring: the radius is the nearer neighbour's distance."""
    own = torch.zeros(3)
    theirs, weights = (
        {1: torch.tensor([3.0, 4.0, 0.0]), 2: torch.tensor([0.0, 0.0, 1e6])},
        {1: 1 / 3, 2: 1 / 3},
    )
    torch.testing.assert_close(clipped(own, theirs, weights, 1), torch.tensor([1.0, 4 / 3, 5 / 3]))


def test_clipped_gossip_is_its_equation() -> None:
    x, weights = rows(6).double(), {j: 0.05 * (j + 1) for j in range(1, 6)}
    theirs = {j: x[j] for j in range(1, 6)}
    lengths = {j: float(np.linalg.norm(x[j] - x[0])) for j in theirs}
    near = sorted(lengths, key=lambda j: lengths[j])[:-2]
    delta = sum(weights[j] for j in theirs if j not in near)
    tau = np.sqrt(sum(weights[j] * lengths[j] ** 2 for j in near) / delta)
    wanted = x[0].numpy() + sum(
        weights[j] * min(1, tau / lengths[j]) * (x[j] - x[0]).numpy() for j in theirs
    )
    np.testing.assert_allclose(clipped(x[0], theirs, weights, 2), wanted, rtol=1e-12)


def test_clipped_gossip_hears_nobody_where_all_it_hears_may_be_hostile() -> None:
    own = rows(1)[0]
    assert torch.equal(clipped(own, {1: own + 5}, {1: 0.5}, 1), own)
    assert torch.equal(clipped(own, {}, {}, 1), own)


def test_neighbourhood_without_hostile_ones_is_the_weighted_mean() -> None:
    x, weights = rows(3), {1: 0.2, 2: 0.3}
    wanted = 0.5 * x[0] + 0.2 * x[1] + 0.3 * x[2]
    torch.testing.assert_close(
        neighbourhood_mean(x[0], {1: x[1], 2: x[2]}, weights, Robust("clipped", 0)), wanted
    )
    torch.testing.assert_close(
        neighbourhood_mean(x[0], {1: x[1], 2: x[2]}, weights, Robust("median")), x.median(0).values
    )


# --- windows --------------------------------------------------------------------------------------


def update(site: int, delta: Tensor, staleness: int = 0) -> Update:
    return Update(delta, delta.new_empty(0), 0.1, staleness, site=site)


def test_fedbuff_without_hostile_sites_is_fedbuff() -> None:
    x, deltas = rows(1)[0], rows(6, seed=2)
    plain = fedbuff(eta=0.7, size=3, weight=constant)
    inner = fedbuff(eta=0.7, size=1, weight=constant)
    other = robust_window(
        inner, size=3, weight=constant, robust=Robust("trimmed-mean", 0), collect=True
    )
    state, robustly = plain.init(x), other.init(x)
    for k, delta in enumerate(deltas):
        state, robustly = (
            plain.absorb(state, update(k % 3, delta)),
            other.absorb(robustly, update(k % 3, delta)),
        )
        torch.testing.assert_close(robustly.x, state.x)
        assert robustly.version == state.version


def test_site_that_answers_more_often_has_no_more_to_say() -> None:
    x = torch.zeros(4)
    inner = fedbuff(eta=1.0, size=1, weight=constant)
    rule = robust_window(
        inner, size=3, weight=lambda age: 1 / (1 + age), robust=Robust("median"), collect=True
    )
    state = rule.init(x)
    for _ in range(9):
        state = rule.absorb(state, update(2, torch.full((4,), 1e6)))
    assert state.version == 0
    state = rule.absorb(state, update(0, torch.full((4,), 2.0), staleness=1))
    state = rule.absorb(state, update(1, torch.full((4,), 3.0)))
    assert torch.equal(state.x, torch.full((4,), -3.0))  # the middle one of 1, 3 and a million
    assert (state.version, state.sites) == (1, ())


def test_fedbuff_goes_on_where_a_site_is_gone() -> None:
    inner = fedbuff(eta=1.0, size=1, weight=constant)
    rule = robust_window(
        inner, size=4, weight=constant, robust=Robust("trimmed-mean", 1), collect=True
    )
    state = rule.init(torch.zeros(1))
    for site in (0, 1, 2, 0, 1, 2, 0, 1):  # not 3
        state = rule.absorb(state, update(site, torch.tensor([1.0 + site])))
    assert (state.version, float(state.x)) == (2, -4.0)


def test_window_forgets_who_is_gone_and_waits_for_a_majority() -> None:
    inner = fedbuff(eta=1.0, size=1, weight=constant)
    rule = robust_window(inner, size=4, weight=constant, robust=Robust("trimmed-mean", 1))
    state = rule.init(torch.zeros(1))
    moved = []
    for site, value in ((0, 1.0), (1, 2.0), (2, 30.0), (1, 4.0), (1, 5.0), (1, 5.0), (1, 5.0)):
        before = float(state.x)
        state = rule.absorb(state, update(site, torch.tensor([value])))
        moved.append(before - float(state.x))
    # Of {1, 2, 30} 2; of {1, 30, 4} 4; then the last four are of two sites, and of one.
    assert moved == pytest.approx([0, 0, 2, 4, 0, 0, 0])


# --- shares ---------------------------------------------------------------------------------------


def test_share_that_is_cut_goes_to_the_others_in_proportion() -> None:
    assert capped({1: 0.8, 2: 0.15, 3: 0.05}, 0.5) == pytest.approx({1: 0.5, 2: 0.375, 3: 0.125})
    # The second is over the limit when the first is cut.
    assert capped({1: 0.7, 2: 0.25, 3: 0.05}, 0.4) == pytest.approx({1: 0.4, 2: 0.4, 3: 0.2})
    assert capped({1: 0.9, 2: 0.1}, 0.2) == pytest.approx({1: 0.5, 2: 0.5})
    assert capped({1: 1.0}, 0.5) == {1: 1.0}


def test_cap_of_one_and_shares_below_it_change_nothing() -> None:
    shares = {1: 0.1 + 0.2, 2: 0.3, 3: 0.4}
    assert capped(shares, 1.0) == shares
    assert capped(shares, 0.5) == shares


# --- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "wrong"),
    [
        (
            {"strategy": "asgd", "robust.mean": "median"},
            "robust.mean = 'median': asgd takes one contribution at a time; allowed",
        ),
        (
            {"strategy": "gsgm", "gsgm.base": "dc-asgd-c", "robust.mean": "median"},
            "robust.mean = 'median': gsgm takes one",
        ),
        (
            {"strategy": "Krum", "robust.mean": "median"},
            "robust.mean = 'median': Krum is no mean of models; allowed: 'mean'",
        ),
        (
            {"strategy": "local", "robust.mean": "median"},
            "robust.mean = 'median': has no effect with strategy = 'local'",
        ),
        (
            {"strategy": "relaysgd", "topology.name": "path", "robust.mean": "clipped"},
            "relaysgd needs the sum of all that is sent",
        ),
        (
            {"strategy": "gradient-tracking", "robust.mean": "clipped"},
            "gradient-tracking needs the sum of all that is sent",
        ),
        (
            {"strategy": "dmsgd", "robust.mean": "krum"},
            "'krum': not with strategy = 'dmsgd'; allowed: 'mean', 'median', 'trimmed-mean'",
        ),
        (
            {"robust.mean": "clipped"},
            "robust.mean = 'clipped': not with strategy = 'co-learning'; allowed: 'mean', 'median'",
        ),
        (
            {
                "strategy": "d-psgd",
                "robust.mean": "clipped",
                "wire.codec": "qsgd",
                "wire.error-feedback": "choco",
            },
            "robust.mean = 'clipped': not with wire.error-feedback = 'choco'; allowed: 'none'",
        ),
        (
            {"robust.mean": "krum", "robust.faulty": 2},
            "num-sites = 5: robust.mean = 'krum' against robust.faulty = 2 needs at least 7",
        ),
        (
            {"robust.mean": "median", "num-sites": 2},
            "num-sites = 2: robust.mean = 'median' needs at least 3",
        ),
        (
            {"strategy": "gsgm", "robust.mean": "trimmed-mean", "gsgm.window": 2},
            (
                "gsgm.window = 2: robust.mean = 'trimmed-mean' against robust.faulty = 1 "
                "needs at least 3"
            ),
        ),
        (
            {"strategy": "fedbuff", "robust.mean": "median", "fedbuff.buffer-size": 6},
            (
                "fedbuff.buffer-size = 6: robust.mean = 'median' takes one contribution a site; "
                "at most num-sites, which is 5"
            ),
        ),
        (
            {"robust.mean": "median", "co-learning.weighting": "samples"},
            "co-learning.weighting = 'samples': has no effect with",
        ),
        (
            {"robust.max-share": 0.3},
            "robust.max-share = 0.3: has no effect with co-learning.weighting = 'equal'",
        ),
        (
            {"strategy": "gsgm", "robust.max-share": 0.3},
            "robust.max-share = 0.3: has no effect with strategy = 'gsgm'",
        ),
        (
            {"robust.faulty": 2},
            (
                "robust.faulty = 2: has no effect with robust.mean = 'mean'; "
                "only with trimmed-mean, krum, clipped"
            ),
        ),
        (
            {"robust.mean": "mode"},
            "robust.mean = 'mode': must be 'mean', 'median', 'trimmed-mean', 'krum' or 'clipped'",
        ),
        (
            {"strategy": "relaysgd", "topology.name": "path", "max-change": 4.0},
            "max-change = 4: has no effect with strategy",
        ),
    ],
)
def test_what_cannot_work_is_named(keys: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ConfigError) as error:
        Config.read(keys)
    assert wrong in str(error.value)


@pytest.mark.parametrize(
    ("topology", "mean", "faulty", "message"),
    [
        (
            "path",
            "clipped",
            1,
            (
                "topology.name = 'path': a peer has 1 neighbours; "
                "robust.mean = 'clipped' needs at least 2"
            ),
        ),
        (
            "ring",
            "trimmed-mean",
            2,
            "a peer has 2 neighbours; robust.mean = 'trimmed-mean' needs at least 4",
        ),
        ("matching", "median", 1, "robust.mean = 'median' needs at least 2"),
    ],
)
def test_graph_with_too_few_neighbours_is_named(
    topology: str, mean: str, faulty: int, message: str
) -> None:
    keys = {"strategy": "d-psgd", "num-sites": 6, "topology.name": topology, "robust.mean": mean}
    with pytest.raises(TopologyError, match=message):
        graph_of(Config.read(keys | ({"robust.faulty": faulty} if mean != "median" else {})))
