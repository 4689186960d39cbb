"""Clipping and noise of what leaves a site, and the account of it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from dp_accounting import dp_event, pld
from flwr.app import Context, RecordDict
from scipy import stats

from client_app.privacy import Account, BudgetError, Noise, cost_of

SIZE = 200_000


def noise(
    folder: Path,
    clip_norm: float = 3.0,
    multiplier: float = 0.5,
    budget: float = math.inf,
    seed: bytes = bytes(32),
) -> Noise:
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
    """Privacy loss distributions, composed numerically.

    5 answers, then 15 with other noise, at half their multipliers.
    """
    for multiplier, uses in ((4.0, 5), (6.0, 15)):
        made = noise(tmp_path, multiplier=multiplier)
        for _ in range(uses):
            made([torch.zeros(2)])
        made.charge()
    other = pld.PLDAccountant()
    other.compose(dp_event.GaussianDpEvent(2.0), 5)
    other.compose(dp_event.GaussianDpEvent(3.0), 15)
    assert Account(tmp_path, 1e-5).epsilon() == pytest.approx(other.get_epsilon(1e-5), rel=1e-3)


def test_no_more_is_answered_than_the_budget_has(tmp_path: Path) -> None:
    def answer() -> None:
        made = noise(tmp_path, multiplier=10.0, budget=4.0)
        made([torch.zeros(2)])
        made.charge()

    for _ in range(21):
        answer()
    with pytest.raises(
        BudgetError, match=r"privacy.epsilon = 4: with this answer it would be 4\.\d+"
    ):
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


def test_noise_is_normal_and_depends_on_every_byte_of_its_seed(tmp_path: Path) -> None:
    """A generator of torch's on a CPU is one of 2^32, all of which can be tried."""
    made = {bytes(32): noise(tmp_path, 1.0, 1.0)([torch.zeros(SIZE)])[0]}
    assert stats.kstest(made[bytes(32)].double().numpy(), "norm").pvalue > 1e-3
    for at in (0, 12, 31):
        seed = bytes(1 if number == at else 0 for number in range(32))
        made[seed] = noise(tmp_path, 1.0, 1.0, seed=seed)([torch.zeros(SIZE)])[0]
    off = torch.corrcoef(torch.stack(list(made.values()))) - torch.eye(4)
    assert float(off.abs().max()) < 5 / math.sqrt(SIZE)
    found = [
        Noise.of(Context(1, 1, NODE | {"state": str(tmp_path)}, RecordDict(), {})) for _ in range(2)
    ]
    first, second = (each([torch.zeros(9)])[0] for each in found if each)
    assert not torch.equal(first, second)


NODE: dict[str, Any] = {
    f"privacy.{key}": 9.0 for key in ("clip-norm", "noise-multiplier", "epsilon")
} | {"privacy.delta": 1e-5}


@pytest.mark.parametrize("text", ["", "[]", '{"spent": NaN}', '{"spent": -1}', "{}", '{"spent": 1'])
def test_a_damaged_account_is_no_budget(text: str, tmp_path: Path) -> None:
    (tmp_path / "privacy.json").write_text(text)
    with pytest.raises(ValueError, match=r"privacy\.json is damaged"):
        Account(tmp_path, 1e-5).epsilon()


def test_as_many_answers_are_left_as_are_given(tmp_path: Path) -> None:
    account, made = Account(tmp_path, 1e-5), noise(tmp_path, multiplier=8.0, budget=3.0)
    left = account.answers_left(cost_of(8.0), 3.0)
    for _ in range(left):
        made([torch.zeros(2)])
        made.charge()
    assert account.answers_left(cost_of(8.0), 3.0) == 0
    made([torch.zeros(2)])
    with pytest.raises(BudgetError):
        made.charge()


def test_what_is_spent_is_there_whole_when_a_write_is_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = Account(tmp_path, 1e-5)
    account.charge(1.0)
    before = account.epsilon()

    def cut(*_: object) -> None:
        raise OSError("the power is gone")

    monkeypatch.setattr(Path, "replace", cut)
    with pytest.raises(OSError, match="the power is gone"):
        account.charge(1.0)
    assert account.epsilon() == before
