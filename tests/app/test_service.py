"""The site service: a request's way through the socket, and the operator's rules.

And what the server is told when the service is not there.
"""

import contextlib
import grp
import json
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import urlopen

import psutil
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

from client_app import framing
from client_app import service as site_service
from client_app.app import app as client_app
from client_app.oracle import Oracle
from client_app.policy import SHARDS, SiteFile
from client_app.privacy import Account, Noise
from client_app.service import READERS
from client_app.site import SiteId, network_of, raw_data
from configuration.config import Config
from configuration.flower import TaskIdentity
from strategies.records import metrics_of, pack
from tests.app.services import (
    RUN_IDS,
    Service,
    answer_to,
    config_of,
    deployed,
    fault,
    flat,
    order,
)
from tests.conftest import ROOT
from tests.e2e.processes import free_port

pytestmark = pytest.mark.slow


@pytest.fixture
def service(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Service]:
    found = Service(tmp_path, **getattr(request, "param", {}))
    yield found
    found.end()


@pytest.mark.parametrize(
    "config",
    [
        config_of("co-learning", co_learning={"local_epochs": 1}),
        config_of("scaffold", scaffold={"local_epochs": 1}),
        config_of("diloco", diloco={"local_steps": 9}, training={"optimizer": "adamw"}),
        config_of("gsgm"),
        config_of("dmsgd", wire={"sealing": "trust-on-first-use"}),
        config_of(
            "q-saddle",
            wire={"codec": "qsgd", "error_feedback": "choco"},
            topology={"averaging_rate": 0.5},
        ),
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
    assert (
        through.metrics.query(accuracy)["value"].tolist()
        == inside.metrics.query(accuracy)["value"].tolist()
    )
    assert {line["kind"] for line in service.lines()} >= {"query.site"}
    assert not [line for line in service.lines() if "problem" in line or "rule" in line]


# --- the operator's rules -------------------------------------------------------------------------

STRICT = {
    "strategies": ["fedavg", "local", "asgd", "dmsgd"],
    "models": ["mlp", "gpt"],
    "smallest-batch": 16,
    "smallest-steps": 2,
    "smallest-examples": 64,
    "largest-model": 6000,
    "seconds": 20.0,
    "runs-a-day": 1000,
}


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    # Flower's messages need one.
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = (1, 1, 1)
    found = Service(tmp_path_factory.mktemp("site"), policy=STRICT)
    yield found
    found.end()


@pytest.mark.parametrize(
    ("run_config", "rule"),
    [
        (flat("gsgm"), "strategy = 'gsgm': this site's policy has strategies = ["),
        (
            flat() | {"model.name": "cnn"},
            "model.name = 'cnn': this site's policy has models = ['mlp', 'gpt']",
        ),
        (
            flat() | {"training.batch-size": 8},
            "training.batch-size = 8: this site's policy has smallest-batch = 16",
        ),
        (flat("asgd"), "an answer after 1 batches: this site's policy has smallest-steps = 2"),
        (
            flat("dmsgd", dmsgd={"local_steps": 2}) | {"training.batch-size": 16},
            "after 32 examples: this site's policy has smallest-examples",
        ),
        (
            flat() | {"training.task": "os:path"},
            "training.task = 'os:path': this site's policy has import-paths = []",
        ),
        (
            flat() | {"strategy": "os:system"},
            "strategy = 'os:system': this site's policy has import-paths = []",
        ),
        (
            flat() | {"model.name": "this:x"},
            "model.name = 'this:x': this site's policy has import-paths = []",
        ),
        (
            flat("dmsgd") | {"wire.codec": "os:path"},
            "wire.codec = 'os:path': this site's policy has import-paths = []",
        ),
        (
            flat("dmsgd") | {"topology.name": "os:path"},
            "topology.name = 'os:path': this site's policy has import-paths = []",
        ),
        (
            flat() | {"partition.kind": "os:path"},
            "partition.kind = 'os:path': this site's policy has import-paths = []",
        ),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_refused_request_names_the_rule(
    run_config: dict[str, Any], rule: str, strict: Service
) -> None:
    reply = answer_to(strict, run_config)
    assert reply.has_error()
    assert "refused by this site's policy: " in fault(reply)
    assert rule in fault(reply)
    assert rule in strict.lines()[-1]["rule"]


def test_orders_are_held_to_the_rules(strict: Service) -> None:
    for strategy in ("fedavg", "local"):  # a site that learns alone sends its model, too
        reply = answer_to(strict, flat(strategy), "train", order({}, 4810, **{"local-steps": 1}))
        assert "an answer after 1 batches: this site's policy has smallest-steps = 2" in fault(
            reply
        )
    assert not answer_to(strict, flat(), "train", order({}, 4810, **{"local-steps": 2})).has_error()
    # Refused before there is memory for it.
    huge = flat() | {"model.name": "gpt", "model.width": 2**16, "model.layers": 100}
    reply = answer_to(strict, huge, "train", order({}, 4810, **{"local-steps": 2}))
    assert "a model of 5154" in fault(reply)
    assert "this site's policy has largest-model = 6000" in fault(reply)


def test_data_are_the_sites_whatever_a_run_says(strict: Service, tmp_path: Path) -> None:
    """The run's are not looked at: neither read nor imported nor called."""
    mark = tmp_path / "mark"
    honest = answer_to(strict, flat())
    for data in (
        {"data.source": "os:system", "data.path": f"touch {mark}"},
        {"data.source": "shutil:rmtree", "data.path": str(tmp_path)},
        {
            "data.source": "csv",
            "data.path": "/etc/passwd",
            "data.label": f"@__import__('os').system('touch {mark}')",
        },
        {"data.test-part": "pooled", "data.test-fraction": 0.9, "data.group": "(a+)+$"},
    ):
        assert answer_to(strict, flat() | data).content["config"] == honest.content["config"]
    assert tmp_path.exists()
    assert not mark.exists()


def test_rules_are_held_to_the_files_as_they_are_now(tmp_path: Path) -> None:
    """Half of the examples are taken away while the service lives on."""

    def write(rows: int) -> None:
        lines = [f"{row},{row % 2}" for row in range(rows)]
        (tmp_path / "data.csv").write_text("\n".join(["a,label", *lines]))

    write(200)
    data = {"source": "csv", "path": str(tmp_path / "data.csv"), "label": "label"}
    rules = {"smallest-examples": 100, "runs-a-day": 10**6}
    service = Service(tmp_path, data=data, policy=rules)
    config = flat("dmsgd", training={"batch_size": 256})
    assert fault(answer_to(service, config)) == ""
    write(100)
    while not (reason := fault(answer_to(service, config))):  # a look at files holds for a moment
        time.sleep(0.05)
    assert "an answer after 80 examples: this site's policy has smallest-examples" in reason
    service.end()


def test_memory_of_a_run_is_open_to_its_configuration_only(strict: Service) -> None:
    run = next(RUN_IDS)
    for changes, refused in ((flat(), False), (flat() | {"seed": 2}, True), (flat(), False)):
        context = Context(run, 5, {"service": strict.socket}, RecordDict(), changes)
        reply = client_app(Message(RecordDict(), dst_node_id=5, message_type="query.site"), context)
        assert reply.has_error() == refused
    assert "has another configuration than in its first request" in strict.lines()[-3]["rule"]


@pytest.mark.parametrize("service", [{"policy": {"runs-a-day": 2}}], indirect=True)
def test_runs_of_a_day_are_counted(service: Service) -> None:
    """Those that are refused did not begin."""
    assert [
        answer_to(service, flat() | {"training.batch-size": 1}).has_error() for _ in range(3)
    ] == [True] * 3
    assert [answer_to(service, flat()).has_error() for _ in range(3)] == [False, False, True]
    assert "runs-a-day = 2" in service.lines()[-1]["rule"]


def test_what_cannot_be_written_down_does_not_leave(tmp_path: Path) -> None:
    """And the service goes on."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    service = Service(tmp_path, audit="/dev/full")
    for _ in range(2):
        assert "the site's audit log cannot be written: [Errno 28] No space left" in fault(
            answer_to(service, flat())
        )
    service.end()


def test_what_old_runs_left_on_disk_is_deleted(tmp_path: Path) -> None:
    service = Service(tmp_path, state=str(tmp_path / "state"))
    for name, days in (("7-1.state", 31), ("8-1.before", 31), ("9-1.state", 29)):
        file = tmp_path / "state" / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
        os.utime(file, (time.time() - days * 86_400,) * 2)
    assert not answer_to(service, flat("scaffold")).has_error()
    left = {file.name for file in (tmp_path / "state").iterdir()}
    assert left & {"7-1.state", "8-1.before", "9-1.state"} == {"9-1.state"}
    service.end()


# --- a service that is not there ------------------------------------------------------------------


def test_server_hears_what_is_wrong_with_a_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    service = Service(tmp_path, policy={"seconds": 8.0})
    long = order({}, 4810, **{"local-epochs": 100_000})

    reply = answer_to(service, flat(), "train", long)
    assert "refused by this site's policy: seconds = 8: the work takes longer" in fault(reply)
    assert not answer_to(service, flat()).has_error()  # it goes on

    monkeypatch.setattr("client_app.framing.SILENCE_S", 2.0)
    service.process.send_signal(signal.SIGSTOP)
    assert "has been silent for 2 s: it hangs" in fault(answer_to(service, flat()))
    service.process.send_signal(signal.SIGCONT)
    monkeypatch.undo()
    service.end()


def test_server_hears_that_a_service_is_busy_dies_or_is_away(tmp_path: Path) -> None:
    service = Service(tmp_path)
    long = order({}, 4810, **{"local-epochs": 100_000})
    before = len(service.lines())
    with ThreadPoolExecutor(19) as pool:
        waiting = [pool.submit(answer_to, service, flat(), "train", long)]
        while len(service.lines()) == before:
            time.sleep(0.05)
        # Two more than may wait.
        waiting += [pool.submit(answer_to, service, flat()) for _ in range(18)]
        busy = [fault(found.result()) for found in islice(as_completed(waiting), 2)]
        assert ["the site's service is busy: 16 requests wait" in each for each in busy] == [
            True,
            True,
        ]
        service.process.kill()
        messages = [fault(found.result()) for found in waiting]
        assert len([each for each in messages if "died at work or was restarted" in each]) == 17
    assert "is away: nobody listens at" in fault(answer_to(service, flat()))

    service.start()
    assert not answer_to(service, flat()).has_error()
    service.end()


def test_work_that_nobody_waits_for_is_stopped(tmp_path: Path) -> None:
    """When a run, or its SuperNode, was stopped, the next one's request is answered.

    The work of the stopped one would have taken days.
    """
    service = Service(tmp_path)
    try:
        head = {"kind": "train", "run": next(RUN_IDS), "node": 5, "run-config": flat()}
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(service.socket)
            framing.write(line, head, order({}, 4810, **{"local-epochs": 10_000_000}))
            assert framing.receive(line)[0] == framing.WORKING
        assert not answer_to(service, flat()).has_error()
        taken, stopped, *_ = service.lines()
        assert (taken["way"], taken["run"]) == ("in", head["run"])
        assert (stopped["way"], stopped["run"]) == ("out", head["run"])
        assert "nobody waits for the answer" in stopped["problem"]
    finally:
        service.end()


@pytest.mark.parametrize(
    ("seconds", "message"), [(0.1, "out of time"), (10.0**6, "nobody waits for the answer")]
)
def test_work_is_stopped_though_the_first_alarm_is_lost(
    seconds: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where it comes in a destructor, whose errors Python only prints."""
    monkeypatch.setattr(site_service, "ALARM_S", 0.1)
    request = site_service._Request({}, RecordDict(), {}, Future(), threading.Event())
    stopping = threading.Thread(target=site_service._stop, args=[request])

    def much_work() -> None:
        for _ in range(6000):
            time.sleep(0.01)

    def work() -> None:
        with site_service._deadline(seconds, request.unwanted):
            if seconds > 1:
                stopping.start()
            with contextlib.suppress(TimeoutError):
                much_work()
            much_work()

    before = signal.getsignal(signal.SIGALRM)
    try:
        with pytest.raises(TimeoutError, match=message):
            work()
    finally:
        request.answer.set_result("stopped")
        if seconds > 1:
            stopping.join()
        signal.signal(signal.SIGALRM, before)


def test_a_socket_is_in_its_place_when_it_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who saw it before would find nobody."""
    path, there = tmp_path / "site.sock", []

    def listen(listener: socket.socket, backlog: int) -> None:
        there.append(path.exists())
        real(listener, backlog)

    real = socket.socket.listen
    monkeypatch.setattr(socket.socket, "listen", listen)
    site = SiteFile.model_validate({"site": 1, "socket": str(path), "data": {"source": "digits"}})
    with site_service._listening(site), socket.socket(socket.AF_UNIX) as line:
        assert line.connect_ex(str(path)) == 0
        assert (there, path.stat().st_mode & 0o777) == ([False], 0o600)
    assert not [*tmp_path.iterdir()]


def test_requests_that_are_none_do_no_harm(strict: Service) -> None:
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


# --- two users ------------------------------------------------------------------------------------


def test_no_request_ends_the_service_or_leaves_files(tmp_path: Path) -> None:
    """What goes into the audit log, and what a file is named after, comes from requests."""
    service = Service(tmp_path, state=str(tmp_path / "state"))
    assert not answer_to(
        service, flat(), content=RecordDict({"config": ConfigRecord({"server-round": b"1"})})
    ).has_error()
    for node in range(3):
        head = {
            "kind": "query.site",
            "run": 7,
            "node": node,
            "run-config": flat("dmsgd", wire={"sealing": "trust-on-first-use"}),
        }
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(30)
            line.connect(service.socket)
            framing.write(line, head, RecordDict())
            assert framing.receive(line)[0] in (framing.HEAD, framing.WORKING)
    assert not answer_to(service, flat()).has_error()
    assert [file.name for file in (tmp_path / "state").glob("*.state")] == ["7-1.state"]
    service.end()


def test_lines_on_which_nothing_comes_do_not_stop_the_service(tmp_path: Path) -> None:
    """Each took a thread and a file; without files nobody was listened to any more, for good."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (READERS // 2 + 40, hard))
    try:
        service = Service(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for few in (True, False):  # out of files, or of READERS
        if not few:
            service.end()
            service.start()
        with contextlib.ExitStack() as lines:
            for _ in range(READERS + 20):
                line = lines.enter_context(socket.socket(socket.AF_UNIX))
                line.setblocking(False)
                for _ in range(40):  # nobody may be through with those before
                    if line.connect_ex(service.socket) == 0:
                        break
                    time.sleep(0.01)
        deadline = time.monotonic() + 30
        while answer_to(service, flat()).has_error():
            assert time.monotonic() < deadline
    service.end()


@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM])
def test_a_service_that_is_ended_takes_its_socket_with_it(
    ended_by: signal.Signals, tmp_path: Path
) -> None:
    service = Service(tmp_path)
    service.process.send_signal(ended_by)
    assert service.process.wait(30) == 0
    assert not Path(service.socket).exists()
    assert "Traceback" not in service.log.read_text()


def test_a_state_is_one_services(tmp_path: Path) -> None:
    first, folder = Service(tmp_path, state=str(tmp_path / "state")), tmp_path / "other"
    folder.mkdir()
    with pytest.raises(AssertionError, match=r"PolicyError: state = '.*': another service uses it"):
        Service(folder, state=str(tmp_path / "state"))
    first.end()
    first.start()
    first.end()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as two users")
def test_user_who_carries_requests_can_read_nothing_else() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    with TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        private = folder / "private"
        private.mkdir(mode=0o700)
        table = private / "heart.csv"
        table.write_text("age,label\n" + "\n".join(f"{age},{age % 2}" for age in range(200)))
        group = grp.getgrgid(65534).gr_name
        service = Service(
            folder,
            data={"source": "csv", "path": str(table)},
            state=str(private / "state"),
            group=group,
        )
        config = config_of("dmsgd").flat()

        def attack() -> str:
            for path in (table, private / "state"):
                with contextlib.suppress(PermissionError):
                    path.stat()
                    return f"{path} was found"
            return fault(answer_to(service, config)) or "answered"

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


# --- what leaves ----------------------------------------------------------------------------------

NOISY = {"clip-norm": 0.5, "noise-multiplier": 4.0, "epsilon": 3.0}


@pytest.mark.parametrize("strategy", ["co-learning", "scaffold", "diloco", "gsgm", "dmsgd"])
def test_noise_of_a_site_is_in_what_leaves_it(strategy: str, private: Service) -> None:
    """The site's model differs from the honest one by noise of the size it was told.

    The others' run goes on with it.
    """
    config = config_of(strategy, **({} if strategy == "dmsgd" else {"max_change": 1e6}))
    before = private.lines()[-1].get("epsilon", 0.0) if private.audit.exists() else 0.0
    found = deployed(config, site_1=private.socket)
    answers = [
        line
        for line in private.lines()
        if line["way"] == "out" and "epsilon" in line and line["kind"] != "query.site"
    ]
    assert before < answers[-1]["epsilon"] < 1000
    own = found.metrics[
        (found.metrics["site"] == "1") & found.metrics["metric"].isin(["loss", "accuracy"])
    ]
    assert own.empty
    if strategy == "co-learning":
        size = sum(value.numel() for value in found.models["model"].values())
        moved = answers[0]["norms"]["x"]
        wanted = NOISY["clip-norm"] * NOISY["noise-multiplier"] * size**0.5
        # Clipping leaves at most 0.5 of some 140.
        assert abs(moved / wanted - 1) < 4 / (2 * size) ** 0.5 + 0.01


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("private")
    rules = {"metrics": [], "smallest-steps": 1, "smallest-examples": 1}
    found = Service(
        folder, policy=rules, privacy=NOISY | {"epsilon": 1000.0}, state=str(folder / "state")
    )
    yield found
    found.end()


def test_model_that_was_trained_without_noise_is_not_tested(private: Service) -> None:
    """Its test would tell of each training example."""
    told = order({}, 4810, **{"local-epochs": 3})
    reply = answer_to(private, flat(), "evaluate", told)
    assert "personalise-epochs = 3: " in fault(reply)
    assert "allowed at this site: 0" in fault(reply)
    told["config"].pop("lr")
    assert not fault(answer_to(private, flat(), "evaluate", told))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_that_a_loss_is_not_finite_does_not_leave(bad: float, private: Service) -> None:
    """An error would tell the server whether an example has a value above one of its choice.

    It would send a model of its own making.
    """
    fields = order({}, 4810, **{"local-epochs": 1})
    fields["arrays"] = pack({"x": torch.full((4810,), bad)})
    before = private.lines()[-1].get("epsilon", 0.0) if private.audit.exists() else 0.0
    reply = answer_to(private, flat() | {"training.clip-norm": 0.0}, "train", fields)
    assert not fault(reply)
    assert "loss" not in metrics_of(reply)
    assert private.lines()[-1]["epsilon"] > before


def test_that_a_peers_loss_is_not_finite_stops_no_step_with_noise(tmp_path: Path) -> None:
    config = config_of("dmsgd")
    data = raw_data(config, SiteId(0, None, ""))
    network = network_of(config, tuple(data.train.x.shape[1:]), 10)
    noise = Noise(1.0, 1.0, Account(tmp_path, 1e-5), 1.0, bytes(32))
    loss, gradient, _ = Oracle(config, 0, data, network, noise).gradient(
        torch.full_like(network.x, math.nan), network.stats, 0
    )
    assert float(loss) == 0
    assert bool(gradient.isfinite().all())


def test_spent_epsilon_outlives_the_service_and_ends_its_part(tmp_path: Path) -> None:
    rules = {"metrics": [], "runs-a-day": 4}
    service = Service(tmp_path, policy=rules, privacy=NOISY, state=str(tmp_path / "state"))
    fields = order({}, 4810, **{"local-epochs": 1})
    assert "BatchNorm" not in fault(answer_to(service, flat(), "train", fields))
    spent = service.lines()[-1]["epsilon"]
    service.end()
    service.start()
    assert f"spent so far: epsilon {spent:.4g}" in service.log.read_text()
    answers = [answer_to(service, flat(), "train", fields) for _ in range(4)]
    assert [answer.has_error() for answer in answers][-1]
    assert service.lines()[-1]["rule"]
    assert "runs-a-day = 4" in fault(answers[3])  # counted across the restart
    service.end()


def test_a_spent_budget_is_a_rule(tmp_path: Path) -> None:
    service = Service(
        tmp_path,
        policy={"metrics": []},
        privacy=NOISY | {"epsilon": 0.1},
        state=str(tmp_path / "state"),
    )
    reply = answer_to(service, flat(), "train", order({}, 4810, **{"local-epochs": 1}))
    assert "BudgetError: privacy.epsilon = 0.1: with this answer it would be" in fault(reply)
    assert "BudgetError" in service.lines()[-1]["rule"]
    service.end()


@pytest.mark.parametrize(
    "service", [{"policy": {"metrics": ["accuracy"], "decimals": 1}}], indirect=True
)
def test_metrics_leave_as_the_operator_says(service: Service) -> None:
    found = deployed(config_of("co-learning"), site_1=service.socket)
    own = found.metrics[found.metrics["site"] == "1"]
    assert "loss" not in set(own["metric"])
    accuracies = own[own["metric"] == "accuracy"]["value"]
    assert len(accuracies) == found.metrics["round"].max()
    assert all(round(value, 1) == value for value in accuracies)
    assert "loss" in set(found.metrics[found.metrics["site"] == "0"]["metric"])


@pytest.mark.parametrize("service", [{"policy": {"smallest-examples": 400}}], indirect=True)
def test_a_test_on_few_examples_tells_no_metric(service: Service) -> None:
    """359 test examples are fewer than the site wants, its 1,438 for training are not."""
    found = deployed(config_of("co-learning"), site_1=service.socket)
    own = found.metrics[
        (found.metrics["site"] == "1") & found.metrics["metric"].isin(["loss", "accuracy"])
    ]
    assert set(own["split"]) == {"train"}
    assert own["metric"].unique().tolist() == ["loss"]


@pytest.mark.parametrize("service", [{"policy": {"runs-a-day": 20}}], indirect=True)
def test_losses_of_many_small_runs_do_not_give_an_example_back(service: Service) -> None:
    """A relay that starts 160 runs could compute a picture from its losses.

    With chosen seeds, batches of one, and rate 0.
    """
    tiny = flat("d-psgd") | {
        "training.batch-size": 1,
        "training.lr": 1e-30,
        "training.lr-ratio": 1.0,
    }
    fields: dict[str, Any] = {
        "server-round": 0,
        "classes": list("0123456789"),
        "neighbours": [],
        "weights": [],
        "cycle-from": 0.0,
    }
    fields |= {"test": False, "last": False, "rejoin": False, "reset": False}

    def losses(config: dict[str, Any]) -> list[Any]:
        found: list[Any] = []
        for seed in range(1, 161):
            content = RecordDict({"config": ConfigRecord(fields)})
            reply = answer_to(service, config | {"seed": seed}, "train.peer", content)
            found += [] if reply.has_error() else [metrics_of(reply)["loss"]]
        return found

    assert losses(tiny) == []
    assert losses(tiny | {"training.batch-size": 8}) == []  # one batch of eight is too few examples
    allowed = losses(tiny | {"training.batch-size": 32})
    assert len(allowed) == 20
    assert all(loss == round(loss, 3) for loss in allowed)


# --- several processes ----------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["co-learning", "gsgm", "dmsgd"])
def test_two_processes_are_as_one(strategy: str, pair: Service) -> None:
    config = config_of(strategy, training={"sam_radius": 0.05} if strategy == "co-learning" else {})
    through, inside = deployed(config, site_1=pair.socket), deployed(config)
    for name, model in inside.models.items():
        for key, value in model.items():
            torch.testing.assert_close(through.models[name][key], value, rtol=0, atol=1e-5)
    assert not [line for line in pair.lines() if "problem" in line or "rule" in line]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("pair")
    found = Service(
        folder,
        processes=2,
        policy={"smallest-steps": 1, "smallest-examples": 1},
        state=str(folder / "state"),
    )
    yield found
    found.end()


SHARDED: dict[str, dict[str, Any]] = {
    "co-learning": {"training": {"sam_radius": 0.05}},
    "diloco": {"training": {"optimizer": "adamw"}},
    "scaffold": {"computing": {"micro_batch": 6}, "wire": {"codec": "bf16", "down_codec": "bf16"}},
    "gsgm": {"training": {"batch_size": 33}},
}


@pytest.mark.parametrize("strategy", SHARDED)
def test_two_processes_with_shards_are_as_one(strategy: str, shards: Service) -> None:
    config = config_of(strategy, **SHARDED[strategy])
    through, inside = deployed(config, site_1=shards.socket), deployed(config)
    for name, model in inside.models.items():
        for key, value in model.items():
            torch.testing.assert_close(
                through.models[name][key],
                value,
                rtol=0,
                atol=1e-3 if "wire" in SHARDED[strategy] else 1e-5,
            )
    assert not [line for line in shards.lines() if "problem" in line or "rule" in line]


def test_what_shards_cannot_do_is_said_and_no_process_is_restarted(shards: Service) -> None:
    before = shards.log.read_text().count("device")
    assert "strategy = 'dmsgd': a peer keeps whole models; this site has sharding = true" in fault(
        answer_to(shards, flat("dmsgd"))
    )
    assert "computing.compile = true" in fault(answer_to(shards, flat(computing={"compile": True})))
    for kind in ("train", "evaluate"):
        assert "expected x (4810,), got (3,)" in fault(
            answer_to(shards, flat(), kind, order({}, 3, **{"local-epochs": 1}))
        )
    assert shards.log.read_text().count("device") == before


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    if not SHARDS:
        pytest.skip("torch is older than 2.15")
    folder = tmp_path_factory.mktemp("shards")
    few = {"smallest-steps": 1, "smallest-examples": 1}
    found = Service(folder, processes=2, sharding=True, policy=few, state=str(folder / "state"))
    yield found
    found.end()


@pytest.mark.parametrize(("rank", "sharding"), [(0, False), (1, SHARDS)])
def test_process_that_is_killed_is_reported_and_all_are_restarted(
    rank: int, sharding: bool, tmp_path: Path
) -> None:
    service = Service(tmp_path, processes=2, sharding=sharding)
    long = order({}, 4810, **{"local-epochs": 100_000})
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(answer_to, service, flat(), "train", long)
        while not service.audit.exists() or len(service.lines()) < 1:
            time.sleep(0.05)
        time.sleep(1.0)  # in the middle of it
        workers = [
            each
            for each in psutil.Process(service.process.pid).children()
            if "client_app.service" in each.cmdline()
        ]
        [victim] = [each for each in workers if each.environ()["RANK"] == str(rank)]
        victim.kill()
        assert "died at work or was restarted" in fault(waiting.result())
    while answer_to(service, flat()).has_error():
        time.sleep(0.2)
    service.end()


# --- its own page ---------------------------------------------------------------------------------


def test_page_of_the_site_says_what_was_asked_and_what_left(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    service = Service(tmp_path, page=address, policy={"strategies": ["fedavg"]})
    try:
        assert not fault(answer_to(service, flat(), "query.site"))
        assert "strategies" in fault(answer_to(service, flat("gsgm")))
        with urlopen(f"http://{address}/data", timeout=30) as answer:
            found = json.load(answer)["site"]
        assert [(each["way"], each["kind"], each["strategy"]) for each in found["newest"]] == [
            ("out", "query.site", "gsgm"),
            ("in", "query.site", "gsgm"),
            ("out", "query.site", "fedavg"),
            ("in", "query.site", "fedavg"),
        ]
        assert found["refused"] == {"strategies": 1}
        assert found["policy"]["strategies"] == "['fedavg']"
        assert found["train"] + found["test"] == 1797
        with urlopen(f"http://{address}/metrics", timeout=30) as answer:
            assert (
                'archipelago_refused_total{rule="strategies",site="1"} 1.0'
                in answer.read().decode()
            )
        second = tmp_path / "second.toml"
        second.write_text(
            service.file.read_text().replace(service.socket, str(tmp_path / "second.sock"))
        )
        ended = subprocess.run(
            [sys.executable, "-m", "client_app.service", str(second)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert re.search(f"page = '{address}': .*in use", ended.stderr)
    finally:
        service.end()
