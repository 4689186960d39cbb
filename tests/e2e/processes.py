"""Flower's processes and site services on this machine.

A SuperLink with TLS, SuperNodes with keys and users of their own.
"""

import datetime
import ipaddress
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

ROOT = Path(__file__).parent.parent.parent
BIN = ROOT / ".venv/bin"
SITES = 3
CARRIER = 65534  # the user of the SuperNodes, where there are two


class Deployment:
    """Flower's processes, in a folder of their own.

    Python takes the app's packages from the folder in which it is started.

    Args:
        home: the folder.
        app: the Flower app that is run.
        durable: as the units of ``deploy/server`` start it: with a database, and a SuperExec of its
            own.
        server: what is in the environment of the server's processes besides.
    """

    def __init__(
        self,
        home: Path,
        app: Path = ROOT,
        *,
        durable: bool = False,
        server: Mapping[str, str] | None = None,
    ) -> None:
        self._home, self._app, self._server = home, app, dict(server or {})
        self._commands: dict[str, Callable[[], subprocess.Popen[bytes]]] = {}
        self.address = f"127.0.0.1:{free_port()}"
        clean = {
            key: value
            for key, value in os.environ.items()
            if key not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH")
        }
        quiet = {
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }
        self._env = (
            clean
            | quiet
            | {
                "PATH": f"{BIN}:{os.environ['PATH']}",
                "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",
                "OMP_NUM_THREADS": "1",
            }
        )
        certify(home)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{self.address}"\n'
            f'root-certificates = "{home / "server.crt"}"\n'
        )
        host, port = self.address.split(":")
        files = (
            "--ssl-ca-certfile server.crt --ssl-certfile server.crt --ssl-keyfile server.key "
            "--enable-supernode-auth"
        )
        arguments = f"--host {host} --port {port} {files} --disable-runtime-dependency-installation"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        if durable:
            (home / "superexec.secret").write_text(secrets.token_hex(32))
            (home / "superexec.secret").chmod(0o600)
            secret = "--superexec-auth-secret-file superexec.secret"
            arguments += f" --database state.db --isolation process {secret}"
            self._begin(
                "superexec",
                f"--runtime-api-address {self.address} --root-certificates server.crt {secret}",
            )
        self._begin("superlink", arguments)
        wait_for(lambda: answers(int(port)), 60)
        for site in range(SITES):
            make_node_key(home / f"node-{site}")
            self._flwr(
                "supernode", "register", str(home / f"node-{site}.pub"), "here"
            ).check_returncode()

    def _begin(self, name: str, arguments: str, *more: str, user: int | None = None) -> None:
        self._commands[name] = lambda: self._start(name, arguments, *more, user=user)
        self.restart(name)

    def restart(self, name: str) -> None:
        """Start a process, with the command by which it was started before."""
        self._processes[name] = self._commands[name]()

    def _start(
        self, name: str, arguments: str, *more: str, user: int | None = None
    ) -> "subprocess.Popen[bytes]":
        home, env, program = self._home, self._env, [f"flower-{name}"]
        if name.startswith("supernode"):  # as the unit of deploy/site does
            program = [sys.executable, "-P", str(ROOT / "deploy/supernode.py")]
        else:
            env = env | self._server
        command = [*program, *arguments.split(), *more]
        if user is not None:
            home = self._home / name
            home.mkdir(exist_ok=True)
            os.chown(home, user, user)
            env, command = (
                env | {"FLWR_HOME": str(home), "HOME": str(home)},
                [*as_user(user), *command],
            )
        with (self._home / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                command, cwd=home, env=env, stdout=log, stderr=log, start_new_session=True
            )

    def _flwr(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["flwr", *arguments],
            cwd=self._home,
            env=self._env,
            capture_output=True,
            text=True,
            check=False,
        )

    def join(
        self, site: int, node_config: str = "", user: int | None = None, address: str = ""
    ) -> None:
        """Start a site's SuperNode, as another user if one is named.

        It knows the SuperLink by another address if one is given.
        """
        key = self._home / f"node-{site}"
        if user is not None:
            os.chown(key, user, user)
        keys = f"--root-certificates {self._home / 'server.crt'} --auth-supernode-private-key {key}"
        node = node_config or f"partition-id={site} num-partitions={SITES}"
        name, arguments = (
            f"supernode-{site}",
            f"--superlink {address or self.address} --port {free_port()} {keys}",
        )
        self._begin(name, arguments, "--node-config", node, user=user)

    def run(self, settings: str, *, followed: bool = False) -> "subprocess.Popen[str]":
        """``flwr run``, or with ``followed`` the start command of ``deploy/``; and its log."""
        command = [sys.executable, "-m", "deploy.run", "--"] if followed else ["flwr", "run"]
        command += [str(self._app), "here", "--stream", "--run-config", settings]
        return subprocess.Popen(
            command,
            cwd=ROOT if followed else self._home,
            env=self._env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
        )

    def stop(self, run: str) -> None:
        """``flwr stop``."""
        self._flwr("stop", run, "here").check_returncode()

    def running(self, name: str) -> bool:
        """Whether a process is there."""
        return self._processes[name].poll() is None

    @property
    def names(self) -> list[str]:
        """The names of all processes that were started here."""
        return list(self._processes)

    def process(self, name: str) -> psutil.Process:
        """The process of this name."""
        return psutil.Process(self._processes[name].pid)

    def kill(self, name: str) -> None:
        """End a process (``superlink``, ``supernode-0``, ...) and what it started, at once."""
        os.killpg(self._processes[name].pid, signal.SIGKILL)
        self._processes[name].wait()

    def end(self) -> None:
        """End all processes that still run."""
        for name in self._processes:
            if self.running(name):
                self.kill(name)


class Services:
    """A service for each site, in a process of its own, with keys for sealing.

    Args:
        folder: for sockets; below it, ``private`` for all else.
        sealing: whether they have each other's keys.
        of_sites: what their ``site.toml`` say besides, by number.
        processes: of sites that have several, under torchrun.
        keys: what all of them say besides.
    """

    def __init__(
        self,
        folder: Path,
        *,
        sealing: bool = False,
        of_sites: Mapping[int, Mapping[str, Any]] | None = None,
        processes: Mapping[int, int] | None = None,
        **keys: Any,
    ) -> None:
        self.private, self._sockets = folder / "private", folder
        self.private.mkdir(mode=0o700)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._several = dict(processes or {})
        public = {}
        for site in range(SITES):
            command = [
                sys.executable,
                "-m",
                "client_app.sealing",
                str(self.private / f"{site}.seal"),
            ]
            public[site] = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
        for site in range(SITES):
            others = {str(other): key for other, key in public.items() if other != site}
            (self.private / f"{site}.peers").write_text(tomli_w.dumps(others))
            found = {
                "site": site,
                "name": f"clinic {site}",
                "socket": str(self.socket(site)),
                "audit": str(self.private / f"{site}.audit"),
                "state": str(self.private / f"state-{site}"),
                "data": {"source": "digits"},
            }
            if sealing:
                found |= {"save": str(self.private / f"{site}.safetensors")}
                found |= {
                    "private-key": str(self.private / f"{site}.seal"),
                    "peer-keys": str(self.private / f"{site}.peers"),
                }
            (self.private / f"{site}.site").write_text(
                tomli_w.dumps(found | keys | dict((of_sites or {}).get(site, {})))
            )
            self.start(site)

    def socket(self, site: int) -> Path:
        """Where a site's service listens."""
        return self._sockets / f"{site}.sock"

    def start(self, site: int) -> None:
        """Start a service, and wait until it listens."""
        self.socket(site).unlink(missing_ok=True)
        with (self.private / f"{site}.log").open("ab") as log:
            several = [
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={self._several.get(site)}",
                "-m",
            ]
            service = [
                *(several if site in self._several else []),
                "client_app.service",
                str(self.private / f"{site}.site"),
            ]
            command = [sys.executable, "-m", *service]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}  # they share this machine
            self._processes[site] = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=log, stderr=log
            )
        wait_for(
            lambda: self.socket(site).exists() or self._processes[site].poll() is not None, 300
        )
        assert self.socket(site).exists(), (self.private / f"{site}.log").read_text()

    def running(self, site: int) -> bool:
        """Whether a service is there."""
        return self._processes[site].poll() is None

    def kill(self, site: int) -> None:
        """End a service at once."""
        self._processes[site].kill()
        self._processes[site].wait()

    def requests(self, site: int) -> list[dict[str, Any]]:
        """The lines of a site's audit log."""
        file = self.private / f"{site}.audit"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def end(self) -> None:
        """End all services."""
        for site, process in self._processes.items():
            if site in self._several:  # torchrun ends its processes
                process.terminate()
            else:
                process.kill()
            process.wait()


@cache
def as_user(user: int) -> tuple[str, ...]:
    """What to put before a command that another user is to run with this Python.

    Wherever this Python is; empty where that cannot be.
    """
    become = ("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups")
    found = (*as_anybody(), *become)
    try:
        subprocess.run([*found, sys.executable, "-c", ""], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return ()
    return found


def as_anybody() -> tuple[str, ...]:
    """What to put before a command of root's whose users are to have this Python.

    A Python below a folder that is its owner's alone (``/root``) is shown to the command at its
    place, and nothing beside it.
    """
    python = Path(sys.base_prefix)
    closed = next(
        (path for path in (*reversed(python.parents), python) if not path.stat().st_mode & 0o001),
        None,
    )
    show = (
        'set -e; mount --bind "$1" "$2"; mount -t tmpfs -o mode=755 none "$3"; '
        'mkdir -p "$1"; mount --move "$2" "$1"; shift 3; exec "$@"'
    )
    return (
        ("unshare", "--mount", "sh", "-c", show, "sh", str(python), tempfile.mkdtemp(), str(closed))
        if closed
        else ()
    )


def certify(folder: Path) -> None:
    """``server.key`` and ``server.crt``, its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    here = x509.SubjectAlternativeName(
        [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    )
    certificate = (
        x509.CertificateBuilder(
            name,
            name,
            key.public_key(),
            x509.random_serial_number(),
            now,
            now + datetime.timedelta(1),
        )
        .add_extension(here, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "server.key").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    (folder / "server.crt").write_bytes(certificate.public_bytes(Encoding.PEM))


def make_node_key(path: Path) -> None:
    """What ``ssh-keygen -t ecdsa -b 384`` makes."""
    key = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    path.with_suffix(".pub").write_bytes(
        key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    )


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
