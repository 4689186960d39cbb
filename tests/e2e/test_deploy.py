"""The guide docs/how-to/deploy.md, typed as it stands: a server and two sites, machines of their own but for the network."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE, STDOUT

import pytest
import torch

from tests.conftest import ROOT
from tests.e2e.processes import as_anybody, as_user

END = "@@ that was it"
GUIDE = ROOT / "docs/how-to/deploy.md"
PROGRAMS = ("nginx", "logrotate", "curl", "unshare", "nsenter", "ip", "useradd")
MISSING = [name for name in PROGRAMS if shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin") is None]
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0 or not as_user(65534), reason="only root can act as several users"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]
# Folders of its own over the machine's, and this checkout where the guide has it.
SETTLE = """
set -e
mount -t tmpfs none /opt && mkdir /opt/archipelago && mount --bind {root} /opt/archipelago
mount -t tmpfs none /mnt && cp -a /etc /mnt/etc && mount --bind /mnt/etc /etc
for folder in /run /srv /var/log /var/lib /var/cache /var/backups; do mount -t tmpfs -o mode=755 none $folder; done
mkdir -p /var/lib/nginx /var/log/nginx /etc/systemd/system /mnt/bin
rm -f /etc/nginx/sites-enabled/* /etc/nginx/conf.d/*
echo '127.0.0.1 server.example.org' >> /etc/hosts
for name in systemctl journalctl; do
    printf '#!/bin/sh\\nexec {python} {shim} %s "$@"\\n' "$(test $name = systemctl || echo journal)" > /mnt/bin/$name
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
        enter = ["nsenter", f"--target={process}", "--mount", "--net", "--pid", "bash", "-euo", "pipefail"]
        self._process = subprocess.Popen(enter, stdin=PIPE, stdout=PIPE, stderr=STDOUT, text=True, bufsize=1)
        self.type("export PATH=/mnt/bin:/usr/sbin:/usr/bin:/sbin:/bin OMP_NUM_THREADS=1; cd /")

    def type(self, text: str) -> str:
        """What commands print; the first that fails fails the test."""
        return self.wait(self.begin(text))

    def begin(self, text: str) -> str:
        """Do not wait for the end."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{{\n{text}\n}} < /dev/null\necho {END}\n")
        return text

    def end(self) -> None:
        """Close it."""
        self._process.kill()
        self._process.communicate()

    def wait(self, text: str, until: str = END) -> str:
        """What the commands that were begun print, until a line has a text."""
        lines = list[str]()
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line == f"{END}\n" or until in line:
                return "".join(lines) + line.removesuffix(f"{END}\n")
            lines.append(line)
        raise AssertionError(f"{text}\n{''.join(lines)}")


class Machine:
    """A machine of its own, but for the network.

    Args:
        network: of which machine it has the network; None for one of its own.
    """

    def __init__(self, network: "Machine | None" = None) -> None:
        script = SETTLE.format(root=ROOT, python=sys.executable, shim=ROOT / "tests/e2e/systemctl.py")
        apart = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", *(() if network else ("--net",)))
        beside = ("nsenter", f"--net=/proc/{network.process}/ns/net") if network else ()
        command = [*beside, *apart, *as_anybody(), "bash", "-c", script]
        self._outside = subprocess.Popen(command, stdout=PIPE, stderr=STDOUT, text=True)
        assert self._outside.stdout is not None
        said = self._outside.stdout.readline()
        assert said == "settled\n", said
        (child,) = Path(f"/proc/{self._outside.pid}/task/{self._outside.pid}/children").read_text().split()
        self.process: int = int(child)
        self.etc = Path(f"/proc/{child}/root/etc/archipelago")
        self.shell = Shell(self.process)

    def end(self) -> None:
        """End it with all that runs there."""
        self.shell.end()
        self._outside.kill()
        self._outside.communicate()


def blocks() -> list[tuple[set[str], str]]:
    """The guide's blocks: on which machines they are typed, and what."""
    found = re.findall(r"^```bash (.+?)\n(.*?)^```", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    return [(set(kind.split()), text) for kind, text in found]


def of_site(text: str, number: int) -> str:
    """What the guide says of site 0, for another."""
    return text.replace('0 "clinic A"', f'{number} "clinic {"AB"[number]}"').replace("site-0", f"site-{number}")


def hand_over(server: Machine, sites: list[Machine]) -> None:
    """What operators give each other, as soon as it is there."""

    def give(source: Path, target: Path) -> None:
        if source.exists() and target.parent.exists() and not target.exists():
            target.write_bytes(source.read_bytes())

    for number, site in enumerate(sites):
        give(server.etc / "ca.crt", site.etc / "ca.crt")
        for folder in (server.etc / "sites", site.etc / "neighbours"):
            if folder.parent.exists():
                folder.mkdir(exist_ok=True)
        give(site.etc / f"hand-over/site-{number}.pub", server.etc / f"sites/site-{number}.pub")
        for other in sites:
            if other is not site:
                give(site.etc / f"hand-over/site-{number}.sealing", other.etc / f"neighbours/site-{number}.sealing")


def test_guide() -> None:
    """Every block of it, by the operators of a server and of two sites."""
    machines = [server := Machine(), *(sites := [Machine(server) for _ in range(2)])]
    generator = torch.Generator().manual_seed(1)
    try:
        for site in sites:
            rows = torch.randn(200, 4, generator=generator)
            lines = [",".join(f"{value:.4f}" for value in row) + f",{int(sum(row) > 0)}" for row in rows.tolist()]
            Path(f"/proc/{site.process}/root/srv/data.csv").write_text("age,bp,chol,rate,target\n" + "\n".join(lines))
        said = list[str]()
        for kind, text in blocks():
            if "server" in kind:
                for number in range(len(sites) if "site-0" in text else 1):
                    said.append(server.shell.type(of_site(text, number)))
            if "site" in kind:
                said += [site.shell.type(of_site(text, number)) for number, site in enumerate(sites)]
            hand_over(server, sites)
        print("\n=====\n".join(said))
    finally:
        for machine in machines:
            machine.end()
