"""Sites in processes of their own, and one of them killed.

A SuperLink with TLS, and SuperNodes with keys.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.deployment import FREE
from benchmarks.faults import Link
from deploy.run import Exit
from simulation.laboratory import Run
from tests.e2e.processes import SITES, Deployment, Services, wait_for

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    folder = tmp_path_factory.mktemp("services")
    found = Services(folder, policy=FREE, data={"source": "digits"})
    yield found
    found.end()


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, services: Services
) -> Iterator[Deployment]:
    found = Deployment(tmp_path_factory.mktemp("flower"))
    for site in range(SITES):
        found.join(site, f'service="{services.socket(site)}"')
    yield found
    found.end()


def test_run_that_is_stopped_stops_at_its_sites(
    deployment: Deployment, services: Services, tmp_path: Path
) -> None:
    """Its sites would be training for days; they answer the next run."""

    def last(site: int) -> dict[str, Any]:
        return (services.requests(site) or [{}])[-1]

    settings = 'strategy="fedavg" fedavg.local-epochs=100000 epochs=100000 timeout-s=1000000.0'
    settings += f' num-sites={SITES} results.folder="{tmp_path / "stopped"}"'
    with deployment.run(settings, followed=True) as process:
        assert process.stdout is not None
        start = next(line for line in process.stdout if "Successfully started run" in line)
        wait_for(lambda: all(last(site).get("kind") == "train" for site in range(SITES)), 300)
        assert all(last(site)["way"] == "in" for site in range(SITES))
        deployment.stop(start.split()[-1])
        assert process.stdout.read().endswith("the run was stopped\n")
    assert process.returncode == Exit.STOPPED
    wait_for(lambda: all(last(site)["way"] == "out" for site in range(SITES)), 300)
    assert all("nobody waits for the answer" in last(site)["problem"] for site in range(SITES))
    results = tmp_path / "next"
    settings = f'strategy="fedavg" model.name="mlp" epochs=1 results.folder="{results}"'
    with deployment.run(f"{settings} num-sites={SITES}") as process:
        log = process.communicate()[0]
    (folder,) = results.iterdir()
    assert Run.load(folder).finished, log


def test_gsgm_goes_on_when_a_site_is_killed(deployment: Deployment, tmp_path: Path) -> None:
    results = tmp_path / "runs"
    settings = (
        f'results.folder="{results}" strategy="gsgm" num-sites=3 epochs=3 gsgm.local-steps=15 '
        "timeout-s=240.0"
    )
    seen, killed = [], False
    with deployment.run(settings) as process:
        assert process.stdout is not None
        for line in process.stdout:
            seen.append(line)
            if not killed and re.search(r"update +\d+ \| epoch 1/3", line):
                deployment.kill("supernode-2")
                killed = True
    log = "".join(seen)
    assert killed, log
    (folder,) = results.iterdir()
    run = Run.load(folder)
    assert run.finished, log
    assert re.search(r"clinic 2 .*is left out of the training", log)
    updates = run.metrics.query("metric == 'updates' and split == 'train'").pivot_table(
        index="round", columns="site", values="value"
    )
    assert updates["2"].iloc[0] > 0
    assert updates["2"].iloc[-1] == 0
    assert updates["all"].sum() == 3 * 3 * 45 / 15
    assert run.history["accuracy"].iloc[-1] > 0.5


def test_supernode_that_gives_up_ends(tmp_path: Path) -> None:
    """The SuperLink is away, but a load balancer before it takes connections, and ends them."""
    deployment = Deployment(tmp_path)
    try:
        balancer = Link(deployment.address)
        balancer.start()
        deployment.join(0, address=balancer.address)
        wait_for(lambda: "SuperNode ID" in (tmp_path / "supernode-0.log").read_text(), 120)
        deployment.kill("superlink")
        wait_for(lambda: not deployment.running("supernode-0"), 120)
    finally:
        deployment.end()
