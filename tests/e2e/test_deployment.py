"""Sites in processes of their own: a SuperLink with TLS, SuperNodes with keys, and one of them killed."""

import datetime
import ipaddress
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from simulation.laboratory import Run
from tests.conftest import ROOT

pytestmark = pytest.mark.e2e
SITES = 3


class Deployment:
    """Flower's processes on this machine, in a folder of their own: Python takes the app's packages from where it stands."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._address = f"127.0.0.1:{free_port()}"
        clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH")}
        quiet = {"FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        self._env = clean | quiet | {"PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"}
        certify(home)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{self._address}"\n'
            f'root-certificates = "{home / "server.crt"}"\n'
        )
        host, port = self._address.split(":")
        files = "--ssl-ca-certfile server.crt --ssl-certfile server.crt --ssl-keyfile server.key --enable-supernode-auth"
        arguments = f"--host {host} --port {port} {files} --disable-runtime-dependency-installation"
        self._processes = {"superlink": self._start("superlink", arguments)}
        wait_for(lambda: answers(int(port)), 60)
        for site in range(SITES):
            make_node_key(home / f"node-{site}")
            self._flwr("supernode", "register", str(home / f"node-{site}.pub"), "here").check_returncode()

    def _start(self, name: str, arguments: str, *more: str) -> "subprocess.Popen[bytes]":
        command = [f"flower-{name.split('-')[0]}", *arguments.split(), *more]
        with (self._home / f"{name}.log").open("ab") as log:
            return subprocess.Popen(command, cwd=self._home, env=self._env, stdout=log, stderr=log, start_new_session=True)

    def _flwr(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(["flwr", *arguments], cwd=self._home, env=self._env, capture_output=True, text=True, check=False)

    def join(self, site: int, node_config: str = "") -> None:
        """Start a site's SuperNode."""
        keys = f"--root-certificates server.crt --auth-supernode-private-key node-{site}"
        node = f"partition-id={site} num-partitions={SITES} {node_config}"
        name = f"supernode-{site}"
        self._processes[name] = self._start(
            name, f"--superlink {self._address} --port {free_port()} {keys}", "--node-config", node.strip()
        )

    def run(self, settings: str) -> "subprocess.Popen[str]":
        """``flwr run``, its log on standard output."""
        command = ["flwr", "run", str(ROOT), "here", "--stream", "--run-config", settings]
        return subprocess.Popen(
            command, cwd=self._home, env=self._env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
        )

    def running(self, name: str) -> bool:
        """Whether a process is there."""
        return self._processes[name].poll() is None

    def kill(self, name: str) -> None:
        """End a process (``superlink``, ``supernode-0``, ...) and what it started, at once."""
        os.killpg(self._processes[name].pid, signal.SIGKILL)
        self._processes[name].wait()

    def end(self) -> None:
        """End all that still run."""
        for name in self._processes:
            if self.running(name):
                self.kill(name)


def certify(folder: Path) -> None:
    """``server.key`` and ``server.crt``, its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    here = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(1))
        .add_extension(here, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "server.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (folder / "server.crt").write_bytes(certificate.public_bytes(Encoding.PEM))


def make_node_key(path: Path) -> None:
    """What ``ssh-keygen -t ecdsa -b 384`` makes."""
    key = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    path.with_suffix(".pub").write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))


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
    for site in range(SITES):
        deployment.join(site)
    results = tmp_path / "runs"
    settings = f'results.folder="{results}" strategy="gsgm" num-sites=3 epochs=5 gsgm.local-steps=15 timeout-s=240.0'
    seen, killed = [], False
    with deployment.run(settings) as process:
        assert process.stdout is not None
        for line in process.stdout:
            seen.append(line)
            if not killed and re.search(r"update +\d+ \| epoch 1/5", line):
                deployment.kill("supernode-2")
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
