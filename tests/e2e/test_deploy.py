"""The guide docs/how-to/deploy.md, typed as it stands, and what becomes of its runs.

A server and two sites, machines of their own but for the network.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from subprocess import PIPE, STDOUT

import pytest
import torch

from deploy.run import Exit
from tests.conftest import ROOT
from tests.e2e.processes import as_anybody, as_user

END = "@@ that was it"
GUIDE = ROOT / "docs/how-to/deploy.md"
PROGRAMS = ("nginx", "logrotate", "curl", "unshare", "nsenter", "ip", "useradd")
MISSING = [
    name for name in PROGRAMS if shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin") is None
]
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not as_user(65534), reason="only root can act as several users"
    ),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]
# Folders of its own over the machine's, and this checkout where the guide has it.
SETTLE = """
set -e
mount -t tmpfs none /opt && mkdir /opt/archipelago && mount --bind {root} /opt/archipelago
mount -t tmpfs none /mnt && cp -a /etc /mnt/etc && mount --bind /mnt/etc /etc
for folder in /run /srv /var/log /var/lib /var/cache /var/backups; do \
mount -t tmpfs -o mode=755 none $folder; done
mkdir -p /var/lib/nginx /var/log/nginx /etc/systemd/system /mnt/bin
rm -f /etc/nginx/sites-enabled/* /etc/nginx/conf.d/*
echo '127.0.0.1 server.example.org' >> /etc/hosts
for name in systemctl journalctl; do
    printf '#!/bin/sh\\nexec {python} {shim} %s "$@"\\n' \
"$(test $name = systemctl || echo journal)" > /mnt/bin/$name
    chmod +x /mnt/bin/$name
done
ip link set lo up
echo settled
while :; do sleep 1; done
"""


class Shell:
    """One of root's on a machine: what is typed last knows what was typed first.

    Args:
        process: of the machine.
    """

    def __init__(self, process: int) -> None:
        enter = [
            "nsenter",
            f"--target={process}",
            "--mount",
            "--net",
            "--pid",
            "bash",
            "-euo",
            "pipefail",
        ]
        self._process = subprocess.Popen(
            enter, stdin=PIPE, stdout=PIPE, stderr=STDOUT, text=True, bufsize=1
        )
        self.type("export PATH=/mnt/bin:/usr/sbin:/usr/bin:/sbin:/bin OMP_NUM_THREADS=1; cd /")

    def type(self, text: str) -> str:
        """What commands print; the first that fails fails the test."""
        self.begin(text)
        return self.wait()

    def begin(self, text: str) -> None:
        """Start commands without waiting for their end."""
        self._command = text
        assert self._process.stdin is not None
        self._process.stdin.write(f"{{\n{text}\n}} < /dev/null\necho {END}\n")

    def wait(self, until: str = END) -> str:
        """What the commands begun print from now on, to their end or until a line has a text."""
        lines = list[str]()
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line == f"{END}\n":
                if until != END:  # the commands are over without it
                    break
                return "".join(lines)
            lines.append(line)
            if until in line:
                return "".join(lines)
        raise AssertionError(f"{self._command}\n{''.join(lines)}")

    def close(self) -> None:
        """End the shell."""
        self._process.kill()
        self._process.communicate()


class Machine:
    """A machine of its own, but for the network.

    Args:
        network: of which machine it has the network; None for one of its own.
    """

    def __init__(self, network: "Machine | None" = None) -> None:
        script = SETTLE.format(
            root=ROOT, python=sys.executable, shim=ROOT / "tests/e2e/systemctl.py"
        )
        apart = (
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            *(() if network else ("--net",)),
        )
        beside = ("nsenter", f"--net=/proc/{network.process}/ns/net") if network else ()
        command = [*beside, *apart, *as_anybody(), "bash", "-c", script]
        self._outside = subprocess.Popen(command, stdout=PIPE, stderr=STDOUT, text=True)
        assert self._outside.stdout is not None
        output = self._outside.stdout.readline()
        assert output == "settled\n", output
        (child,) = (
            Path(f"/proc/{self._outside.pid}/task/{self._outside.pid}/children").read_text().split()
        )
        self.process: int = int(child)
        self.etc = Path(f"/proc/{child}/root/etc/archipelago")
        self.shell = Shell(self.process)

    def end(self) -> None:
        """End the shell with all that runs in it."""
        self.shell.close()
        self._outside.kill()
        self._outside.communicate()


def blocks(first: int, last: int) -> list[tuple[set[str], str]]:
    """The blocks of the guide's sections: on which machines they are typed, and what."""
    sections = re.split(r"^## \d+\. ", GUIDE.read_text(), flags=re.MULTILINE)[first : last + 1]
    found = re.findall(
        r'^```bash title="(.+?)"\n(.*?)^```', "".join(sections), re.DOTALL | re.MULTILINE
    )
    return [(set(re.findall(r"[\w-]+", title)), text) for title, text in found]


def of_site(text: str, number: int) -> str:
    """What the guide says of site 0, for another."""
    return text.replace('0 "clinic A"', f'{number} "clinic {"AB"[number]}"').replace(
        "site-0", f"site-{number}"
    )


class Deployment:
    """A server and two sites, and their operators, who read the guide."""

    def __init__(self) -> None:
        self.server = Machine()
        self.sites = [Machine(self.server) for _ in range(2)]
        generator = torch.Generator().manual_seed(1)
        for site in self.sites:
            rows = torch.randn(200, 4, generator=generator).tolist()
            lines = [
                ",".join(f"{value:.4f}" for value in row) + f",{int(sum(row) > 0)}" for row in rows
            ]
            Path(f"/proc/{site.process}/root/srv/data.csv").write_text(
                "age,bp,chol,rate,target\n" + "\n".join(lines)
            )

    def type(self, kind: set[str], text: str) -> str:
        """Type a block of the guide on the machines that it is for."""
        output = list[str]()
        if "server" in kind:
            output += [
                self.server.shell.type(of_site(text, number))
                for number in range(2 if "site-0" in text else 1)
            ]
        for number, site in enumerate(self.sites):
            if kind & {"site", f"site-{number}"}:
                output.append(site.shell.type(of_site(text, number)))
        self.hand_over()
        return "".join(output)

    def hand_over(self) -> None:
        """What operators give each other, as soon as it is there."""

        def give(source: Path, target: Path) -> None:
            if source.exists() and target.parent.parent.exists():
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(source.read_bytes())

        for number, site in enumerate(self.sites):
            give(self.server.etc / "ca.crt", site.etc / "ca.crt")
            give(
                site.etc / f"hand-over/site-{number}.pub",
                self.server.etc / f"sites/site-{number}.pub",
            )
            for other in self.sites:
                if other is not site:
                    give(
                        site.etc / f"hand-over/site-{number}.sealing",
                        other.etc / f"neighbours/site-{number}.sealing",
                    )

    def start(self, settings: str) -> Shell:
        """Start a run in a shell of its own, which ends with its exit code."""
        shell = Shell(self.server.process)
        shell.type(
            "cd /opt/archipelago; export PATH=$PWD/.venv/bin:$PATH FLWR_HOME=/etc/archipelago/flwr"
        )
        common = (
            'model.name="mlp" data.source="csv" data.label="target" '
            'results.folder="/var/lib/archipelago/runs"'
        )
        shell.begin(
            f"code=0; python -m deploy.run -- --run-config '{common} {settings}' || code=$?; "
            "echo exit code $code"
        )
        return shell

    def end(self) -> None:
        """End all machines."""
        for machine in (*self.sites, self.server):
            machine.end()


@pytest.fixture(scope="module")
def deployed() -> Iterator[Deployment]:
    """As it is after the guide's first run."""
    deployment = Deployment()
    try:
        for kind, text in blocks(1, 6):
            output = deployment.type(kind, text)
        assert "co-learning after" in output
        yield deployment
    finally:
        deployment.end()


# Six rounds. Flower marks a message as delivered before it sends it: one that is on its way when
# the SuperLink is killed is lost, and its site asked again after timeout-s only.
GOING = "num-sites=2 epochs=12 co-learning.epsilon=0.0 timeout-s=120.0"


@pytest.mark.parametrize(
    "path",
    [
        "control/list-runs",
        "runtime/acquire-task",
        "fleet/../control/list-runs",
        "fleet/..%2fcontrol/list-runs",
    ],
)
def test_sites_reach_the_fleet_api_only(deployed: Deployment, path: str) -> None:
    ask = (
        "curl --silent --path-as-is --cacert /etc/archipelago/ca.crt --output /dev/null "
        "--write-out '%{http_code}\\n' -X POST"
    )
    shell = deployed.sites[0].shell
    assert shell.type(f"{ask} https://server.example.org:8000/v1/{path}") == "404\n"
    assert shell.type(f"{ask} https://server.example.org:8000/v1/fleet/pull-messages") != "404\n"


def test_units_are_right_and_harden(deployed: Deployment) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("not installed: systemd-analyze")
    for machine in (deployed.server, deployed.sites[0]):
        assert (
            machine.shell.type(
                "systemd-analyze verify /etc/archipelago/archipelago-*.{service,timer}"
            )
            == ""
        )
        # In tenths: 10 is a service that may do everything.
        machine.shell.type(
            "systemd-analyze security --offline=true --threshold=40 "
            "/etc/archipelago/archipelago-*.service"
        )


def test_compose_file_is_right(deployed: Deployment) -> None:
    commands = [["docker", "compose"], ["docker-compose"]]
    there = [
        each
        for each in commands
        if shutil.which(each[0])
        and not subprocess.run([*each, "version"], capture_output=True).returncode
    ]
    if not there:
        pytest.skip("not installed: docker compose")
    for machine in (deployed.server, deployed.sites[0]):
        machine.shell.type(f"{' '.join(there[0])} -f /etc/archipelago/compose.yaml config --quiet")


def test_run_goes_on_when_the_superlink_and_then_its_serverapp_are_killed(
    deployed: Deployment,
) -> None:
    with closing(deployed.start(GOING)) as run:
        run.wait("round   1")
        deployed.server.shell.type(
            "kill -KILL $(cut -d' ' -f2 /run/archipelago-superlink.service.pid)"
        )
        before = run.wait("round   3")
        deployed.server.shell.type("pkill -KILL -f flwr-serverapp")
        log = run.wait()
    assert "was killed" not in before
    assert "was killed: No heartbeat received" in log
    assert log.endswith("exit code 0\n")


@pytest.mark.parametrize(
    ("settings", "expected", "code"),
    [
        ("num-sites=0", "num-sites = 0: must be greater than or equal to 1", Exit.REFUSED),
        (
            "num-sites=1 min-sites=1",
            "num-sites = 1, but 2 sites are connected: set num-sites to their number",
            Exit.ENDED,
        ),
    ],
)
def test_run_that_cannot_be_says_why(
    deployed: Deployment, settings: str, expected: str, code: Exit
) -> None:
    with closing(deployed.start(settings)) as run:
        log = run.wait()
    assert log.endswith(f"{expected}\nexit code {code}\n")
    assert "Traceback" not in log


@pytest.mark.long
def test_rest_of_the_guide(deployed: Deployment) -> None:
    """A site is removed and changes its key while a run goes, and takes part in the next."""
    with closing(deployed.start(f"{GOING} min-sites=1")) as run:
        run.wait("round   1")
        for kind, text in blocks(7, 7):
            deployed.type(kind, text)
            if "unregister" in text:  # its key is never taken again
                output = deployed.server.shell.type(
                    "! flwr supernode register /etc/archipelago/sites/site-1.pub"
                )
                assert "already in use" in output
        log = run.wait()
    assert "clinic B (site 1) is left out" in log
    assert log.endswith("exit code 0\n")
    for kind, text in blocks(8, 9):
        output = deployed.type(kind, text)
        if "dmsgd" in text:
            assert "dmsgd after" in output
    # The nodes of the database that came back.
    listed = "flwr supernode list --format json"
    deployed.server.shell.type(
        f"until {listed} | grep --quiet '\"success\": true'; do sleep 1; done"
    )
    nodes = deployed.server.shell.type(listed)
    for site in range(2):
        (node,) = re.findall(
            r"\d{9,}", (deployed.server.etc / f"sites/site-{site}.json").read_text()
        )
        assert node in nodes
