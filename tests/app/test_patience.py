"""All sites go and come back after hours: a run waits for them, and says so."""

from pathlib import Path
from typing import Any

import pytest
import torch

from server_app.discovery import RunError
from simulation.laboratory import Run, simulate
from simulation.world import World
from strategies.method import RoundPlan

HOURS = 4 * 3600.0
COMMON: dict[str, Any] = {
    "num_sites": 3,
    "epochs": 4,
    "model": {"name": "mlp"},
    "data": {"source": "tests.own_data:few"},
    "training": {"batch_size": 8},
    "progress": False,
}
METHODS: list[dict[str, Any]] = [
    {"strategy": "co-learning", "co_learning": {"local_epochs": 1}},
    {"strategy": "FedAdam"},
    {"strategy": "local"},
    {"strategy": "gsgm"},
    {"strategy": "dmsgd"},
]
SLOW = 20.0  # examples a second: an epoch takes seconds


def gone(from_s: float, **keys: Any) -> Run:
    """A run whose sites are all gone for hours."""
    periods = {site: [(from_s, from_s + HOURS)] for site in range(3)}
    return simulate(**COMMON, **keys, world=World(samples_per_s=SLOW, offline=periods))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: str(method["strategy"]))
def test_run_goes_on_when_all_sites_are_back(
    method: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    undisturbed = simulate(**COMMON, **method, world=World(samples_per_s=SLOW))
    found = gone(4.0, **method)
    assert found.finished
    assert found.summary["hours"] > 4
    for site in range(3):
        assert f"(site {site}) is not connected" in caplog.text
        assert f"(site {site}) is connected again" in caplog.text
    if isinstance(
        found.config.plan, RoundPlan
    ):  # a round that was lost is taken again, from the same model
        assert all(
            torch.equal(found.model[name], value) for name, value in undisturbed.model.items()
        )


def test_site_that_stayed_forgets_the_round_that_is_taken_again(tmp_path: Path) -> None:
    common = COMMON | {"strategy": "scaffold", "scaffold": {"local_epochs": 1}}
    undisturbed = simulate(
        **common, world=World(samples_per_s=SLOW), folder=tmp_path / "undisturbed"
    )
    periods = {site: [(4.0, 4.0 + HOURS)] for site in (1, 2)}
    found = simulate(
        **common, world=World(samples_per_s=SLOW, offline=periods), folder=tmp_path / "found"
    )
    assert all(torch.equal(found.model[name], value) for name, value in undisturbed.model.items())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: str(method["strategy"]))
def test_patience_ends(method: dict[str, Any]) -> None:
    with pytest.raises(RunError, match=r"patience-s = 3600|min-sites = 2: stopped"):
        gone(4.0, **method, patience_s=3600.0)
