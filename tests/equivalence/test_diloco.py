"""DiLoCo: the outer step is torch's, the inner optimizer remembers; FedAvg is a special case."""

from typing import Any

import pytest
import torch
from torch import Tensor

from configuration.config import configuration
from simulation.laboratory import Run, simulate
from strategies.method import Mean, RoundPlan, RoundStart

SMALL: dict[str, Any] = {"num_sites": 3, "epochs": 3, "model": {"name": "mlp"}, "progress": False}


def outer(**keys: float) -> RoundPlan[Any]:
    plan = configuration(strategy="diloco", diloco=keys).plan
    assert isinstance(plan, RoundPlan)
    return plan


@pytest.mark.parametrize(("lr", "momentum"), [(0.7, 0.9), (1.0, 0.0), (0.3, 0.5)])
def test_outer_step_is_torchs_nesterov_on_the_outer_gradient(lr: float, momentum: float) -> None:
    plan = outer(outer_lr=lr, outer_momentum=momentum)
    means = torch.randn(5, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs = torch.zeros(40, dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([theirs], lr, momentum, nesterov=momentum > 0)
    state = plan.init(theirs.detach().clone())
    for mean in means:
        theirs.grad = theirs.detach() - mean
        sgd.step()
        state = plan.absorb(state, Mean({"x": mean}, 1.0))
        torch.testing.assert_close(state.x, theirs.detach(), rtol=1e-12, atol=1e-12)


def test_rounds_are_local_steps_and_the_last_takes_what_is_left() -> None:
    plan, done = outer(local_steps=20), 0.0
    steps: list[int] = []
    state = plan.init(torch.zeros(1))
    while done < 8 - 1e-9:
        local = plan.instruct(state, RoundStart(len(steps) + 1, done, 8, 9.0))
        assert local.cycle == pytest.approx((done / 8, min(1, (done + local.steps / 9) / 8)))
        steps.append(local.steps)
        done += local.steps / 9
    assert steps == [20, 20, 20, 12]


def run(**changes: Any) -> Run:
    return simulate(**(SMALL | changes))


def last(found: Run) -> Tensor:
    return torch.cat([value.reshape(-1) for value in found.model.values()])


def test_without_an_outer_optimizer_it_is_fedavg() -> None:
    """An epoch has 15 batches at each of three sites; without moments, SGD remembers nothing."""
    plain = {"momentum": 0.0, "lr": 0.1}
    ours = run(
        strategy="diloco",
        diloco={"outer_lr": 1.0, "outer_momentum": 0.0, "local_steps": 15},
        training=plain,
    )
    fedavg = last(run(strategy="fedavg", fedavg={"local_epochs": 1}, training=plain))
    # That x - (x - mean) is the mean holds but for rounding.
    torch.testing.assert_close(last(ours), fedavg, rtol=0, atol=1e-6)
    faster = last(run(strategy="diloco", diloco={"local_steps": 15}, training=plain))
    assert float((faster - fedavg).abs().max()) > 1e-2


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_moments_stay_at_the_site(optimizer: str) -> None:
    """One site, no outer optimizer, a constant rate: two rounds are one twice as long.

    Nothing is forgotten between them but the order of the examples, which is drawn again each
    round: with one batch an epoch there is none.
    """
    one: dict[str, Any] = {"num_sites": 1, "min_sites": 1, "epochs": 6, "strategy": "diloco"}
    training: dict[str, Any] = {
        "batch_size": 2000,
        "lr_ratio": 1.0,
        "optimizer": optimizer,
        "lr": 0.01,
    }
    once, twice = (
        run(
            **one,
            training=training,
            diloco={"outer_lr": 1.0, "outer_momentum": 0.0, "local_steps": steps},
        )
        for steps in (6, 3)
    )
    torch.testing.assert_close(last(once), last(twice), rtol=1e-4, atol=1e-6)
    forgetful = run(**(one | {"strategy": "fedavg"}), training=training, fedavg={"local_epochs": 3})
    assert float((last(forgetful) - last(once)).abs().max()) > 1e-3


def test_it_learns_on_skewed_data_as_the_file_in_conf_says() -> None:
    found = simulate("conf/diloco.toml", epochs=8, model={"name": "mlp"}, progress=False)
    assert found.history["accuracy"].iloc[-1] > 0.85
