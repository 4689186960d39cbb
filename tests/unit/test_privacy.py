"""Clipping and noise of what leaves a site, and the account of it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from dp_accounting import dp_event, pld
from flwr.app import Context, RecordDict

from client_app.privacy import Account, BudgetError, Noise

SIZE = 200_000


def noise(folder: Path, clip_norm: float = 3.0, multiplier: float = 0.5, budget: float = math.inf, seed: int = 7) -> Noise:
    return Noise(clip_norm, multiplier, Account(folder, 1e-5), budget, seed)


def test_an_update_is_clipped_as_one_vector_and_gets_noise(tmp_path: Path) -> None:
    vectors = [torch.full((SIZE,), 5.0), torch.full((3,), -7.0)]
    norm = float(torch.cat(vectors).norm())
    first, second = noise(tmp_path)(vectors)
    off = torch.cat([first, second]) - torch.cat(vectors) * 3.0 / norm
    error = 1.5 / math.sqrt(2 * SIZE)  # of a standard deviation
    assert abs(float(off.std()) - 1.5) < 4 * error
    assert abs(float(off.mean())) < 4 * 1.5 / math.sqrt(SIZE)


def test_a_short_update_is_not_stretched(tmp_path: Path) -> None:
    [found] = noise(tmp_path, multiplier=1e-6)([torch.tensor([1.0, 2.0])])
    assert torch.allclose(found, torch.tensor([1.0, 2.0]), atol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_of_what_is_not_finite_leaves(bad: float, tmp_path: Path) -> None:
    update = torch.tensor([bad, 1.0, 2.0])
    [found], [of_nothing] = noise(tmp_path)([update]), noise(tmp_path)([torch.zeros(3)])
    assert torch.equal(found, of_nothing)


def test_noise_differs_from_use_to_use_and_follows_from_the_seed(tmp_path: Path) -> None:
    made = noise(tmp_path)
    first, second = (made([torch.zeros(9)])[0] for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(noise(tmp_path)([torch.zeros(9)])[0], first)


def test_epsilon_is_that_of_another_accountant(tmp_path: Path) -> None:
    """Privacy loss distributions, composed numerically: 5 answers, then 15 with other noise, at half their multipliers."""
    for multiplier, uses in ((4.0, 5), (6.0, 15)):
        made = noise(tmp_path, multiplier=multiplier)
        for _ in range(uses):
            made([torch.zeros(2)])
        made.settle()
    other = pld.PLDAccountant()
    other.compose(dp_event.GaussianDpEvent(2.0), 5)
    other.compose(dp_event.GaussianDpEvent(3.0), 15)
    assert Account(tmp_path, 1e-5).epsilon() == pytest.approx(other.get_epsilon(1e-5), rel=1e-3)


def test_no_more_is_answered_than_the_budget_has(tmp_path: Path) -> None:
    def answer() -> None:
        made = noise(tmp_path, multiplier=10.0, budget=4.0)
        made([torch.zeros(2)])
        made.settle()

    for _ in range(21):
        answer()
    with pytest.raises(BudgetError, match=r"privacy.epsilon = 4: with this answer it would be 4\.\d+"):
        answer()
    assert Account(tmp_path, 1e-5).epsilon() <= 4.0


def test_a_site_whose_budget_is_spent_does_no_work(tmp_path: Path) -> None:
    node: dict[str, Any] = {
        "state": str(tmp_path),
        "privacy.clip-norm": 1.0,
        "privacy.noise-multiplier": 1.0,
        "privacy.epsilon": 1.0,
        "privacy.delta": 1e-5,
    }
    with pytest.raises(BudgetError):
        Noise.of(Context(1, 1, node, RecordDict(), {}))
    assert Noise.of(Context(1, 1, {"state": str(tmp_path)}, RecordDict(), {})) is None
