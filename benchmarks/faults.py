"""Faults on real processes: everything is killed at random moments; does the run end, with the right model, and what did it cost?

    python -m benchmarks.faults [--trials 10] [--seed 1] [--only serverapp superlink ...]

A SuperLink with its database and a SuperExec, as the units of ``deploy/server`` start them, three SuperNodes with site services,
and the start command of ``deploy/``. A supervisor starts what died again, as systemd would. Trials take turns through the faults;
each kills once, at a moment drawn from the time that an undisturbed run takes, and is compared with that run: Co-learning, with
``min-sites`` = 3, must end with the same model, bit for bit.
"""

import argparse
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread, Timer
from typing import Any, NamedTuple

import psutil
import torch

from benchmarks.deployment import FREE
from simulation.laboratory import Run
from tests.e2e.processes import SITES, Deployment, Services

ROUNDS = 6
SETTINGS = (
    f'strategy="co-learning" co-learning.local-epochs=1 co-learning.epsilon=0.0 epochs={ROUNDS} model.name="mlp" '
    f"num-sites={SITES} min-sites={SITES}"
)
BACK_OFF_S = 2.0
LONGEST_S = 900.0  # of a trial


class Supervisor(Thread):
    """Starts again what died."""

    def __init__(self, deployment: Deployment, services: Services) -> None:
        super().__init__(daemon=True)
        self._deployment, self._services = deployment, services
        self.over = Event()

    def run(self) -> None:
        """Look once in a while."""
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


class Faults:
    """What can happen.

    Args:
        deployment, services: to whom.
        choose: draws.
    """

    def __init__(self, deployment: Deployment, services: Services, choose: random.Random) -> None:
        self._deployment, self._services, self._choose = deployment, services, choose
        self.kinds: dict[str, Callable[[], None]] = {
            "service": lambda: services.kill(choose.randrange(SITES)),
            "clientapp": lambda: self._kill("flwr-clientapp"),
            "supernode": lambda: deployment.kill(f"supernode-{choose.randrange(SITES)}"),
            "all supernodes": self._all_supernodes,
            "serverapp": lambda: self._kill("flwr-serverapp"),
            "superlink": lambda: deployment.kill("superlink"),
            "all": self._all,
            "hang": self._hang,
        }

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

    def _hang(self) -> None:
        """A SuperNode, and its ClientApp with it, does nothing for a minute."""
        stopped = self._deployment.process(f"supernode-{self._choose.randrange(SITES)}")
        for process in (stopped, *stopped.children(recursive=True)):
            process.send_signal(signal.SIGSTOP)
        time.sleep(60)
        for process in (*stopped.children(recursive=True), stopped):
            process.send_signal(signal.SIGCONT)


class Trial(NamedTuple):
    """How a run went.

    Attributes:
        code: that the start command ended with; None where it had to be ended.
        seconds: that it took.
        folder: of its results; None for none.
    """

    code: int | None
    seconds: float
    folder: Path | None
    log: str


def run(deployment: Deployment, folder: Path, fault: Callable[[], None] | None = None, after_s: float = 0.0) -> Trial:
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
    code = process.wait()
    folders = sorted(path.parent for path in folder.glob("*/config.toml"))
    late = time.monotonic() - start > LONGEST_S
    return Trial(None if late else code, time.monotonic() - start, folders[-1] if folders else None, "".join(lines))


def _end_late(process: "subprocess.Popen[str]") -> None:
    try:
        process.wait(LONGEST_S)
    except subprocess.TimeoutExpired:
        process.kill()


def outcome(trial: Trial, reference: Run) -> str:
    """Whether it is what was to be."""
    if trial.code != 0 or trial.folder is None:
        return f"exit code {trial.code}: {trial.log.splitlines()[-1] if trial.log else 'nothing said'}"
    found = Run.load(trial.folder)
    rounds = found.metrics.query("metric == 'accuracy' and split == 'test' and site == 'all'")["round"].tolist()
    if rounds != list(range(1, ROUNDS + 1)):
        return f"rounds {rounds} in metrics.csv"
    same = all(torch.equal(found.model[name], value) for name, value in reference.model.items())
    return "same model" if same else "another model"


def main() -> None:
    """Print a row a trial."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*")
    arguments = parser.parse_args()
    choose = random.Random(arguments.seed)
    with TemporaryDirectory() as name:
        home = Path(name)
        deployment = Deployment(home, durable=True)
        services = Services(home, policy=FREE | {"runs-a-day": 1000}, data={"source": "digits"})
        supervisor = Supervisor(deployment, services)
        try:
            for site in range(SITES):
                deployment.join(site, f'service="{services.socket(site)}"')
            whole = run(deployment, home / "undisturbed")
            assert whole.folder is not None, whole.log
            reference = Run.load(whole.folder)
            supervisor.start()
            faults = Faults(deployment, services, choose)
            kinds: list[Any] = arguments.only or list(faults.kinds)
            print(f"undisturbed: {whole.seconds:.0f} s, exit code {whole.code}, {outcome(whole, reference)}\n")
            print("| | what | after s | ended | s more |\n|---|---|---|---|---|", flush=True)
            good = 0
            for number in range(arguments.trials):
                kind, moment = kinds[number % len(kinds)], choose.uniform(0, 0.6 * whole.seconds)
                trial = run(deployment, home / f"trial-{number}", faults.kinds[kind], moment)
                said = outcome(trial, reference)
                good += said == "same model"
                more = trial.seconds - whole.seconds
                print(f"| {number + 1} | {kind} | {moment:.0f} | {said} | {more:.0f} |", flush=True)
            print(f"\n{good} of {arguments.trials} with the same model")
        finally:
            supervisor.over.set()
            deployment.end()
            services.end()


if __name__ == "__main__":
    main()
