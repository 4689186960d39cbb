"""Sites in processes of their own: a SuperLink, SuperNodes that know where their data lie, and one of them killed."""

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from simulation.laboratory import Run
from tests.conftest import ROOT

pytestmark = pytest.mark.e2e
SITES = 3


class Deployment:
    """Flower's processes on this machine, in a folder of their own: Python takes the app's packages from where it stands."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._port = free_port()
        clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH")}
        quiet = {"FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        self._env = clean | quiet | {"PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"}
        address = f"127.0.0.1:{self._port}"
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{address}"\ninsecure = true\n'
        )
        self._processes = [
            self._start("superlink", f"--insecure --host 127.0.0.1 --port {self._port} --disable-runtime-dependency-installation")
        ]
        wait_for(lambda: answers(self._port), 60)
        for site in range(SITES):
            node = f"partition-id={site} num-partitions={SITES}"
            self._processes.append(
                self._start(f"supernode-{site}", f"--insecure --superlink {address} --port {free_port()}", "--node-config", node)
            )

    def _start(self, name: str, arguments: str, *more: str) -> "subprocess.Popen[bytes]":
        command = [f"flower-{name.split('-')[0]}", *arguments.split(), *more]
        with (self._home / f"{name}.log").open("wb") as log:
            return subprocess.Popen(command, cwd=self._home, env=self._env, stdout=log, stderr=log, start_new_session=True)

    def run(self, settings: str) -> "subprocess.Popen[str]":
        """``flwr run``, its log on standard output."""
        command = ["flwr", "run", str(ROOT), "here", "--stream", "--run-config", settings]
        return subprocess.Popen(
            command, cwd=self._home, env=self._env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
        )

    def kill(self, number: int) -> None:
        """End a process (0 is the SuperLink, then the sites) and what it started, at once."""
        os.killpg(self._processes[number].pid, signal.SIGKILL)
        self._processes[number].wait()

    def end(self) -> None:
        """End all that still run."""
        for number, process in enumerate(self._processes):
            if process.poll() is None:
                self.kill(number)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.1)


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    found = Deployment(tmp_path)
    yield found
    found.end()


def test_gsgm_goes_on_when_a_site_is_killed(deployment: Deployment, tmp_path: Path) -> None:
    results = tmp_path / "runs"
    settings = f'results-dir="{results}" strategy="gsgm" num-sites=3 epochs=5 local-steps=15 lr=0.05 timeout-s=60.0'
    seen, killed = [], False
    with deployment.run(settings) as process:
        assert process.stdout is not None
        for line in process.stdout:
            seen.append(line)
            if not killed and re.search(r"update +\d+ \| epoch 1/5", line):
                deployment.kill(SITES)
                killed = True
    log = "".join(seen)
    assert killed, log
    (folder,) = results.iterdir()
    run = Run.load(folder)
    assert run.finished, log
    assert re.search(r"site 2 .*is left out of the training", log)
    updates = run.metrics.query("metric == 'updates' and split == 'train'").pivot_table(
        index="round", columns="site", values="value"
    )
    assert updates["2"].iloc[0] > 0
    assert updates["2"].iloc[-1] == 0
    assert updates["all"].sum() == 5 * 45 / 15
    assert run.history["accuracy"].iloc[-1] > 0.5
