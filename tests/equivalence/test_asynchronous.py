"""Asynchronous rules: hand-computed states, limit cases, references, invariants.

And the white list under any order of arrival.
"""

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.asynchronous.adaptive import adaptive
from strategies.asynchronous.delayed_nesterov import delayed_nesterov
from strategies.asynchronous.descent import descent
from strategies.asynchronous.fedasync import fedasync
from strategies.asynchronous.fedbuff import fedbuff
from strategies.asynchronous.rule import BLOCK, ServerRule, constant, hinge, polynomial
from strategies.asynchronous.white_list import WhiteList
from tests.equivalence.arrivals import PLAIN, TOGETHER, close, follow, update, vector, walk

RULES: dict[str, Callable[[], ServerRule[Any]]] = {
    "asgd": lambda: descent(**PLAIN),
    "gsgm": lambda: descent(**PLAIN | {"beta": 0.9, "window": 3}),
    "dc-asgd-c": lambda: descent(**PLAIN | {"compensation": 0.04}),
    "dc-asgd-a": lambda: descent(**PLAIN | {"compensation": 2.0, "adaptive": True}),
    "gsgm-dc-a": lambda: descent(
        **PLAIN | {"beta": 0.9, "window": 3, "compensation": 2.0, "adaptive": True}
    ),
    "adam": lambda: adaptive(
        eta=0.01, beta=0.9, beta_2=0.999, window=2, weight=constant, correct=True
    ),
    "fedasync": lambda: fedasync(alpha=0.6, weight=polynomial(0.5)),
    "fedbuff": lambda: fedbuff(eta=1.0, size=2, weight=polynomial(0.5)),
    "delayed-nesterov": lambda: delayed_nesterov(eta=0.7, beta=0.9, period=3, share=0.3),
}


# --- hand-computed states -------------------------------------------------------------------------


def test_asgd_by_hand() -> None:
    rule = descent(**PLAIN | {"eta": 0.5, "weight": polynomial(1.0)})
    close(
        follow(
            rule,
            vector(10),
            [update(vector(2)), update(vector(4), staleness=1), update(vector(3), staleness=2)],
        ),
        [9, 8, 7.5],
    )


def test_gsgm_by_hand() -> None:
    """P = 2, beta = 1/2: g_hat = 4, 6, 5; v = 2, 4, 4.5."""
    rule = descent(**PLAIN | {"beta": 0.5, "window": 2})
    close(
        follow(rule, vector(10), [update(vector(4)), update(vector(8)), update(vector(2))]),
        [8, 4, -0.5],
    )


def test_dc_asgd_with_constant_lambda_by_hand() -> None:
    """Lr = 0.1, delta = 0.2, so G = 2; x - base = 3; G + 0.5 * 4 * 3 = 8."""
    rule = descent(**PLAIN | {"compensation": 0.5})
    close(follow(rule, vector(4), [update(vector(0.2), vector(1))]), [4 - 0.8])


def test_dc_asgd_with_adaptive_lambda_by_hand() -> None:
    """M = 0.05 * 4 = 0.2, then 0.95 * 0.2 + 0.05 * 1 = 0.24."""
    rule = descent(**PLAIN | {"compensation": 2.0, "adaptive": True})
    first = 4 - 0.1 * (2 + 2 / math.sqrt(0.2 + 1e-7) * 4 * (4 - 1))
    second = first - 0.1 * (1 + 2 / math.sqrt(0.24 + 1e-7) * (first - 2))
    close(
        follow(rule, vector(4), [update(vector(0.2), vector(1)), update(vector(0.1), vector(2))]),
        [first, second],
    )


def test_adaptive_lambda_of_a_gradient_that_was_hardly_there_by_hand() -> None:
    """M = 0.05 * 0.0004 = 2e-5, which leaves 1e-7 a say only beside it, under the root."""
    rule = descent(**PLAIN | {"compensation": 2.0, "adaptive": True})
    g = 0.02
    found = follow(rule, vector(4), [update(vector(0.1 * g), vector(1))])
    expected = 4 - 0.1 * (g + 2 / math.sqrt(0.05 * g**2 + 1e-7) * g**2 * (4 - 1))
    torch.testing.assert_close(found[0], vector(expected), rtol=1e-9, atol=0)


def test_adam_averages_what_there_is_by_hand() -> None:
    """P = 2, delta = lr G: the mean of the first is itself, 3; of both 3 and 1, 2.

    beta = beta_2 = 1/2, corrected for the start.
    """
    rule = adaptive(eta=1.0, beta=0.5, beta_2=0.5, window=2, weight=constant, correct=True)
    m, u = 0.5 * 1.5 + 0.5 * 2, 0.5 * 4.5 + 0.5 * 4
    second = 10 - 1 - (m / 0.75) / math.sqrt(u / 0.75)
    close(follow(rule, vector(10), [update(vector(0.3)), update(vector(0.1))]), [10 - 1, second])


def test_window_averages_what_there_is_by_hand() -> None:
    """P = 3: 6; (6 + 0) / 2; (6 + 0 + 3) / 3; (0 + 3 + 3) / 3."""
    rule = descent(**PLAIN | {"window": 3})
    close(follow(rule, vector(20), [update(vector(each)) for each in (6, 0, 3, 3)]), [14, 11, 8, 6])


def test_fedasync_by_hand() -> None:
    """The site's model is base - delta = 6, then 2 with weight 1/2."""
    rule = fedasync(alpha=0.5, weight=polynomial(1.0))
    close(
        follow(
            rule,
            vector(10),
            [update(vector(4), vector(10)), update(vector(8), vector(10), staleness=1)],
        ),
        [8, 6.5],
    )
    assert rule.absorb(rule.init(vector(10)), update(vector(4))).version == 1


def test_fedbuff_by_hand() -> None:
    """Nothing, then (2 + 4 / 2) / 2 times 3."""
    rule = fedbuff(eta=3.0, size=2, weight=polynomial(1.0))
    updates = [
        update(vector(2)),
        update(vector(4), staleness=1),
        update(vector(7)),
        update(vector(1)),
    ]
    close(follow(rule, vector(10), updates), [10, 4, 4, -8])
    state = rule.init(vector(10))
    versions = []
    for each in updates:
        state = rule.absorb(state, each)
        versions.append(state.version)
    assert versions == [0, 1, 1, 2]


def test_weights_by_staleness_by_hand() -> None:
    assert [constant(tau) for tau in (0, 9)] == [1, 1]
    assert [polynomial(0.5)(tau) for tau in (0, 3, 8)] == [1, 1 / 2, 1 / 3]
    assert [hinge(10, 4)(tau) for tau in (0, 4, 5, 7)] == [1, 1, 1 / 11, 1 / 31]


# --- several updates of a site as one contribution ------------------------------------------------


def test_each_part_is_weighted_by_its_own_age_by_hand() -> None:
    """0.4 / 4, 0.2 / 2 and -0.1, and of these the mean."""
    close(
        follow(descent(**PLAIN | {"weight": polynomial(1.0)}), vector(5), [TOGETHER]), [5 - 0.1 / 3]
    )
    close(
        follow(fedbuff(eta=1.0, size=1, weight=polynomial(1.0)), vector(5), [TOGETHER]),
        [5 - 0.1 / 3],
    )


def test_each_part_is_compensated_against_its_own_base_by_hand() -> None:
    """Delta + lambda / lr delta^2 (x - base) with lambda = 1/2."""
    terms = [0.4 + 5 * 0.16 * (5 - 1), 0.2 + 2.5 * 0.04 * (5 - 2), -0.1 + 5 * 0.01 * (5 - 3)]
    close(
        follow(descent(**PLAIN | {"compensation": 0.5}), vector(5), [TOGETHER]),
        [5 - sum(terms) / 3],
    )
    windowed = follow(descent(**PLAIN | {"compensation": 0.5, "window": 2}), vector(5), [TOGETHER])
    close(windowed, [5 - sum(terms) / 3])


def test_parts_are_one_in_the_window_by_hand() -> None:
    """P = 2: the mean of the parts is 1/6, then (1/6 + 3) / 2."""
    rule = descent(**PLAIN | {"window": 2})
    close(
        follow(rule, vector(5), [TOGETHER, update(vector(3))]),
        [5 - 0.5 / 3, 5 - 0.5 / 3 - (0.5 / 3 + 3) / 2],
    )
    assert rule.absorb(rule.init(vector(5)), TOGETHER).version == 1


def test_adam_is_fed_the_mean_gradient_of_the_parts() -> None:
    """4, 1 and -1: as one update with the gradient 4/3."""
    rule = adaptive(eta=0.1, beta=0.9, beta_2=0.99, window=2, weight=constant, correct=False)
    both = [update(vector(2)), TOGETHER], [update(vector(2)), update(vector(0.4 / 3), lr=0.1)]
    torch.testing.assert_close(*(follow(rule, vector(5), updates)[-1] for updates in both))


def test_fedasync_goes_towards_the_mean_of_the_models_made_by_hand() -> None:
    """These are 0.6, 1.8 and 3.1, with the rates 1/2 times 1/4, 1/2 and 1, a third each."""
    rates = [0.5 / 4 / 3, 0.5 / 2 / 3, 0.5 / 3]
    expected = 5 * (1 - sum(rates)) + sum(
        rate * made for rate, made in zip(rates, (0.6, 1.8, 3.1), strict=True)
    )
    close(follow(fedasync(alpha=0.5, weight=polynomial(1.0)), vector(5), [TOGETHER]), [expected])
    alone = follow(fedasync(alpha=1.0, weight=constant), vector(5), [TOGETHER])
    close(alone, [(0.6 + 1.8 + 3.1) / 3])


# Not of an adaptive lambda: its square decays with every gradient.
@pytest.mark.parametrize("name", [name for name in RULES if name not in ("dc-asgd-a", "gsgm-dc-a")])
def test_equal_parts_are_as_one(name: str) -> None:
    one, x = update(vector(0.1, -0.2), vector(1, 2), staleness=2), vector(1, 3)
    many = one._replace(earlier=(one, one))
    torch.testing.assert_close(
        *(follow(RULES[name](), x, [each, each])[-1] for each in (one, many))
    )


# --- limit cases and references -------------------------------------------------------------------


@pytest.mark.parametrize("switch", [{"weight": polynomial(0)}, {"weight": hinge(10, 99)}])
def test_switches_off_is_asgd_bit_for_bit(switch: dict[str, Any]) -> None:
    x = torch.ones(5, dtype=torch.float64)
    asgd, same = (follow(rule, x, walk(1)) for rule in (RULES["asgd"](), descent(**PLAIN | switch)))
    assert all(torch.equal(a, b) for a, b in zip(asgd, same, strict=True))


@pytest.mark.parametrize(
    "switch",
    [
        {"beta": 0.5},
        {"window": 2},
        {"compensation": 0.5},
        {"weight": polynomial(0.5)},
        {"eta": 0.5},
    ],
)
def test_every_switch_switches_something(switch: dict[str, Any]) -> None:
    x = torch.ones(5, dtype=torch.float64)
    asgd, other = (
        follow(rule, x, walk(1)) for rule in (RULES["asgd"](), descent(**PLAIN | switch))
    )
    assert not torch.allclose(asgd[-1], other[-1])


def test_one_site_is_sgd_with_damped_momentum() -> None:
    """Torch's momentum with dampening, from its second step on.

    Its first is not damped, so start both with a zero gradient.
    """
    curvature, lr = vector(1, 3, 0.5), 0.2
    x = torch.nn.Parameter(vector(1, -2, 3))
    reference = torch.optim.SGD([x], lr, momentum=0.8, dampening=0.8)
    state = (rule := descent(**PLAIN | {"beta": 0.8})).init(x.detach())
    for step in range(20):
        x.grad = curvature * x.detach() * (step > 0)
        reference.step()
        state = rule.absorb(state, update(lr * curvature * state.x * (step > 0), lr=lr))
        torch.testing.assert_close(state.x, x.detach())


@pytest.mark.parametrize("name", ["adam", "rmsprop"])
def test_one_site_is_torchs_own_adaptive_optimizer(name: str) -> None:
    curvature, x = vector(1, 3, 0.5), torch.nn.Parameter(vector(1, -2, 3))
    if name == "adam":
        reference: torch.optim.Optimizer = torch.optim.Adam([x], 0.01)
        rule = adaptive(eta=0.01, beta=0.9, beta_2=0.999, window=1, weight=constant, correct=True)
    else:
        reference = torch.optim.RMSprop([x], 0.01)
        rule = adaptive(eta=0.01, beta=0.0, beta_2=0.99, window=1, weight=constant, correct=False)
    state = rule.init(x.detach())
    for number in range(20):
        x.grad = curvature * x.detach()
        reference.step()
        # The site's rate: what arrives counts by its gradient, whatever the site's own step was.
        lr = 0.2 / (1 + number)
        state = rule.absorb(state, update(lr * curvature * state.x, lr=lr))
        torch.testing.assert_close(state.x, x.detach())


def test_buffer_of_all_sites_without_staleness_is_model_averaging() -> None:
    x, models = vector(1, 2), [vector(3, 4), vector(-1, 0), vector(2, 2)]
    rule = fedbuff(eta=1.0, size=3, weight=polynomial(0.5))
    found = follow(rule, x, [update(x - model, x) for model in models])[-1]
    torch.testing.assert_close(found, torch.stack(models).mean(0))


def test_fedasync_with_alpha_one_keeps_the_newest_model() -> None:
    rule = fedasync(alpha=1.0, weight=constant)
    found = follow(rule, vector(5), [update(vector(3), vector(4)), update(vector(-1), vector(8))])
    torch.testing.assert_close(found[-1], vector(9))


@pytest.mark.parametrize(
    "switch", [{}, {"beta": 0.9}, {"window": 3}, {"beta": 0.9, "window": 3, "eta": 0.5}]
)
def test_total_weight_of_an_update_is_eta(switch: dict[str, Any]) -> None:
    """However it is spread over time by window and momentum."""
    nothing = update(vector(0.0))
    rule = descent(**PLAIN | switch)
    end = follow(rule, vector(0), [nothing] * 5 + [update(vector(1.0))] + [nothing] * 300)[-1]
    torch.testing.assert_close(end, vector(-switch.get("eta", 1.0)))


# --- what holds for every rule --------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_updates_and_the_initial_model_are_never_written(name: str) -> None:
    x = torch.ones(5, dtype=torch.float64)
    updates = walk(2)
    before = [each._replace(delta=each.delta.clone(), base=each.base.clone()) for each in updates]
    follow(RULES[name](), x, updates)
    assert torch.equal(x, torch.ones(5, dtype=torch.float64))
    for one, two in zip(updates, before, strict=True):
        assert torch.equal(one.delta, two.delta)
        assert torch.equal(one.base, two.base)


@pytest.mark.parametrize("name", RULES)
def test_rules_that_look_at_what_a_site_was_sent_say_so(name: str) -> None:
    """Others are given nothing in its place, and do the same."""
    rule, x, updates = RULES[name](), torch.ones(5, dtype=torch.float64), walk(4)
    without = [each._replace(base=each.base[:0]) for each in updates]
    if rule.based:
        with pytest.raises((RuntimeError, ValueError)):
            follow(rule, x, without)
    else:
        assert torch.equal(
            torch.stack(follow(rule, x, without)), torch.stack(follow(rule, x, updates))
        )


@pytest.mark.parametrize("name", RULES)
def test_coordinates_do_not_mix_and_blocks_do_not_show(name: str) -> None:
    """A vector longer than a block, against each of its ends alone."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(BLOCK + 7, generator=generator)
    draws = torch.randn(4, 2, BLOCK + 7, generator=generator)
    updates = [update(delta, base, staleness=step) for step, (delta, base) in enumerate(draws)]
    whole = follow(RULES[name](), x, updates)[-1]
    for part in (slice(0, 5), slice(BLOCK - 3, BLOCK + 7)):
        parts = [each._replace(delta=each.delta[part], base=each.base[part]) for each in updates]
        torch.testing.assert_close(whole[part], follow(RULES[name](), x[part], parts)[-1])


@pytest.mark.parametrize("name", RULES)
def test_sites_that_found_nothing_to_change_change_nothing(name: str) -> None:
    x = torch.ones(5, dtype=torch.float64)
    assert torch.equal(follow(RULES[name](), x, [update(torch.zeros_like(x), x)] * 4)[-1], x)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(RULES)), st.integers(0, 10_000), st.sampled_from([1e-3, 1.0, 1e3]))
def test_no_coordinate_moves_further_than_the_rule_says(name: str, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rule, x, delta, lr = RULES[name](), 0.0, 0.0, math.inf
    state = rule.init(torch.randn(7, generator=generator, dtype=torch.float64))
    for step in range(12):
        vectors = torch.randn(2, 7, generator=generator, dtype=torch.float64)
        size = scale * 10 ** float(torch.rand(1, generator=generator) * 4 - 2)
        base = state.x.clone() if step % 2 else vectors[1]
        part = update(
            size * vectors[0].sign() if step % 3 else size * vectors[0],
            base,
            0.05 + 0.1 * (step % 2),
            step % 4,
        )
        before = state.x.clone()
        x = max(x, float(before.abs().max()), float(base.abs().max()))
        delta, lr = max(delta, float(part.delta.abs().max())), min(lr, part.lr)
        state = rule.absorb(state, part)
        assert float((state.x - before).abs().max()) <= rule.reach(x, delta, lr) * (1 + 1e-9)


def test_reach_is_no_wild_guess() -> None:
    """Of what an ordinary run does, it is at most some ten times what happens."""
    for name in RULES:
        assert 0 < RULES[name]().reach(1.0, 0.01, 0.05) < 2, name


def test_adam_comes_as_far_as_it_may_on_gradients_that_shrink() -> None:
    """By beta_2 / beta from one to the next, where Cauchy-Schwarz is an equality."""
    rule = adaptive(eta=1.0, beta=0.9, beta_2=0.85, window=1, weight=constant, correct=False)
    updates = [update(vector((0.85 / 0.9) ** step), lr=1.0) for step in range(150)]
    *_, before, last = follow(rule, vector(0), updates)
    found = float((last - before).abs())
    assert found == pytest.approx(rule.reach(0.0, 1.0, 1.0), rel=1e-3)


def test_adam_reaches_any_distance_where_its_second_moment_forgets_first_or_overflows() -> None:
    assert (
        adaptive(eta=1.0, beta=0.9, beta_2=0.8, window=1, weight=constant, correct=True).reach(
            1, 1, 1
        )
        == math.inf
    )
    assert RULES["adam"]().reach(1.0, 1.0, 1e-20) == math.inf


# --- the white list -------------------------------------------------------------------------------


def play(
    num_sites: int, slack: float, seed: int, arrivals: int
) -> tuple[list[int], list[int], list[int]]:
    """Sites that wait for their turn, arriving in any order.

    It returns the applied sites, their staleness, and the spread of the counts after each.
    """
    choices = random.Random(seed)
    white_list = WhiteList(range(num_sites), slack)
    sent = dict.fromkeys(range(num_sites), 0)  # version of the model under way
    working = list(range(num_sites))
    order: list[int] = []
    staleness: list[int] = []
    spread: list[int] = []
    for _ in range(arrivals):
        site = working.pop(choices.randrange(len(working)))
        for released in white_list.arrive(site):
            staleness.append(len(order) - sent[released])
            order.append(released)
            spread.append(max(white_list.counts.values()) - min(white_list.counts.values()))
            sent[released] = len(order)
            working.append(released)
    return order, staleness, spread


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 9), st.integers(0, 3), st.integers(0, 10_000))
def test_counts_never_differ_by_more_than_one_plus_slack(
    num_sites: int, slack: int, seed: int
) -> None:
    order, staleness, spread = play(num_sites, slack, seed, 60)
    assert max(spread, default=0) <= 1 + slack
    assert len(order) >= 60 - num_sites
    if slack == 0:
        assert max(staleness, default=0) <= 2 * (num_sites - 1)


def test_every_cycle_of_the_strict_list_holds_each_site_once() -> None:
    order, _, _ = play(6, 0, 1, 100)
    for start in range(0, len(order) - 6, 6):
        assert sorted(order[start : start + 6]) == list(range(6))


def test_infinite_slack_applies_everything_on_arrival() -> None:
    white_list = WhiteList(range(3), math.inf)
    assert [white_list.arrive(site) for site in (0, 0, 0, 2)] == [[0], [0], [0], [2]]


def test_nobody_makes_up_for_a_time_in_which_all_were_away() -> None:
    listed = WhiteList(range(3), 0.0)
    listed.set_aside(0)
    for _ in range(100):
        assert [*listed.arrive(1), *listed.arrive(2)] == [1, 2]
    listed.set_aside(1)
    listed.set_aside(2)
    assert [listed.arrive(site) for site in (0, 1, 2)] == [[0], [1], [2]]
    assert max(listed.counts.values()) - min(listed.counts.values()) <= 1


def test_list_by_hand() -> None:
    white_list = WhiteList("abc", 0)
    assert white_list.arrive("a") == ["a"]
    assert white_list.arrive("a") == []
    assert white_list.waits("a")
    assert white_list.arrive("b") == ["b"]
    assert white_list.arrive("b") == []
    # The cycle closes; who waited is next, in the order of arrival.
    assert white_list.arrive("c") == ["c", "a", "b"]


def test_site_that_was_ahead_when_it_was_set_aside_is_still_ahead_when_it_is_back() -> None:
    white_list = WhiteList("abc", 1)
    assert [white_list.arrive("a"), white_list.arrive("a")] == [["a"], ["a"]]
    white_list.set_aside("a")
    assert white_list.arrive("b") == ["b"]
    assert white_list.arrive("a") == []  # it has two, c has none
    assert white_list.arrive("c") == ["c", "a"]


def test_list_is_even_when_all_active_sites_contributed() -> None:
    white_list = WhiteList("abc", 0)
    assert white_list.even
    seen = []
    for site in "abc":
        white_list.arrive(site)
        seen.append(white_list.even)
    assert seen == [False, False, True]
    white_list.arrive("a")
    white_list.arrive("b")
    assert not white_list.even
    white_list.set_aside("c")
    assert white_list.even


def test_site_set_aside_is_not_waited_for_and_comes_back_level_with_the_others() -> None:
    white_list = WhiteList("abc", 0)
    for _ in range(3):
        for site in "ab":
            white_list.arrive(site)
    assert white_list.counts == {"a": 1, "b": 1, "c": 0}
    assert white_list.set_aside("c") == ["a", "b"]
    for site in "abab":
        assert white_list.arrive(site) == [site]
    assert white_list.counts == {"a": 4, "b": 4, "c": 0}
    assert white_list.arrive("c") == ["c"]
    assert white_list.counts["c"] == 5
    assert white_list.arrive("c") == []
