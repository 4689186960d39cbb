"""Delayed Nesterov: by hand, its special cases, and local steps by speed on made-up sites."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict

from configuration.config import Config, configuration
from configuration.errors import ConfigError
from strategies.asynchronous.delayed_nesterov import delayed_nesterov
from strategies.asynchronous.descent import descent
from strategies.method import ArrivalPlan
from strategies.protocol import read_order
from strategies.records import config_of, pack, unpack
from tests.app.stubs import NETWORK, TRAIN, Answer, Outcome, outcome
from tests.equivalence.arrivals import PLAIN as ASGD
from tests.equivalence.arrivals import TOGETHER, close, follow, update, vector, walk


def test_by_hand() -> None:
    """N = 2, c = 1/4, beta = 1/2, eta = 1.

    m = 0, then (4 + 2) / 2 = 3, then 3/2 + (8 + 0) / 2 = 5.5.
    10 - 4/2 = 8; 8 - (3/4 * 3/2 + 2/2) = 5.875; 5.875 - (1/4 * 3/2 + 8/2) = 1.5;
    1.5 - (3/4 * 5.5/2 + 0) = -0.5625.
    """
    rule = delayed_nesterov(eta=1.0, beta=0.5, period=2, share=0.5)
    close(
        follow(rule, vector(10), [update(vector(each)) for each in (4, 2, 8, 0)]),
        [8, 5.875, 1.5, -0.5625],
    )
    assert rule.absorb(rule.init(vector(10)), update(vector(1))).version == 1


def test_method_by_its_name_follows_its_keys() -> None:
    """The values by hand, from the public configuration."""
    keys = {"server_lr": 0.5, "momentum": 0.5, "period": 2, "share": 0.5}
    plan = configuration(strategy="delayed-nesterov", delayed_nesterov=keys).plan
    assert isinstance(plan, ArrivalPlan)
    found = follow(plan.rule, vector(10), [update(vector(each)) for each in (4, 2, 8, 0)])
    close(found, [9, 10 - 4.125 / 2, 10 - 8.5 / 2, 10 - 10.5625 / 2])


def test_takes_the_mean_of_the_parts() -> None:
    rule = delayed_nesterov(eta=1.0, beta=0.5, period=2, share=0.5)
    mean = update(vector(0.5 / 3))
    one, other = (
        follow(rule, vector(5), [update(vector(2)), each, update(vector(1))])
        for each in (TOGETHER, mean)
    )
    torch.testing.assert_close(one, other)


def test_without_delay_is_torchs_nesterov() -> None:
    """On what the site moved, as in DiLoCo."""
    x = torch.nn.Parameter(vector(1, -2, 3))
    reference = torch.optim.SGD([x], 0.7, momentum=0.9, nesterov=True)
    state = (rule := delayed_nesterov(eta=0.7, beta=0.9, period=1, share=0.6)).init(x.detach())
    for step in range(20):
        moved = vector(0.1, 0.3, 0.05) * x.detach() + 0.01 * step
        x.grad = moved.clone()
        reference.step()
        state = rule.absorb(state, update(moved))
        torch.testing.assert_close(state.x, x.detach())


def test_without_momentum_is_asgd_with_a_part_of_the_rate() -> None:
    x = torch.ones(5, dtype=torch.float64)
    delayed = follow(delayed_nesterov(eta=0.6, beta=0.0, period=3, share=0.6), x, walk(1))
    asgd = follow(descent(**ASGD | {"eta": 0.2}), x, walk(1))
    torch.testing.assert_close(delayed, asgd)


# --- local steps by speed -------------------------------------------------------------------------


def ordered_steps(message: Message) -> int:
    local = read_order(config_of(message)).local
    assert local is not None
    return local.steps


def paced(*of_sites: float) -> Callable[[int, Message], float]:
    """So many seconds a batch."""

    def taken(site: int, message: Message) -> float:
        local = (
            read_order(config_of(message)).local
            if message.metadata.message_type == "train"
            else None
        )
        return local.steps * of_sites[site] if local else 1e-3

    return taken


def watched_steps(config: Config, *paces: float) -> tuple[Outcome, dict[int, list[int]]]:
    steps: dict[int, list[int]] = {site: [] for site in range(config.num_sites)}

    def look(site: int, message: Message, content: RecordDict) -> Answer:
        if message.metadata.message_type == "train":
            local = read_order(config_of(message)).local
            assert local is not None
            steps[site].append(local.steps)
        return content

    return outcome(config, look, seconds=paced(*paces)), steps


def speeds(**keys: Any) -> Config:
    common: dict[str, Any] = {
        "model": {"name": NETWORK},
        "training": {"lr_ratio": 1.0, "batch_size": 1},
    }
    return configuration(
        strategy="delayed-nesterov", num_sites=3, epochs=24, delayed_nesterov=keys, **common
    )


def test_sites_take_local_steps_in_proportion_to_their_speed() -> None:
    """8, then floor(8 / 1.9) and floor(8 / 20), at least one."""
    found, steps = watched_steps(speeds(local_steps=8, by_speed=True), 1.0, 1.9, 20.0)
    assert found.error is None
    assert [set(steps[site][:1]) for site in range(3)] == [{8}, {8}, {8}]
    assert [set(steps[site][2:-1]) for site in range(3)] == [{8}, {4}, {1}]


def test_sites_that_are_equally_fast_take_the_same_steps() -> None:
    """Their speeds differ in the last digits, as times are rounded."""
    _, steps = watched_steps(speeds(local_steps=8, by_speed=True), 1.0, 1.0, 1.0)
    assert {each for of_site in steps.values() for each in of_site} == {8}


def test_site_far_faster_than_most_is_no_measure_for_them() -> None:
    """20 batches by a tenth, not by a twentieth."""
    _, steps = watched_steps(speeds(local_steps=20, by_speed=True), 0.05, 1.0, 1.0)
    assert steps[1] == steps[2] == [20, *[2] * (len(steps[1]) - 1)]
    assert len(steps[1]) > 1


def test_speed_of_a_site_that_is_refused_slows_nobody_down() -> None:
    """The first site answers at once, a model far away."""
    steps: list[int] = []

    def spoil(site: int, message: Message, content: RecordDict) -> Answer:
        if message.metadata.message_type != "train":
            return content
        if site:
            steps.append(ordered_steps(message))
            return content
        far = {name: unpack(array) * 1e4 for name, array in content.array_records["arrays"].items()}
        return RecordDict({**content, "arrays": pack(far)})

    found = outcome(speeds(local_steps=8, by_speed=True), spoil, seconds=paced(1e-3, 1.0, 1.0))
    assert found.refused
    assert set(steps[:-2]) == {8}


def test_epochs_are_what_was_asked_for_however_many_steps_a_contribution_takes() -> None:
    found, steps = watched_steps(speeds(local_steps=8, by_speed=True), 1.0, 1.9, 20.0)
    applied = (
        found.metrics.query("metric == 'updates' and split == 'train' and site != 'all'")
        .groupby("site")["value"]
        .sum()
    )
    taken = sum(sum(steps[int(str(site))][: int(count)]) for site, count in applied.items())
    assert 24 * TRAIN * 3 <= taken < 24 * TRAIN * 3 + 8
    rows = found.metrics.query("metric == 'local-epochs'")["value"]
    assert rows.sum() == pytest.approx(taken / (3 * TRAIN))


def test_all_take_the_same_steps_where_speed_does_not_count() -> None:
    found, steps = watched_steps(speeds(local_steps=8), 1.0, 1.9, 20.0)
    assert found.error is None
    assert {each for of_site in steps.values() for each in of_site} == {8}


def test_rate_falls_with_the_work_that_is_done_not_with_arrivals() -> None:
    """Each order begins in the cycle where the epochs done end, and ends its own steps later."""
    cycles: list[tuple[float, float, int]] = []

    def look(site: int, message: Message, content: RecordDict) -> Answer:
        if message.metadata.message_type == "train":
            local = read_order(config_of(message)).local
            assert local is not None
            cycles.append((*local.cycle, local.steps))
        return content

    outcome(speeds(local_steps=8, by_speed=True), look, seconds=paced(1.0, 1.9, 20.0))
    total = 24 * TRAIN * 3
    assert all(
        stop == pytest.approx(min(1.0, start + steps / total)) for start, stop, steps in cycles
    )
    assert [start for start, _, _ in cycles] == sorted(start for start, _, _ in cycles)


def test_share_of_the_momentum_is_at_most_all() -> None:
    with pytest.raises(
        ConfigError, match=r"delayed-nesterov\.share = 1.5: must be less than or equal to 1"
    ):
        speeds(share=1.5)
