"""The site service: a letter's way through the socket, the operator's rules, and what the server hears when it is not there."""

import contextlib
import grp
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import tomli_w
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client_app.app import app as client_app
from configuration.config import Config, configuration
from server_app.app import run as run_server
from server_app.results import History
from simulation.grid import VirtualGrid
from simulation.world import World
from strategies.records import pack
from tests.conftest import ROOT

pytestmark = pytest.mark.slow
SITES = 3


class Service:
    """A service in a process of its own."""

    def __init__(self, folder: Path, **keys: Any) -> None:
        self.socket, self.audit = str(folder / "site.sock"), folder / "audit.jsonl"
        self.file, self.log = folder / "site.toml", folder / "log"
        common = {"site": 1, "socket": self.socket, "audit": str(self.audit), "data": {"source": "digits"}}
        self.file.write_text(tomli_w.dumps(common | keys))
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "client_app.service", str(self.file)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        while not Path(self.socket).exists():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)

    def lines(self) -> list[dict[str, Any]]:
        """The audit log: a line for each letter, and one for its answer."""
        return [json.loads(line) for line in self.audit.read_text().splitlines()]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def service(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Service]:
    found = Service(tmp_path, **getattr(request, "param", {}))
    yield found
    found.end()


def deployed(config: Config, **of_sites: str) -> History:
    """A run of deployed sites; those named by ``site_N`` have a service at a socket."""
    history = History(config)
    grid = VirtualGrid(client_app, World().sites(SITES, 1), config.flat())
    for number, context in enumerate(grid.contexts.values()):
        path = of_sites.get(f"site_{number}")
        context.node_config = {"service": path} if path else {"site": number, "data": ""}
    run_server(grid, config, history)
    return history


def config_of(strategy: str, **keys: Any) -> Config:
    return configuration(strategy=strategy, num_sites=SITES, epochs=2, model={"name": "mlp"}, **keys)


@pytest.mark.parametrize(
    "config",
    [
        config_of("co-learning", co_learning={"local_epochs": 1}),
        config_of("scaffold", scaffold={"local_epochs": 1}),
        config_of("diloco", diloco={"local_steps": 9}, training={"optimizer": "adamw"}),
        config_of("gsgm"),
        config_of("dmsgd", wire={"sealing": "trust-on-first-use"}),
        config_of("q-saddle", wire={"codec": "qsgd", "error_feedback": "choco"}, topology={"averaging_rate": 0.5}),
    ],
    ids=lambda config: config.strategy,
)
@pytest.mark.parametrize("service", [{"policy": {"decimals": 17}}], indirect=True, ids=[""])
def test_answers_are_those_of_the_handlers_bit_for_bit(config: Config, service: Service) -> None:
    through, inside = deployed(config, site_1=service.socket), deployed(config)
    assert through.models.keys() == inside.models.keys()
    for name, model in inside.models.items():
        assert all(torch.equal(value, through.models[name][key]) for key, value in model.items())
    accuracy = "metric == 'accuracy'"
    assert through.metrics.query(accuracy)["value"].tolist() == inside.metrics.query(accuracy)["value"].tolist()
    assert {line["kind"] for line in service.lines()} >= {"query.site"}
    assert not [line for line in service.lines() if "problem" in line or "rule" in line]


# --- the operator's rules ---------------------------------------------------------------------------------------------

STRICT = {
    "strategies": ["fedavg", "local", "asgd", "dmsgd"],
    "models": ["mlp"],
    "smallest-batch": 16,
    "smallest-steps": 2,
    "smallest-examples": 64,
    "largest-model": 6000,
    "seconds": 20.0,
    "runs-a-day": 1000,
}


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # Flower's messages need one
    found = Service(tmp_path_factory.mktemp("site"), policy=STRICT)
    yield found
    found.end()


RUN_IDS = iter(range(100, 10**6))


def answer_to(service: Service, run_config: dict[str, Any], kind: str = "query.site", content: RecordDict | None = None) -> Message:
    context = Context(next(RUN_IDS), 5, {"service": service.socket}, RecordDict(), run_config)
    return client_app(Message(content or RecordDict(), dst_node_id=5, message_type=kind), context)


def said(reply: Message) -> str:
    """What is wrong, or nothing."""
    return str(reply.error.reason) if reply.has_error() else ""


def flat(strategy: str = "fedavg", **keys: Any) -> dict[str, Any]:
    return config_of(strategy, **keys).flat()


@pytest.mark.parametrize(
    ("run_config", "rule"),
    [
        (flat("gsgm"), "strategy = 'gsgm': this site's policy has strategies = ["),
        (flat() | {"model.name": "cnn"}, "model.name = 'cnn': this site's policy has models = ['mlp']"),
        (flat() | {"training.batch-size": 8}, "training.batch-size = 8: this site's policy has smallest-batch = 16"),
        (flat("asgd"), "an answer after 1 batches: this site's policy has smallest-steps = 2"),
        (
            flat("dmsgd", dmsgd={"local_steps": 2}) | {"training.batch-size": 16},
            "after 32 examples: this site's policy has smallest-examples",
        ),
        (flat() | {"strategy": "os:system"}, "strategy = 'os:system': this site's policy has import-paths = []"),
        (flat() | {"model.name": "this:x"}, "model.name = 'this:x': this site's policy has import-paths = []"),
        (flat("dmsgd") | {"wire.codec": "os:path"}, "wire.codec = 'os:path': this site's policy has import-paths = []"),
        (flat("dmsgd") | {"topology.name": "os:path"}, "topology.name = 'os:path': this site's policy has import-paths = []"),
        (flat() | {"partition.kind": "os:path"}, "partition.kind = 'os:path': this site's policy has import-paths = []"),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_refusal_names_the_rule(run_config: dict[str, Any], rule: str, strict: Service) -> None:
    reply = answer_to(strict, run_config)
    assert reply.has_error()
    assert "refused by this site's policy: " in said(reply)
    assert rule in said(reply)
    assert rule in strict.lines()[-1]["rule"]


def order(config: dict[str, Any], size: int, **keys: Any) -> RecordDict:
    told = {"server-round": 1, "classes": list("0123456789"), "lr": 0.05, "cycle-from": 0.0, "cycle-to": 1.0, **keys}
    return RecordDict({"arrays": pack({"x": torch.zeros(size)}), "config": ConfigRecord(told)})


def test_orders_are_held_to_the_rules(strict: Service) -> None:
    for strategy in ("fedavg", "local"):  # a site that learns alone sends its model, too
        reply = answer_to(strict, flat(strategy), "train", order({}, 4810, **{"local-steps": 1}))
        assert "an answer after 1 batches: this site's policy has smallest-steps = 2" in said(reply)
    assert not answer_to(strict, flat(), "train", order({}, 4810, **{"local-steps": 2})).has_error()


def test_data_are_the_sites_whatever_a_run_says(strict: Service, tmp_path: Path) -> None:
    """The run's are not looked at: neither read nor imported nor called."""
    mark = tmp_path / "mark"
    honest = answer_to(strict, flat())
    for data in (
        {"data.source": "os:system", "data.path": f"touch {mark}"},
        {"data.source": "shutil:rmtree", "data.path": str(tmp_path)},
        {"data.source": "csv", "data.path": "/etc/passwd", "data.label": f"@__import__('os').system('touch {mark}')"},
        {"data.test-part": "pooled", "data.test-fraction": 0.9, "data.group": "(a+)+$"},
    ):
        assert answer_to(strict, flat() | data).content["config"] == honest.content["config"]
    assert tmp_path.exists()
    assert not mark.exists()


def test_memory_of_a_run_is_open_to_its_configuration_only(strict: Service) -> None:
    run = next(RUN_IDS)
    for changes, refused in ((flat(), False), (flat() | {"seed": 2}, True), (flat(), False)):
        context = Context(run, 5, {"service": strict.socket}, RecordDict(), changes)
        reply = client_app(Message(RecordDict(), dst_node_id=5, message_type="query.site"), context)
        assert reply.has_error() == refused
    assert "has another configuration than in its first letter" in strict.lines()[-3]["rule"]


@pytest.mark.parametrize("service", [{"policy": {"runs-a-day": 2}}], indirect=True)
def test_runs_of_a_day_are_counted(service: Service) -> None:
    """Those that are refused did not begin."""
    assert [answer_to(service, flat() | {"training.batch-size": 1}).has_error() for _ in range(3)] == [True] * 3
    assert [answer_to(service, flat()).has_error() for _ in range(3)] == [False, False, True]
    assert "runs-a-day = 2" in service.lines()[-1]["rule"]


def test_what_cannot_be_written_down_does_not_leave(tmp_path: Path) -> None:
    """And the service goes on."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    service = Service(tmp_path, audit="/dev/full")
    for _ in range(2):
        assert "the site's audit log cannot be written: [Errno 28] No space left" in said(answer_to(service, flat()))
    service.end()


# --- a service that is not there --------------------------------------------------------------------------------------


def test_server_hears_what_is_wrong_with_a_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    service = Service(tmp_path, policy={"seconds": 5.0})
    long = order({}, 4810, **{"local-epochs": 100_000})

    reply = answer_to(service, flat(), "train", long)
    assert "refused by this site's policy: seconds = 5: the work takes longer" in said(reply)
    assert not answer_to(service, flat()).has_error()  # it goes on

    monkeypatch.setattr("client_app.letter.SILENCE_S", 2.0)
    service.process.send_signal(signal.SIGSTOP)
    assert "has been silent for 2 s: it hangs" in said(answer_to(service, flat()))
    service.process.send_signal(signal.SIGCONT)
    monkeypatch.undo()

    before = len(service.lines())
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(answer_to, service, flat(), "train", long)
        while len(service.lines()) == before:
            time.sleep(0.05)
        service.end()
        assert "died at work or was restarted" in said(waiting.result())
    assert "is away: nobody listens at" in said(answer_to(service, flat()))

    Path(service.socket).unlink()
    service.start()
    assert not answer_to(service, flat()).has_error()
    service.end()


def test_letters_that_are_none_do_no_harm(strict: Service) -> None:
    """Whoever may open the socket may write anything into it."""
    for rubbish in (
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"H" + (2**63).to_bytes(8, "big"),
        b"H" + (4).to_bytes(8, "big") + b"null",
        b"\x80\x04",
    ):
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(strict.socket)
            line.sendall(rubbish)
    assert not answer_to(strict, flat()).has_error()


# --- two users --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as two users")
def test_user_who_carries_letters_can_read_nothing_else() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    with TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        private = folder / "private"
        private.mkdir(mode=0o700)
        table = private / "heart.csv"
        table.write_text("age,label\n" + "\n".join(f"{age},{age % 2}" for age in range(200)))
        group = grp.getgrgid(65534).gr_name
        service = Service(folder, data={"source": "csv", "path": str(table)}, state=str(private / "state"), group=group)
        config = config_of("dmsgd").flat()

        def attack() -> str:
            for path in (table, private / "state"):
                with contextlib.suppress(PermissionError):
                    path.stat()
                    return f"{path} was found"
            return said(answer_to(service, config)) or "answered"

        assert as_user(65534, 65534, attack) == "answered"
        assert "this user must not open" in as_user(65533, 65533, attack)
        service.end()


def as_user(user: int, group: int, act: Callable[[], str]) -> str:
    """What ``act`` returns in a process of another user."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        try:
            os.setgroups([])
            os.setgid(group)
            os.setuid(user)
            found = act()
        except BaseException as error:
            found = f"{type(error).__name__}: {error}"
        os.write(writer, found.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as text:
        found = text.read()
    os.waitpid(child, 0)
    return found
