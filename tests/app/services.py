"""Site services in processes of their own, and who sends them requests."""

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tomli_w
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

from client_app.app import app as client_app
from client_app.service import main as serve
from configuration.config import Config, configuration
from configuration.flower import TaskIdentity
from server_app.app import run as run_server
from server_app.results import History
from simulation.grid import VirtualGrid
from simulation.world import World
from strategies.records import pack
from tests.conftest import ROOT

SITES = 3
PATIENCE_S = 5
RUN_IDS = iter(range(100, 10**6))

# Processes that have imported all this are forked: a service starts in a moment.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload([__name__])


class _Forked:
    """The part of ``subprocess.Popen`` that tests need."""

    def __init__(self, file: Path, log: Path) -> None:
        self._process = FORK.Process(target=_serve, args=[file, log, dict(os.environ)])
        self._process.start()
        assert self._process.pid
        self.pid, self.kill, self.terminate = (
            self._process.pid,
            self._process.kill,
            self._process.terminate,
        )

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, seconds: float | None = None) -> int | None:
        self._process.join(seconds)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def _serve(file: Path, log: Path, environment: dict[str, str]) -> None:
    """Run ``python -m client_app.service`` in this process."""
    with log.open("a") as target:
        for stream in (1, 2):
            os.dup2(target.fileno(), stream)
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = ["service", str(file)]
    serve()


class Service:
    """A service in a process of its own."""

    process: "_Forked | subprocess.Popen[bytes]"

    def __init__(self, folder: Path, *, processes: int = 1, **keys: Any) -> None:
        # Flower's messages need one.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = (1, 1, 1)
        self._processes = processes
        self.socket, self.audit = str(folder / "site.sock"), folder / "audit.jsonl"
        self.file, self.log = folder / "site.toml", folder / "log"
        common = {
            "site": 1,
            "socket": self.socket,
            "audit": str(self.audit),
            "data": {"source": "digits"},
        }
        self.file.write_text(tomli_w.dumps(common | keys))
        self.start()

    def start(self) -> None:
        several = [
            "torch.distributed.run",
            "--standalone",
            "--max-restarts=3",
            f"--nproc-per-node={self._processes}",
            "-m",
        ]
        Path(self.socket).unlink(missing_ok=True)  # of one that was killed
        if self._processes == 1:
            self.process = _Forked(self.file, self.log)
        else:
            with self.log.open("a") as log:
                command = [sys.executable, "-m", *several, "client_app.service", str(self.file)]
                self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        while not Path(self.socket).exists():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)

    def lines(self) -> list[dict[str, Any]]:
        """The audit log: a line for each request, and one for its answer."""
        return (
            [json.loads(line) for line in self.audit.read_text().splitlines()]
            if self.audit.exists()
            else []
        )

    def end(self) -> None:
        """As an operator does, who has patience where torchrun ends processes of its own."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE_S if self._processes == 1 else None)
        self.process.kill()  # one that hangs, as some tests want it
        self.process.wait()


def deployed(config: Config, **of_sites: str) -> History:
    """A run of deployed sites; those named by ``site_N`` have a service at a socket."""
    history = History(config)
    grid = VirtualGrid(client_app, World().sites(SITES, 1), config.flat())
    run = next(RUN_IDS)
    for number, context in enumerate(grid.contexts.values()):
        context.run_id = run
        path = of_sites.get(f"site_{number}")
        context.node_config = {"service": path} if path else {"site": number, "data": ""}
    run_server(grid, config, history)
    return history


def config_of(strategy: str, **keys: Any) -> Config:
    return configuration(
        strategy=strategy, num_sites=SITES, epochs=2, model={"name": "mlp"}, **keys
    )


def answer_to(
    service: Service,
    run_config: dict[str, Any],
    kind: str = "query.site",
    content: RecordDict | None = None,
) -> Message:
    context = Context(next(RUN_IDS), 5, {"service": service.socket}, RecordDict(), run_config)
    return client_app(Message(content or RecordDict(), dst_node_id=5, message_type=kind), context)


def fault(reply: Message) -> str:
    """The reason of a reply that is an error; empty where it is none."""
    return str(reply.error.reason) if reply.has_error() else ""


def flat(strategy: str = "fedavg", **keys: Any) -> dict[str, Any]:
    return config_of(strategy, **keys).flat()


def order(config: dict[str, Any], size: int, **keys: Any) -> RecordDict:
    fields = {
        "server-round": 1,
        "classes": list("0123456789"),
        "lr": 0.05,
        "cycle-from": 0.0,
        "cycle-to": 1.0,
        **keys,
    }
    return RecordDict({"arrays": pack({"x": torch.zeros(size)}), "config": ConfigRecord(fields)})
