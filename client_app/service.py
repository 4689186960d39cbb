"""The site service: the operator's own, installed copy of the handlers.

    python -m client_app.service /etc/archipelago/site.toml   answer requests until it is ended
    python -m client_app.service --check site.toml            say what it would do, or what is wrong
    torchrun --max-restarts=100 --nproc-per-node=4 -m client_app.service site.toml   on four GPUs

It has the data, the network and the keys, and listens at a Unix socket that its own user and the
members of one group may open; Flower's ClientApp, whose code the server ships and which may run as
another user, carries requests to it and answers back (:mod:`client_app.framing`). What a run may
ask is decided by the operator's file (:mod:`client_app.policy`), and what becomes of an answer
before it leaves (:mod:`client_app.privacy`). One request is answered after the other, by this
process's main thread; data, network and what runs made this site remember stay in its memory.
"""

import argparse
import json
import os
import secrets
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from queue import Full, Queue
from threading import BoundedSemaphore, Event, Thread
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from flwr.app import (
    DEFAULT_TTL,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    Metadata,
    MetricRecord,
    RecordDict,
)

from client_app import framing, policy
from client_app.framing import FrameError
from client_app.handlers import app as handlers
from client_app.memory import restore_from_disk
from client_app.policy import DAY_S, PolicyError, SiteFile
from client_app.privacy import SEED, Account, Noise, cost_of
from client_app.ranks import SHARDING, Ranks
from client_app.sealing import keyring
from client_app.site import (
    Origin,
    SiteId,
    config_of_site,
    device_of,
    network_of,
    origin_of,
    raw_data,
)
from client_app.status import Status
from configuration.config import Config, identity
from configuration.config import task as find
from configuration.files import append, write_whole
from configuration.network import parameters_of
from datasets.cache import cache_folder
from datasets.site import SiteData
from datasets.sources import SOURCES
from models.networks import NETWORKS
from models.tasks import TASKS
from strategies.averaging.mean import extent
from strategies.method import PeerPlan
from strategies.methods import METHODS
from strategies.protocol import Started, printable, read_order, read_peer_order
from strategies.records import CONFIG, arrays_of, config_of, unpack

RUNS = 8  # whose memory is kept
READERS = 64  # requests that are being read, wait or are worked on
RETENTION_S = 30 * DAY_S  # of the files of a run that sends no more requests
HEARTBEAT_S = 1.0  # between two frames that say that the service works
WAITING = 16  # requests
# Between two alarms, until the work ends: the error of one that comes in a destructor is lost, and
# what cleans up after one is not to be interrupted by the next.
ALARM_S = 10.0


class _Request(NamedTuple):
    """A request that was read, and where the main thread puts the answer to it.

    The answer is records, or a text that says what is wrong.

    Attributes:
        unwanted: set when whoever waited for the answer is gone.
    """

    head: dict[str, Any]
    content: RecordDict
    sender: dict[str, int]
    answer: "Future[RecordDict | str]"
    unwanted: Event


class RunMemory(NamedTuple):
    """A run's configuration as JSON, and the state that it made this site remember."""

    config: str
    state: RecordDict


class Service:
    """Answers requests.

    Args:
        site: the operator's file.
        ranks: the processes of this site.

    Attributes:
        site: the operator's file.
        runs: what each run made this site remember, by the run's number, the newest last.
    """

    def __init__(self, site: SiteFile, ranks: Ranks) -> None:
        self.site, self._ranks = site, ranks
        self._requests: Queue[_Request] = Queue(WAITING)
        self._readers = BoundedSemaphore(READERS)
        self.runs: OrderedDict[int, RunMemory] = OrderedDict()
        self._recent_runs = RecentRuns(_runs_file(site))
        self._activity = ("starting", time.monotonic())
        self._status: Status | None = None

    # Requests.

    def show(self) -> None:
        """Serve the page of this site.

        Raises:
            PolicyError: nobody can listen there.
        """
        _, data = _read_for_some_task(self.site)
        self._status = Status(
            self.site, (len(data.train.y), len(data.test.y)), _rules(self.site), self._now
        )
        self._status.serve()

    def _now(self) -> tuple[str, float]:
        doing, since = self._activity
        return doing, time.monotonic() - since

    def serve(self) -> None:
        """Answer requests until the process is ended."""
        signal.signal(signal.SIGALRM, _ignore)
        with _listening(self.site) as listener:
            if self.site.page:
                self.show()
            Thread(target=self._accept, args=[listener], daemon=True).start()
            while True:
                self._work(self._requests.get())

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError as error:
                if listener.fileno() < 0:
                    return
                # Such as too many open files.
                print(f"no request can be taken now: {error}", file=sys.stderr)
                time.sleep(HEARTBEAT_S)
                continue
            if self._readers.acquire(blocking=False):
                Thread(target=self._read, args=[connection], daemon=True).start()
            else:
                self._reject(connection)

    def _reject(self, connection: socket.socket) -> None:
        """Answer that the service is busy; no thread or file is spent on the connection."""
        with connection, suppress(OSError):
            connection.setblocking(False)
            framing.send_text(
                connection,
                framing.ERROR,
                f"ServiceError: the site's service is busy: {READERS} requests are on their way",
            )

    def _read(self, connection: socket.socket) -> None:
        """Read a request, hand it to the main thread, and write the answer.

        Meanwhile say once a second that the request is worked on.
        """
        with connection, self._reading():
            connection.settimeout(framing.SILENCE_S)
            sender = _sender(connection)
            try:
                kind, first = framing.receive(connection)
                if kind != framing.HEAD:
                    raise FrameError("not a request")
                request = _Request(*framing.read(connection, first), sender, Future(), Event())
                framing.check_head(request.head)
                try:
                    self._requests.put_nowait(request)
                except Full:
                    framing.send_text(
                        connection,
                        framing.ERROR,
                        f"ServiceError: the site's service is busy: {WAITING} requests wait",
                    )
                    return
                while not wait([request.answer], HEARTBEAT_S).done:
                    doing, seconds = self._now()
                    try:
                        framing.send_text(
                            connection,
                            framing.WORKING,
                            json.dumps({"doing": doing, "seconds": round(seconds)}),
                        )
                    except OSError:
                        _stop(request)
                        return
                answer = request.answer.result()
                if isinstance(answer, str):
                    framing.send_text(connection, framing.ERROR, answer)
                else:
                    framing.write(connection, {}, answer)
            except (FrameError, OSError, ValueError, MemoryError) as error:
                problem = (
                    "a request that cannot be read, or an answer that is not taken: "
                    f"{printable(str(error), 240)}"
                )
                with suppress(OSError):  # a full disk
                    self._write({"way": "in", "sender": sender, "problem": problem})

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._readers.release()

    def _work(self, request: _Request) -> None:
        start = time.monotonic()
        self._activity = (f"{request.head.get('kind')} of run {request.head.get('run')}", start)
        rule, more = "", dict[str, object]()
        answer: RecordDict | str
        try:
            self._audit(request, "in", _bytes(request.content))
            try:
                with _deadline(self.site.policy.seconds, request.unwanted) as passed:
                    reply, more = self._answer(request)
            finally:  # the handlers answer with an error, whatever goes wrong
                if request.unwanted.is_set():
                    raise FrameError("nobody waits for the answer any more: its work was stopped")
                if passed.is_set():
                    raise PolicyError(
                        f"seconds = {self.site.policy.seconds:g}: the work takes longer"
                    )
            answer = str(reply.error.reason) if reply.has_error() else reply.content
        except PolicyError as error:
            answer = rule = f"refused by this site's policy: {error}"
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        self._activity = ("nothing", time.monotonic())
        more |= (
            {"rule" if rule or answer.startswith("BudgetError") else "problem": answer}
            if isinstance(answer, str)
            else {}
        )
        size = 0 if isinstance(answer, str) else _bytes(answer)
        try:
            self._audit(request, "out", size, seconds=round(time.monotonic() - start, 3), **more)
        except OSError as error:  # a full disk; what is not written down does not leave
            answer = f"ServiceError: the site's audit log cannot be written: {error}"
        request.answer.set_result(answer)

    def _answer(self, request: _Request) -> tuple[Message, dict[str, object]]:
        """The answer, and what the audit log holds about it."""
        head, site = request.head, self.site
        asked, node, kind = head["run-config"], int(head["node"]), str(head["kind"])
        fields = request.content.get(CONFIG)
        started = Started.of(fields) if isinstance(fields, ConfigRecord) else None
        run = started.run if started else int(head["run"])
        message = Message(metadata=_metadata(run, node, kind), content=request.content)  # type: ignore[call-overload]
        node_config = site.node_config() | ({SEED: secrets.token_hex(32)} if site.privacy else {})
        # Its state's file has the site's number, not the node's: a request may name any node, and
        # would leave a file for each.
        context = Context(run, site.site, node_config, RecordDict(), site.run_config(asked))
        policy.check_paths(site.policy, context.run_config)
        config = config_of_site(context)
        policy.check_run(site.policy, config)
        policy.check_sharding(site, config)
        num_test = self._check_message(config, message, context)
        # A run that is refused neither counts nor pushes out what another run left.
        memory = self._memory(run, asked)
        context.state = memory.state
        if self._ranks.count > 1 and site.state:
            restore_from_disk(message, context)
        if self._ranks.count > 1 and kind.startswith("train"):
            Noise.of(context)  # an epsilon that is spent is said before the others begin
        self._ranks.send_request(message, context)
        reply = handlers(message, context)
        self._ranks.barrier()
        self.runs[run] = memory._replace(state=context.state)
        if reply.has_error():
            return reply, {}
        more: dict[str, object] = {"norms": _norms(message, reply)}
        if site.privacy:
            more["epsilon"] = round(Account(Path(site.state), site.privacy.delta).epsilon(), 4)
        for record in reply.content.values():
            if isinstance(record, MetricRecord):
                policy.withhold(site.policy, record, num_test)
        return reply, more

    def _memory(self, run: int, asked: dict[str, Any]) -> RunMemory:
        text = json.dumps(identity(asked), sort_keys=True)
        if run in self.runs:
            if self.runs[run].config != text:
                raise PolicyError(f"run {run} has another configuration than in its first request")
            self.runs.move_to_end(run)
            return self.runs[run]
        self._recent_runs.add(run, sha256(text.encode()).hexdigest(), self.site.policy.runs_a_day)
        self._forget_old()
        self.runs[run] = found = RunMemory(text, RecordDict())
        while len(self.runs) > RUNS:
            self.runs.popitem(last=False)
        return found

    def _forget_old(self) -> None:
        """Delete the memory of runs to which nothing was added for long.

        Only a peer's memory ends with its run.
        """
        if self.site.state:
            for file in Path(self.site.state).glob("*-*.*"):
                with suppress(OSError):
                    if time.time() - file.stat().st_mtime > RETENTION_S:
                        file.unlink()

    def _check_message(self, config: Config, message: Message, context: Context) -> int:
        """Whether a message breaks a rule; how many examples a test of this site is made on."""
        rules, kind = self.site.policy, message.metadata.message_type
        site = SiteId.of(context)
        num_train, num_test, shape = _holdings(config, site, origin_of(config, site))
        if kind == "query.site":
            policy.check_order(rules, config, None, num_train)
            return num_test
        asked = config_of(message)
        order = (
            read_peer_order(asked)
            if isinstance(config.plan, PeerPlan) and kind.startswith("train")
            else read_order(asked)
        )
        policy.check_order(rules, config, order, num_train)
        classes = len(order.agreed.classes)
        for count in (  # before and after there is memory for them
            lambda: parameters_of(config, shape, classes),
            lambda: sum(network_of(config, shape, classes, self.site.sharding).model.sizes),
        ):
            if (size := count()) > rules.largest_model:
                policy.refuse("largest-model", rules.largest_model, f"a model of {size} parameters")
        return num_test

    def _audit(self, request: _Request, way: str, size: int, **more: object) -> None:
        """Write a line for a request or its answer into the audit log.

        ``in``: when the request comes; ``out``: before the answer leaves.
        """
        config = request.content.get(CONFIG)
        number = config.get("server-round") if isinstance(config, ConfigRecord) else None
        strategy = request.head["run-config"].get("strategy")
        line = {
            "way": way,
            "sender": request.sender,
            "run": request.head.get("run"),
            "round": number if isinstance(number, int) else None,
            "kind": request.head.get("kind"),
            "strategy": printable(strategy) if isinstance(strategy, str) else None,
            "bytes": size,
            **more,
        }
        self._write(line)

    def _write(self, line: Mapping[str, object]) -> None:
        stamped = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **line}
        text = json.dumps(stamped)
        print(text, file=sys.stderr, flush=True)
        if self.site.audit:
            with Path(self.site.audit).open("ab") as file:
                append(file.fileno(), f"{text}\n".encode())
        if self._status:
            self._status.add(stamped)


def _sender(connection: socket.socket) -> dict[str, int]:
    """The user and the process at the other end, where the operating system tells (Linux)."""
    if not hasattr(socket, "SO_PEERCRED"):
        return {}
    process, user, _ = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    )
    return {"user": user, "process": process}


def _runs_file(site: SiteFile) -> Path | None:
    return Path(site.state) / "runs.json" if site.state else None


class RecentRuns:
    """The runs that began in the last 24 hours.

    Args:
        file: in which they outlive this process; None where nothing does.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._runs: list[tuple[float, int, str]] = []
        if file is not None and file.exists():
            try:
                self._runs = [
                    (float(moment), int(run), str(digest))
                    for moment, run, digest in json.loads(file.read_text())
                ]
            except (ValueError, TypeError):
                raise PolicyError(
                    f"{file} is damaged; without it the runs of the last 24 hours are not counted"
                ) from None

    def add(self, run: int, digest: str, most: int) -> None:
        """Note that a run with this digest of its configuration begins.

        Or that it goes on after this process was restarted.

        Raises:
            PolicyError: it had another configuration, or ``most`` runs have begun.
        """
        now = time.time()
        # Of the future is what began before the clock was set back: it counts a day from now.
        self._runs = [
            (min(moment, now), number, before)
            for moment, number, before in self._runs
            if now - moment < DAY_S
        ]
        known = [before for _, number, before in self._runs if number == run]
        if known and digest not in known:
            raise PolicyError(f"run {run} has another configuration than in its first request")
        if known:
            return
        if len(self._runs) >= most:
            raise PolicyError(f"runs-a-day = {most}: so many began in the last 24 hours")
        self._runs.append((now, run, digest))
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._file, json.dumps(self._runs).encode())


def follow(ranks: Ranks) -> None:
    """The work of a process that reads no requests, until it is ended."""
    while True:
        head, content, state = ranks.receive_request()
        run, node = int(head["run"]), int(head["node"])
        message = Message(metadata=_metadata(run, node, str(head["kind"])), content=content)  # type: ignore[call-overload]
        node_config = {
            key: value for key, value in head["node-config"].items() if key not in ("state", "save")
        }
        reply = handlers(message, Context(run, node, node_config, state, head["run-config"]))
        # When sharded, rank 0 alone codes whole vectors and adds noise to them.
        ranks.barrier(alone=SHARDING in node_config and not reply.has_error())


@lru_cache(maxsize=RUNS)
def _holdings(config: Config, site: SiteId, _: Origin) -> tuple[int, int, tuple[int, ...]]:
    """Numbers of training and test examples, and the shape of one as the network takes it.

    They are determined again when the files changed.
    """
    data = raw_data(config, site)
    shape = tuple(data.train.x.shape[1:])
    return len(data.train.y), len(data.test.y), (2 * shape[0],) if data.columns else shape


def _metadata(run: int, node: int, kind: str) -> Metadata:
    """The metadata that handlers read, as in the message that the ClientApp got."""
    return Metadata(
        run_id=run,
        message_id="",
        src_node_id=0,
        dst_node_id=node,
        reply_to_message_id="",
        group_id="",
        created_at=time.time(),
        ttl=DEFAULT_TTL,
        message_type=kind,
    )


def _norms(message: Message, reply: Message) -> dict[str, float]:
    """Euclidean norms of the vectors of an answer, or of their difference from those that came.

    Sealed vectors are left out: their norms would say nothing.
    """
    sent, found = arrays_of(message), dict[str, float]()
    for name, array in arrays_of(reply).items():
        if array.dtype == "float32":
            vector = unpack(array)
            like = (
                name in sent
                and sent[name].dtype == "float32"
                and tuple(sent[name].shape) == tuple(array.shape)
            )
            before = unpack(sent[name]).reshape(-1) if like else None
            found[name] = float(f"{extent(vector.reshape(-1), before)[1]:.4g}")
    return found


def _bytes(content: RecordDict) -> int:
    """Bytes of the arrays in a message."""
    records = [record for record in content.values() if isinstance(record, ArrayRecord)]
    return sum(len(array.data) for record in records for array in record.values())


def _stop(request: _Request) -> None:
    """Have the main thread end the work on a request: its run was stopped, or its SuperNode.

    The next request need not wait for it.
    """
    request.unwanted.set()
    ended = False
    while not ended:
        os.kill(os.getpid(), signal.SIGALRM)
        ended = bool(wait([request.answer], ALARM_S).done)


def _ignore(*_: object) -> None:
    """An alarm comes too late."""


@contextmanager
def _deadline(seconds: float, unwanted: Event) -> Iterator[Event]:
    """A context in which the main thread is interrupted after so many seconds.

    The event says whether it was. It is interrupted, too, by the alarms that come with
    ``unwanted``.
    """
    passed, end = Event(), time.monotonic() + seconds

    def stop(*_: object) -> None:
        if time.monotonic() >= end:
            passed.set()
        elif not unwanted.is_set():  # of a request before this one
            return
        raise TimeoutError("out of time" if passed.is_set() else "nobody waits for the answer")

    if unwanted.is_set():
        raise FrameError("nobody waits for the answer any more")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, ALARM_S)
    try:
        yield passed
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, _ignore)


@contextmanager
def _listening(site: SiteFile) -> Iterator[socket.socket]:
    """A listening socket, which this user and the site's group may open."""
    path = Path(site.socket)
    path.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if probe.connect_ex(str(path)) == 0:
            raise PolicyError(f"socket = {site.socket!r}: a service listens there already")
    # Who sees the socket in its place may connect. Each path has a name of its own, no longer.
    unnamed = path.with_name(sha256(os.fsencode(path)).hexdigest()[: len(path.name)])
    unnamed.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        before = os.umask(0o177)
        try:
            listener.bind(str(unnamed))
        finally:
            os.umask(before)
        try:
            listener.listen(WAITING)
            if site.group:
                shutil.chown(unnamed, group=site.group)
                unnamed.chmod(0o660)
            unnamed.replace(path)  # of a service that was killed: policy.check_machine
            yield listener
        finally:
            unnamed.unlink(missing_ok=True)
            path.unlink(missing_ok=True)


def report(site: SiteFile, ranks: int = 1) -> str:
    """What the site holds, in so many processes, and what runs may ask, in words.

    Raises:
        ValueError: something is wrong; the message says what.
    """
    policy.check_machine(site)
    config, data = _read_for_some_task(site)
    policy.check_holdings(site, len(data.train.y))
    if site.private_key:
        keyring(Context(0, 0, site.node_config(), RecordDict(), {}), "keys", site.site, {}, {})
    RecentRuns(_runs_file(site))
    shape = " x ".join(map(str, data.train.x.shape[1:]))
    processes = f"{ranks} process{'es' * (ranks > 1)} of {torch.get_num_threads()} threads"
    sharded = "; under torchrun each has its shard of the model" if site.sharding else ""
    names = "the next token" if config.task.target == "tokens" else ", ".join(data.classes)
    leave = "" if config.task.target == "tokens" else "; these names leave the site"
    lines = [
        f"site {site.site}{f' ({site.name})' if site.name else ''}",
        f"data: {site.data.source} {site.data.path}",
        f"      {len(data.train.y):,} training and {len(data.test.y):,} test examples of {shape}",
        f"to predict: {names} ({config.training.task}{leave})",
        f"devices: {device_of(config.computing.device)}, {processes}{sharded}",
        f"socket: {site.socket}, open to this user"
        f"{f' and the group {site.group}' if site.group else ''}",
        f"state: {site.state or 'in memory only'}; key: {site.private_key or 'none'}; "
        f"audit: {site.audit or 'standard error only'}",
        f"page: {f'http://{site.page}' if site.page else 'none'}",
        f"privacy: {_spent(site)}",
        "policy:",
        *(f"  {key} = {shown}" for key, shown in _rules(site).items()),
    ]
    return "\n".join(lines)


def _read_for_some_task(site: SiteFile) -> tuple[Config, SiteData]:
    """The site's data, for the first of the tasks that runs may ask for that they are good for.

    Raises:
        ValueError: they cannot be read for any of them; what is wrong with the first.
    """
    failures: list[ValueError] = []
    for task in site.policy.tasks:
        try:
            config = Config.read(
                site.run_config({"strategy": site.policy.strategies[0], "training.task": task})
            )
            return config, raw_data(config, SiteId(site.site, None, site.data.path))
        except ValueError as error:
            failures.append(error)
    source = SOURCES.get(site.data.source)
    # Of a task that the source knows: others say no more than that it does not.
    known = (
        error
        for task, error in zip(site.policy.tasks, failures, strict=True)
        if source and find(task).target in source.targets
    )
    raise next(known, failures[0])


def _rules(site: SiteFile) -> dict[str, str]:
    """The keys of the policy, and their values in words."""
    return {key: _shown(key, value) for key, value in site.policy.model_dump(by_alias=True).items()}


def _shown(key: str, value: object) -> str:
    shipped = {"strategies": list(METHODS), "models": list(NETWORKS), "tasks": list(TASKS)}
    return "all that come with this checkout" if value == shipped.get(key) else repr(value)


def _spent(site: SiteFile) -> str:
    if site.privacy is None:
        return "none: answers leave as they are"
    account = Account(Path(site.state), site.privacy.delta)
    left = account.answers_left(cost_of(site.privacy.noise_multiplier), site.privacy.epsilon)
    rules = ", ".join(
        f"{key} = {value:g}" for key, value in site.privacy.model_dump(by_alias=True).items()
    )
    unit = "updates, or gradients of a peer"
    return f"{rules}; spent so far: epsilon {account.epsilon():.4g}; left: {left:,} {unit}"


@contextmanager
def _lock_state(site: SiteFile) -> Iterator[None]:
    """A context in which no other service uses the state.

    Two would forget each other's runs, and what the other spends.
    """
    if site.state:
        Path(site.state).mkdir(0o700, parents=True, exist_ok=True)
    try:
        with (
            FileLock(Path(site.state) / "lock", timeout=0, mode=0o600)
            if site.state
            else nullcontext()
        ):
            yield
    except Timeout:
        raise PolicyError(f"state = {site.state!r}: another service uses it") from None


def _set_temporary_folder() -> None:
    """Put temporary files where nobody else writes.

    ``torch.compile``, for which a run may ask, runs what it finds there. Call this before PyTorch
    loads its compiler, which takes the folder that is set then.
    """
    folder = cache_folder("temporary")
    try:
        folder = folder.expanduser()
        folder.mkdir(0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    except (OSError, RuntimeError):  # no home
        folder = Path(tempfile.mkdtemp(prefix="archipelago-"))
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)


def _warm_up() -> None:
    """Load what PyTorch loads with an optimizer's first step, so that no request waits for it."""
    whole = torch.nn.Parameter(torch.zeros(1))
    whole.grad = torch.zeros(1)
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        kind([whole], 0.1, fused=True).step()


def main() -> None:
    """Serve, or with ``--check`` say what would be served."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("site", type=Path, help="the operator's file, site.toml")
    parser.add_argument(
        "--check", action="store_true", help="say what is wrong with it, or what the site would do"
    )
    arguments = parser.parse_args()
    try:
        _set_temporary_folder()
        site = policy.read_site(arguments.site)
        ranks = Ranks()
        if ranks.rank:
            follow(ranks)
        print(report(site, ranks.count), flush=True)
        if not arguments.check:
            policy.check_processes(site, ranks.count)
            with _lock_state(site):
                # The socket is removed, too; a shell's & has Ctrl-C ignored.
                for ending in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(ending, signal.default_int_handler)
                _warm_up()
                Service(site, ranks).serve()
    except (ValueError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None
    except KeyboardInterrupt:
        print("ended", file=sys.stderr)


if __name__ == "__main__":
    main()
