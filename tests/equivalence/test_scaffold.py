"""SCAFFOLD: against a straightforward implementation, its limits, and what it is for."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from configuration.config import configuration
from simulation.laboratory import Run, simulate
from strategies.averaging import scaffold
from strategies.method import Mean, Method, RoundPlan
from strategies.method import Run as Settings

N, D, K, LR = 4, 3, 5, 0.1
GENERATOR = np.random.default_rng(3)
H = GENERATOR.uniform(0.5, 2, (N, D))  # each site's quadratic: sum H (x - B)^2 / 2
B = GENERATOR.normal(size=(N, D))


def by_plan(strategy: str, rounds: int, sites: range = range(N)) -> tuple[Tensor, list[Tensor]]:
    """The server's models after each round, by the public name."""
    plan = configuration(strategy=strategy, num_sites=N).plan
    assert isinstance(plan, RoundPlan)
    state = plan.init(torch.zeros(D, dtype=torch.float64))
    rule = plan.site
    memories = [rule.init(state.x) if rule else None for _ in range(N)]
    traced = []
    for _ in range(rounds):
        replies = []
        sent = {"x": state.x, **plan.beside(state)}
        for site in sites:
            y = state.x.clone()
            for _ in range(K):
                gradient = torch.from_numpy(H[site] * (y.numpy() - B[site]))
                y = y - LR * (rule.correct(memories[site], sent, gradient) if rule else gradient)
            made = {"x": y}
            if rule:
                memories[site], beside = rule.finish(memories[site], sent, y, K * LR)
                made |= beside
            replies.append(made)
        mean = {
            name: torch.stack([reply[name] for reply in replies]).mean(0) for name in replies[0]
        }
        state = plan.absorb(state, Mean(mean, len(sites) / N))
        traced.append(state.x.clone())
    return torch.stack(traced), [memory.c for memory in memories if memory is not None]


def by_hand(rounds: int, sites: range = range(N)) -> NDArray[np.float64]:
    """Algorithm 1 of the paper, option II, with all local steps at one rate."""
    x, c, ci = np.zeros(D), np.zeros(D), np.zeros((N, D))
    traced = []
    for _ in range(rounds):
        ys, new = {}, ci.copy()
        for i in sites:
            y = x.copy()
            for _ in range(K):
                y -= LR * (H[i] * (y - B[i]) - ci[i] + c)
            ys[i] = y
            new[i] = ci[i] - c + (x - y) / (K * LR)
        x = x + np.mean([ys[i] - x for i in sites], 0)
        c = c + np.sum([new[i] - ci[i] for i in sites], 0) / N
        ci = new
        traced.append(x)
    return np.stack(traced)


@pytest.mark.parametrize("sites", [range(N), range(1, 3)], ids=["all", "two of four"])
def test_it_is_algorithm_1(sites: range) -> None:
    ours, _ = by_plan("scaffold", 6, sites)
    np.testing.assert_allclose(ours.numpy(), by_hand(6, sites), rtol=1e-10, atol=1e-12)


def test_it_reaches_the_common_optimum_that_fedavg_misses() -> None:
    best = (H * B).sum(0) / H.sum(0)
    (ours, memories), (fedavg, _) = by_plan("scaffold", 400), by_plan("fedavg", 400)
    np.testing.assert_allclose(ours[-1].numpy(), best, atol=1e-8)
    assert np.abs(fedavg[-1].numpy() - best).max() > 1e-2
    # At the optimum each variate is its site's gradient.
    for memory, h, b in zip(memories, H, B, strict=True):
        np.testing.assert_allclose(memory.numpy(), h * (best - b), atol=1e-7)


def test_first_round_is_fedavg() -> None:
    assert torch.equal(by_plan("scaffold", 1)[0], by_plan("fedavg", 1)[0])


def run(strategy: str, rounds: int, **changes: Any) -> Run:
    settings: dict[str, Any] = {
        "num_sites": 3,
        "epochs": rounds,
        "model": {"name": "mlp"},
        strategy: {"local_epochs": 1},
    }
    skewed = {"kind": "classes", "classes_per_site": 4}
    return simulate(strategy=strategy, partition=skewed, progress=False, **settings, **changes)


def test_first_round_of_the_app_is_fedavg_without_momentum_and_the_second_is_not() -> None:
    for rounds, equal in ((1, True), (2, False)):
        ours = run("scaffold", rounds)
        theirs = run("fedavg", rounds, training={"momentum": 0.0})
        assert (
            all(torch.equal(ours.model[name], value) for name, value in theirs.model.items())
            == equal
        )


def test_both_vectors_cross_the_wire() -> None:
    """Twice the bytes of FedAvg in training, the same in tests."""
    ours, theirs = run("scaffold", 2), run("fedavg", 2)
    model = 4 * sum(value.numel() for value in ours.model.values())
    more = {
        way: (ours.history[f"bytes_{way}"] - theirs.history[f"bytes_{way}"]).iloc[-1]
        for way in ("up", "down")
    }
    assert more["up"] / (3 * 2 * model) == pytest.approx(1, abs=0.02)
    assert more["down"] / (3 * 2 * model) == pytest.approx(1, abs=0.02)


def elsewhere(keys: scaffold.Keys, run: Settings) -> RoundPlan[scaffold.Server]:
    """SCAFFOLD whose correction is a new vector, not written in place."""
    found = scaffold.plan(keys, run)
    assert found.site is not None
    return found._replace(
        site=found.site._replace(correct=lambda memory, sent, g: g - memory.c + sent["c"])
    )


ELSEWHERE = Method("elsewhere", scaffold.Keys, elsewhere, scaffold.METHOD.unused)


def test_a_correction_may_be_a_new_vector() -> None:
    ours = run("scaffold", 2)
    settings: dict[str, Any] = {
        "num_sites": 3,
        "epochs": 2,
        "model": {"name": "mlp"},
        "elsewhere": {"local_epochs": 1},
    }
    skewed = {"kind": "classes", "classes_per_site": 4}
    theirs = simulate(
        strategy=f"{__name__}:ELSEWHERE", partition=skewed, progress=False, **settings
    )
    assert all(torch.equal(ours.model[name], value) for name, value in theirs.model.items())
