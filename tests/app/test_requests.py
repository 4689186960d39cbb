"""The site service goes on, whatever comes through its socket.

It remembers what it did, and says what came and from whom. Tried are honest requests with bytes,
lengths, types or values changed, each from its own seed; ``REQUEST_CASES=10000`` tries as many.
"""

import json
import os
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from threading import Thread
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, RecordDict

from client_app import framing
from client_app.policy import Policy, SiteFile
from client_app.ranks import Ranks
from client_app.service import Service
from configuration.config import configuration
from configuration.sections import Data
from strategies.records import pack

CASES = int(os.environ.get("REQUEST_CASES", "300"))
RUN = 7
SIZE = 4810
CONFIGS = {
    strategy: configuration(strategy=strategy, num_sites=3, epochs=2, model={"name": "mlp"}).flat()
    for strategy in ("scaffold", "dmsgd", "gsgm")
}
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        3,
        10**6,
        10**15,
        2**63,
        -(2**70),
        0.5,
        -0.5,
        1e300,
        float("nan"),
        float("inf"),
    ),
    *(
        "",
        "x",
        "7",
        "\x1b[31m",
        "a\nb",
        "\0",
        "é" * 70,
        "x" * 10**5,
        "os:system",
        "/etc/passwd",
        "../../x",
    ),
    *(
        [],
        [1],
        [[]],
        [None],
        ["a"],
        [1.5, 2],
        [2**62] * 3,
        {},
        {"base64": "AAAA"},
        {"base64": 5},
        {"arrays": []},
        {"a": {"b": {}}},
    ),
]
SLOW = {"computing.compile"}  # it takes a minute, which says nothing about requests


class Inside(Service):
    """A service in this process.

    It works on what it is sent, one request after the other, and returns what it wrote back.
    """

    def __init__(self, folder: Path) -> None:
        rules = Policy(models=["mlp"], largest_model=2 * SIZE, runs_a_day=10**6)
        self.audit = folder / "audit.jsonl"
        super().__init__(
            SiteFile(
                site=1,
                socket=str(folder / "site.sock"),
                data=Data(source="digits"),
                audit=str(self.audit),
                state=str(folder / "state"),
                policy=rules,
            ),
            Ranks(),
        )

    def hurry(self, seconds: float) -> None:
        """Limit the seconds of work from now on."""
        self.site = self.site.model_copy(
            update={"policy": self.site.policy.model_copy(update={"seconds": seconds})}
        )

    def ask(self, data: bytes) -> bytes:
        """The kind of the last frame that comes back; empty where the connection is just closed."""
        ours, theirs = socket.socketpair()
        with ours:
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
            ours.sendall(data)
            ours.shutdown(socket.SHUT_WR)
            self._readers.acquire()
            requests: Any = self._requests

            def read() -> None:
                self._read(theirs)
                requests.put(None)

            Thread(target=read).start()
            while (found := requests.get()) is not None:
                self._work(found)
            kind = b""
            try:
                while (frame := framing.receive(ours))[0] == framing.WORKING:
                    pass
                kind = frame[0]
            except (framing.FrameError, ConnectionResetError):  # the latter where not all was read
                pass
        return kind

    def remembered(self, run: int) -> bytes:
        """All that it remembers of a run, in memory and on disk."""
        files = sorted(Path(self.site.state).glob(f"{run}-*"))
        memory = self.runs[run]
        return b"".join(
            [
                framing.to_bytes({"config": memory.config}, memory.state),
                *(file.read_bytes() for file in files),
            ]
        )

    def forget_since(self, run: int, memory: Any, files: dict[Path, bytes]) -> None:
        """Undo what an answer changed."""
        self.runs[run] = memory._replace(
            state=framing.from_bytes(framing.to_bytes({}, memory.state))[1]
        )
        for file, content in files.items():
            file.write_bytes(content)


def honest(strategy: str, step: int) -> tuple[dict[str, Any], RecordDict]:
    """An honest request of a run."""
    fields: dict[str, Any] = {
        "server-round": step,
        "classes": list("0123456789"),
        "cycle-from": step / 100,
    }
    if strategy == "dmsgd":
        fields |= {
            "neighbours": [],
            "weights": [],
            "test": False,
            "last": False,
            "rejoin": False,
            "reset": False,
        }
    else:
        fields |= {
            "lr": 0.05,
            "cycle-to": 0.5,
            "local-steps": 2,
            **({"delta": True} if strategy == "gsgm" else {}),
        }
    records: dict[str, Any] = {"config": ConfigRecord(fields)}
    if strategy != "dmsgd":
        vectors = {"x": torch.linspace(-0.1, 0.1, SIZE)} | (
            {"c": torch.zeros(SIZE)} if strategy == "scaffold" else {}
        )
        records["arrays"] = pack(vectors)
    kind = "train.peer" if strategy == "dmsgd" else "train"
    return {
        "kind": kind,
        "run": RUN,
        "node": 1001,
        "run-config": dict(CONFIGS[strategy]),
    }, RecordDict(records)


# --- changes --------------------------------------------------------------------------------------


def change_bytes(random: Random, data: bytearray) -> None:
    at = random.randrange(min(len(data), random.choice([9, 200, 4000, len(data)])))
    match random.choice(["flip", "cut", "drop", "insert", "random"]):
        case "flip":
            data[at] ^= random.randrange(1, 256)
        case "cut":
            del data[at:]
        case "drop":
            del data[at : at + random.randrange(1, 20)]
        case "insert":
            data[at:at] = random.randbytes(random.randrange(1, 20))
        case "random":
            data[at : at + 16] = random.randbytes(16)


def change_length(random: Random, data: bytearray) -> None:
    length = int.from_bytes(data[1:9], "big")
    lengths = [
        0,
        1,
        length - 1,
        length + 1,
        framing.LARGEST_HEAD + 1,
        framing.LARGEST + 1,
        2**63,
        2**64 - 1,
    ]
    data[1:9] = random.choice(lengths).to_bytes(8, "big")


def change_kind(random: Random, data: bytearray) -> None:
    data[0] = random.choice(b"HBWR\0\xff")


def change_json(random: Random, data: bytearray) -> None:
    """Somewhere in the head: a value of another type, a missing key, or an unknown one."""
    length = int.from_bytes(data[1:9], "big")
    try:
        head = json.loads(data[9 : 9 + length])
    except (ValueError, RecursionError):  # it was changed already
        return
    places = [place for place in _places(head) if place[1] not in SLOW]
    where, key = random.choice(places)
    match random.choice(["set", "set", "set", "drop", "add"]):
        case "set":
            where[key] = random.choice(VALUES)
        case "drop":
            del where[key]
        case "add" if isinstance(where, dict):
            where[random.choice(["x", "", "lr", "arrays", "state", "é" * 100])] = random.choice(
                VALUES
            )
        case _:
            where.append(random.choice(VALUES))
    text = json.dumps(head).encode()
    if random.random() < 0.02:
        text = b"[" * 10**5
    data[1 : 9 + length] = len(text).to_bytes(8, "big") + text


def _places(value: Any) -> list[tuple[Any, Any]]:
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [place for key, each in items for place in ((value, key), *_places(each))]


CHANGES: Sequence[Callable[[Random, bytearray], None]] = (
    *[change_json] * 5,
    *[change_bytes] * 3,
    change_length,
    change_kind,
)


# --- what must hold -------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", CONFIGS)
def test_no_request_changes_what_a_site_remembers_unless_it_is_answered(
    strategy: str, tmp_path: Path
) -> None:
    service = Inside(tmp_path)
    for step in (0, 1):
        assert service.ask(framing.to_bytes(*honest(strategy, step))) == framing.HEAD
    usual = framing.to_bytes(*honest(strategy, 2))
    memory, before = service.runs[RUN], service.remembered(RUN)
    files = {file: file.read_bytes() for file in Path(service.site.state).glob("*")}
    sender = {"user": os.geteuid(), "process": os.getpid()}
    kinds: Counter[bytes] = Counter()
    service.hurry(1.0)  # a request may ask for a million steps
    with service.audit.open() as audit:
        audit.read()
        for case in range(-(-CASES // len(CONFIGS))):
            random, data = Random(case), bytearray(usual)
            for _ in range(random.randint(1, 2)):
                random.choice(CHANGES)(random, data)
                if len(data) < 9:
                    break
            kind = service.ask(bytes(data))
            kinds[kind] += 1
            service.runs.setdefault(RUN, memory)  # eight other runs may have come
            if kind != framing.HEAD:
                assert service.remembered(RUN) == before, case
            lines = [json.loads(line) for line in audit.read().splitlines()]
            assert lines, case
            assert all(line["sender"] == sender for line in lines), case
            assert kind == framing.HEAD or {"rule", "problem"} & lines[-1].keys(), case
            service.forget_since(RUN, memory, files)
    assert kinds[framing.ERROR] > kinds.total() / 10
    assert kinds[b""] > kinds.total() / 10
    service.hurry(3600.0)
    assert service.ask(usual) == framing.HEAD
