"""Faults on real processes at random moments.

Does the run end, with the right model, and what did it cost?

    python -m benchmarks.faults [--trials 12] [--seed 1] [--only "all killed" ...]

A SuperLink with its database and a SuperExec, as the units of ``deploy/server`` start them, three
SuperNodes with site services that reach the SuperLink through a TCP proxy, and the start command of
``deploy/``. A supervisor starts what died again, as systemd would. Trials take turns through the
faults; in each, one happens, at a moment drawn from the time that an undisturbed run takes, and the
run is compared with that run: Co-learning, with ``min-sites`` = 3, must end with the same model,
bit for bit.

A full disk needs root: a file system of its own for results and sites. A clock that jumps needs a
C compiler.
"""

import argparse
import asyncio
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread, Timer
from typing import NamedTuple

import psutil
import torch

from benchmarks.deployment import FREE
from simulation.laboratory import Run
from tests.e2e.processes import SITES, Deployment, Services, free_port

ROUNDS = 6
SETTINGS = (
    'strategy="co-learning" co-learning.local-epochs=1 co-learning.epsilon=0.0 '
    f'epochs={ROUNDS} model.name="mlp" '
    f"num-sites={SITES} min-sites={SITES}"
)
BACK_OFF_S = 2.0
LASTS_S = 60.0  # what does not kill
LONGEST_S = 900.0  # of a trial


class Supervisor(Thread):
    """A thread that restarts processes that died."""

    def __init__(self, deployment: Deployment, services: Services) -> None:
        super().__init__(daemon=True)
        self._deployment, self._services = deployment, services
        self.over = Event()

    def run(self) -> None:
        """Restart what died, until it is stopped."""
        while not self.over.wait(BACK_OFF_S):
            for name in self._deployment.names:
                if not self._deployment.running(name):
                    self._deployment.restart(name)
            for site in range(SITES):
                if not self._services.running(site):
                    self._services.start(site)


def named(program: str) -> list[psutil.Process]:
    """Processes of a program of Flower that this one started, at whatever remove."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any(program in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:  # it ended just now
            continue
    return found


class Link(Thread):
    """A TCP proxy on the way to an address.

    Args:
        target: host:port.

    Attributes:
        address: its own.
    """

    def __init__(self, target: str) -> None:
        super().__init__(daemon=True)
        self._host, self._port = target.split(":")
        self._own = free_port()
        self.address = f"127.0.0.1:{self._own}"
        self._loop, self._writers = asyncio.new_event_loop(), set[asyncio.StreamWriter]()
        self._flows, self._up = asyncio.Event(), True
        self._flows.set()

    def run(self) -> None:
        """Forward connections until the process ends."""
        self._loop.run_until_complete(asyncio.start_server(self._accept, "127.0.0.1", self._own))
        self._loop.run_forever()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            if self._up:
                there, back = await asyncio.open_connection(self._host, int(self._port))
                await asyncio.gather(self._forward(reader, back), self._forward(there, writer))
        writer.close()

    async def _forward(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        self._writers.add(sink)
        with suppress(OSError):
            while data := await source.read(2**16):
                await self._flows.wait()
                sink.write(data)
                await sink.drain()
        self._writers.discard(sink)
        sink.close()

    def hang(self) -> None:
        """Keep connections open, but let nothing through for a minute."""
        self._loop.call_soon_threadsafe(self._flows.clear)
        time.sleep(LASTS_S)
        self._loop.call_soon_threadsafe(self._flows.set)

    def cut(self) -> None:
        """End all connections, and accept none for a minute."""
        self._up = False
        self._loop.call_soon_threadsafe(self._abort)
        time.sleep(LASTS_S)
        self._up = True

    def _abort(self) -> None:
        for each in self._writers:
            each.transport.abort()


class Clock:
    """The time of day of the server's processes.

    Args:
        folder: for what is needed.

    Attributes:
        env: with which these processes are started; empty where there is no C compiler.
    """

    def __init__(self, folder: Path) -> None:
        self._file, library = folder / "ahead", folder / "clock.so"
        self._file.write_text("0")
        source = Path(__file__).parent / "clock.c"
        command = ["cc", "-shared", "-fPIC", "-o", str(library), str(source)]
        with suppress(OSError, subprocess.CalledProcessError):
            subprocess.run(command, check=True)
        made = {"LD_PRELOAD": str(library), "CLOCK_AHEAD": str(self._file)}
        self.env = made if library.exists() else {}

    def jump(self) -> None:
        """An hour ahead, and after a minute back."""
        self._file.write_text("3600")
        time.sleep(LASTS_S)
        self._file.write_text("0")


class Disk:
    """A small file system.

    Args:
        path: where; without root, a folder as any other.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=256m,mode=755", "none", str(path)]
        self.own = (
            os.getuid() == 0
            and subprocess.run(mount, capture_output=True, check=False).returncode == 0
        )

    def fill(self) -> None:
        """Fill the disk for a minute."""
        with (self.path / "fill").open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(2**12)):
                pass
        time.sleep(LASTS_S)
        (self.path / "fill").unlink()

    def end(self) -> None:
        """Unmount the disk."""
        if self.own:
            subprocess.run(["umount", "--lazy", str(self.path)], check=False)


class Faults:
    """The kinds of faults, each a function that causes it.

    Args:
        deployment, services: to whom.
        links, disk, clock: of the sites; of the server's results and the sites; of the server.
        choose: draws.
    """

    def __init__(
        self,
        deployment: Deployment,
        services: Services,
        links: Sequence[Link],
        disk: Disk,
        clock: Clock,
        choose: random.Random,
    ) -> None:
        self._deployment, self._services, self._choose = deployment, services, choose
        self.kinds: dict[str, Callable[[], None]] = {
            "service killed": lambda: services.kill(choose.randrange(SITES)),
            "ClientApp killed": lambda: self._kill("flwr-clientapp"),
            "SuperNode killed": lambda: deployment.kill(f"supernode-{choose.randrange(SITES)}"),
            "all SuperNodes killed": self._all_supernodes,
            "ServerApp killed": lambda: self._kill("flwr-serverapp"),
            "SuperExec killed": lambda: deployment.kill("superexec"),
            "SuperLink killed": lambda: deployment.kill("superlink"),
            "all killed": self._all,
            "SuperNode stopped": self._stop,
            "link hangs": lambda: choose.choice(links).hang(),
            "link cut": lambda: choose.choice(links).cut(),
        }
        if disk.own:
            self.kinds["disks full"] = disk.fill
        if clock.env:
            self.kinds["clock jumps"] = clock.jump

    def _kill(self, program: str) -> None:
        while not (found := named(program)):  # a ClientApp lives as long as its message
            time.sleep(0.02)
        self._choose.choice(found).kill()

    def _all_supernodes(self) -> None:
        for site in range(SITES):
            self._deployment.kill(f"supernode-{site}")

    def _all(self) -> None:
        for site in range(SITES):
            self._services.kill(site)
        for name in self._deployment.names:
            if self._deployment.running(name):
                self._deployment.kill(name)

    def _stop(self) -> None:
        """A SuperNode, and its ClientApp with it, does nothing for a minute."""
        stopped = self._deployment.process(f"supernode-{self._choose.randrange(SITES)}")
        for process in (stopped, *stopped.children(recursive=True)):
            process.send_signal(signal.SIGSTOP)
        time.sleep(LASTS_S)
        for process in (*stopped.children(recursive=True), stopped):
            process.send_signal(signal.SIGCONT)


class Trial(NamedTuple):
    """The result of a run with a fault.

    Attributes:
        code: that the start command ended with; None where it had to be ended.
        seconds: that it took.
        folder: of its results; None for none.
    """

    code: int | None
    seconds: float
    folder: Path | None
    log: str


def run(
    deployment: Deployment,
    folder: Path,
    fault: Callable[[], None] | None = None,
    after_s: float = 0.0,
) -> Trial:
    """Run to the end; so many seconds after the first round something happens."""
    start, lines = time.monotonic(), list[str]()
    process = deployment.run(f'{SETTINGS} results.folder="{folder}"', followed=True)
    killer: Timer | None = None
    ending = Thread(target=_end_late, args=[process], daemon=True)
    ending.start()
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if fault and killer is None and line.startswith("round"):
            killer = Timer(after_s, fault)
            killer.daemon = True
            killer.start()
    code, seconds = process.wait(), time.monotonic() - start
    if killer:
        killer.join()  # what it does is over
    folders = sorted(path.parent for path in folder.glob("*/config.toml"))
    return Trial(
        None if seconds > LONGEST_S else code,
        seconds,
        folders[-1] if folders else None,
        "".join(lines),
    )


def _end_late(process: "subprocess.Popen[str]") -> None:
    try:
        process.wait(LONGEST_S)
    except subprocess.TimeoutExpired:
        process.kill()


def outcome(trial: Trial, reference: Run) -> str:
    """What became of a trial: "same model", or what went wrong."""
    if trial.code != 0 or trial.folder is None:
        return f"exit code {trial.code}: {trial.log.splitlines()[-1] if trial.log else 'no output'}"
    found = Run.load(trial.folder)
    rounds = found.metrics.query("metric == 'accuracy' and split == 'test' and site == 'all'")[
        "round"
    ].tolist()
    if rounds != list(range(1, ROUNDS + 1)):
        return f"rounds {rounds} in metrics.csv"
    same = all(torch.equal(found.model[name], value) for name, value in reference.model.items())
    return "same model" if same else "another model"


def main() -> None:
    """Print a row a trial."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*")
    arguments = parser.parse_args()
    choose = random.Random(arguments.seed)
    with TemporaryDirectory() as name:
        home, disk, clock = Path(name), Disk(Path(name) / "disk"), Clock(Path(name))
        deployment = Deployment(home, durable=True, server=clock.env)
        services = Services(
            disk.path, policy=FREE | {"runs-a-day": 1000}, data={"source": "digits"}
        )
        supervisor = Supervisor(deployment, services)
        links = [Link(deployment.address) for _ in range(SITES)]
        try:
            for site, link in enumerate(links):
                link.start()
                deployment.join(site, f'service="{services.socket(site)}"', address=link.address)
            whole = run(deployment, disk.path / "undisturbed")
            assert whole.folder is not None, whole.log
            reference = Run.load(whole.folder)
            supervisor.start()
            faults = Faults(deployment, services, links, disk, clock, choose)
            kinds = arguments.only or list(faults.kinds)
            print(
                f"undisturbed: {whole.seconds:.0f} s, exit code {whole.code}, "
                f"{outcome(whole, reference)}\n"
            )
            print("| | what | after s | ended | s more |\n|---|---|---|---|---|", flush=True)
            good = 0
            for number in range(arguments.trials):
                kind, moment = kinds[number % len(kinds)], choose.uniform(0, 0.6 * whole.seconds)
                trial = run(deployment, disk.path / f"trial-{number}", faults.kinds[kind], moment)
                end = outcome(trial, reference)
                good += end == "same model"
                more = trial.seconds - whole.seconds
                print(f"| {number + 1} | {kind} | {moment:.0f} | {end} | {more:.0f} |", flush=True)
                if end != "same model":
                    Path(f"fault-{number + 1}.log").write_text(trial.log)
            print(f"\n{good} of {arguments.trials} with the same model")
        finally:
            supervisor.over.set()
            deployment.end()
            services.end()
            disk.end()


if __name__ == "__main__":
    main()
