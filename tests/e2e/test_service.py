"""Sites behind services of their own: sealed peers over TLS, and a service that is killed and started again."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w
from safetensors.torch import load_file

from simulation.laboratory import Run
from tests.conftest import ROOT
from tests.e2e.test_deployment import SITES, Deployment, deployment, wait_for  # noqa: F401

pytestmark = pytest.mark.e2e
PYTHON = str(ROOT / ".venv/bin/python")


class Services:
    """A service for each site, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        public = {}
        for site in range(SITES):
            command = [PYTHON, "-m", "client_app.sealing", str(folder / f"{site}.seal")]
            public[site] = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        for site in range(SITES):
            others = {str(other): key for other, key in public.items() if other != site}
            (folder / f"{site}.peers").write_text(tomli_w.dumps(others))
            self._write(site)
            self.start(site)

    def _write(self, site: int) -> None:
        keys = {
            "site": site,
            "name": f"clinic {site}",
            "socket": str(self.socket(site)),
            "audit": str(self.folder / f"{site}.audit"),
            "state": str(self.folder / f"state-{site}"),
            "save": str(self.folder / f"{site}.safetensors"),
            "private-key": str(self.folder / f"{site}.seal"),
            "peer-keys": str(self.folder / f"{site}.peers"),
            "data": {"source": "digits"},
            "policy": {"sealing": "keys", "strategies": ["dmsgd"], "smallest-steps": 5},
        }
        (self.folder / f"{site}.site").write_text(tomli_w.dumps(keys))

    def socket(self, site: int) -> Path:
        return self.folder / f"{site}.sock"

    def start(self, site: int) -> None:
        """Start a service, and wait until it listens."""
        self.socket(site).unlink(missing_ok=True)
        with (self.folder / f"service-{site}.log").open("ab") as log:
            command = [PYTHON, "-m", "client_app.service", str(self.folder / f"{site}.site")]
            self._processes[site] = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        wait_for(self.socket(site).exists, 300)

    def kill(self, site: int) -> None:
        """End a service at once."""
        self._processes[site].kill()
        self._processes[site].wait()

    def letters(self, site: int) -> list[dict[str, object]]:
        """What its audit log says."""
        file = self.folder / f"{site}.audit"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def end(self) -> None:
        """End all."""
        for site in self._processes:
            self.kill(site)


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    found = Services(tmp_path)
    yield found
    found.end()


def test_sealed_peers_go_on_when_a_service_is_killed(deployment: Deployment, services: Services, tmp_path: Path) -> None:  # noqa: F811
    """It is started again, and finds on its disk what it did before."""
    for site in range(SITES):
        deployment.join(site, f'service="{services.socket(site)}"')
    results = tmp_path / "runs"
    settings = f'results.folder="{results}" strategy="dmsgd" wire.sealing="keys" num-sites=3 epochs=5 dmsgd.local-steps=5'
    with deployment.run(settings) as process:
        wait_for(lambda: len(services.letters(2)) >= 8, 600)
        time.sleep(0.5)  # that answer is on its way
        services.kill(2)
        services.start(2)
        log = process.communicate()[0]
    (folder,) = results.iterdir()
    run = Run.load(folder)
    assert run.finished, log
    assert run.models == {}
    assert "goes on with what it remembers in" in (tmp_path / "service-2.log").read_text()
    for site in range(SITES):
        assert load_file(tmp_path / f"{site}.safetensors")
        assert not [letter for letter in services.letters(site) if "rule" in letter or "problem" in letter]
    assert list(run.sites["name"]) == ["clinic 0", "clinic 1", "clinic 2"]
