"""``systemctl`` and ``journalctl`` for a test.

Units run as systemd would run them, as their users, and again when they end. What a unit forbids
itself (``ProtectSystem``, ``PrivateNetwork``, ...) needs systemd and is left out.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import suppress
from grp import getgrnam
from pathlib import Path
from pwd import getpwnam
from typing import NoReturn

LINKED = Path("/etc/systemd/system")
FOLDERS = {"State": "/var/lib", "Logs": "/var/log", "Cache": "/var/cache", "Runtime": "/run"}


class Unit:
    """A service.

    Args:
        name: with or without ``.service``.
    """

    def __init__(self, name: str) -> None:
        self.name = name if name.endswith(".timer") else name.removesuffix(".service") + ".service"
        self.log, self.pid = Path(f"/run/{self.name}.log"), Path(f"/run/{self.name}.pid")
        self.of = defaultdict[str, list[str]](list)
        text = re.sub(r"\\\n\s*", "", (LINKED / self.name).read_text()).replace("%C", "/var/cache")
        for key, value in re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE):
            self.of[key].append(value)

    def start(self) -> None:
        """Until its main process runs; of a ``oneshot``, until it ended."""
        with self.log.open("ab") as log:
            command = [sys.executable, __file__, "supervise", self.name]
            supervisor = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        while self.of["Type"] == ["oneshot"] or not self.pid.exists():
            if (code := supervisor.poll()) is not None:
                sys.exit(code and f"{self.name} failed: {self.log.read_text()}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Stop the unit, and wait until it has ended."""
        if self.pid.exists():
            os.kill(int(self.pid.read_text().split()[0]), signal.SIGTERM)
        while self.pid.exists():
            time.sleep(0.1)

    def supervise(self) -> NoReturn:
        """Start the unit's process, and again when it ended.

        The file has the numbers of this process and of the unit's.
        """

        def end(*_: object) -> NoReturn:
            raise SystemExit

        signal.signal(signal.SIGTERM, end)
        while True:
            for line in self.of["ExecStartPre"]:
                if code := self._run(line).wait():
                    sys.exit(code)
            process = self._run(self.of["ExecStart"][0])
            if self.of["Type"] == ["oneshot"]:
                sys.exit(process.wait())
            self.pid.write_text(f"{os.getpid()} {process.pid}")
            try:
                print(f"{self.name} ended with {process.wait()}", flush=True)
                self._end_rest(process.pid)
                time.sleep(float(self.of["RestartSec"][0]))
            except SystemExit:
                process.terminate()
                process.wait()
                self._end_rest(process.pid)
                self.pid.unlink()
                raise

    def _end_rest(self, group: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)

    def _run(self, line: str) -> "subprocess.Popen[bytes]":
        user = getpwnam((self.of["User"] or ["root"])[0])
        env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "OMP_NUM_THREADS": "1", "HOME": user.pw_dir}
        for each in self.of["Environment"]:
            env |= dict(pair.split("=", 1) for pair in shlex.split(each))
        for kind, place in FOLDERS.items():
            for name in self.of[f"{kind}Directory"]:
                (Path(place) / name).mkdir(exist_ok=True)
                (Path(place) / name).chmod(int((self.of[f"{kind}DirectoryMode"] or ["755"])[0], 8))
                os.chown(Path(place) / name, user.pw_uid, user.pw_gid)
        groups = [
            getgrnam(name).gr_gid
            for each in self.of["SupplementaryGroups"]
            for name in each.split()
        ]
        return subprocess.Popen(
            shlex.split(line),
            cwd=(self.of["WorkingDirectory"] or ["/"])[0],
            env=env,
            user=user.pw_uid,
            group=user.pw_gid,
            extra_groups=groups,
            umask=int((self.of["UMask"] or ["022"])[0], 8),
            start_new_session=True,
        )


def main(verb: str, *arguments: str) -> None:
    """The command line."""
    names = [each for each in arguments if not each.startswith("-")]
    for name in names:
        if name == "nginx":  # Debian's unit, of a kind that is not run here
            running = Path("/run/nginx.pid").exists() and Path("/run/nginx.pid").read_text()
            subprocess.run(["nginx", "-s", "reload"] if running else ["nginx"], check=True)
            continue
        if verb in ("link", "enable") and name.startswith("/"):
            (LINKED / Path(name).name).symlink_to(name)
        unit = Unit(Path(name).name)
        if verb == "is-active":
            print("active" if unit.pid.exists() else sys.exit("inactive"))
        elif verb == "journal":
            print(unit.log.read_text())
        elif verb == "supervise":
            unit.supervise()
        elif verb not in ("link", "daemon-reload") and not name.endswith(".timer"):
            if verb in ("stop", "restart"):
                unit.stop()
            if verb != "stop":
                unit.start()


if __name__ == "__main__":
    main(*sys.argv[1:])
