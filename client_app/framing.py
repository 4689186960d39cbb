"""Requests from Flower's ClientApp to the site's service, as frames through a Unix socket.

    frame    kind (1 byte), length (8 bytes, big-endian), so many bytes
    request  HEAD: JSON, then a BLOB for each array
    answer   any number of WORKING (JSON), then HEAD and its BLOBs, or ERROR (text)

Numbers, texts and names are JSON, arrays are bytes beside it: nothing is pickled, and nothing that
is read is run.
"""

import json
import socket
import struct
from base64 import b64decode, b64encode
from collections.abc import Mapping
from io import BytesIO
from typing import Any, Protocol

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)

HEAD, BLOB, WORKING, ERROR = b"H", b"B", b"W", b"R"
FRAME = struct.Struct(">cQ")
LARGEST = 2**36  # bytes of a frame
PART = 2**20  # bytes that are read at once
LARGEST_HEAD = 2**26  # bytes of one that is JSON
LARGEST_NUMBER = 2**64  # of a run or a node
LONGEST_KIND = 64  # characters
SILENCE_S = 60.0  # the service says once a second that it works; silent for so long, it hangs
# Flower's codes for a ClientApp that raised an exception, and for one that may be back any time.
RAISED, STOPPED = 2, 8
TEMPORARY = "ServiceError"  # an ERROR begins with it where the service may answer another time
KINDS: dict[str, Any] = {"metrics": MetricRecord, "config": ConfigRecord}


class Connection(Protocol):
    """The part of a socket that requests and answers go through."""

    def sendall(self, data: bytes, /) -> None:
        """Send all of ``data``."""

    def recv_into(self, view: memoryview, /) -> int:
        """Receive bytes into ``view``, and return how many; 0 once the connection is closed."""


class FrameError(RuntimeError):
    """A request or an answer cannot be read, or the connection was closed."""


def write(connection: Connection, head: Mapping[str, Any], content: RecordDict | None) -> None:
    """Send a request: ``head``, and the records of a message."""
    records, blobs = _disassembled(content or RecordDict())
    _send(connection, HEAD, json.dumps({**head, "records": records}).encode())
    for blob in blobs:
        _send(connection, BLOB, blob)


def read(connection: Connection, first: bytes) -> tuple[dict[str, Any], RecordDict]:
    """Read the rest of a request whose HEAD holds ``first``.

    Raises:
        FrameError: it cannot be read.
    """
    try:
        head = json.loads(first)
        return head, _assembled(connection, head.pop("records"))
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        RecursionError,
        MemoryError,
    ) as error:
        raise FrameError(f"not a request: {type(error).__name__}: {error}") from None


def check_head(head: Mapping[str, Any]) -> None:
    """Check that a head is that of a message.

    It is written into the audit log, and its numbers name what is remembered.

    Raises:
        FrameError: it is not.
    """
    kind, config = head.get("kind"), head.get("run-config")
    if not (
        isinstance(kind, str)
        and kind.isprintable()
        and len(kind) <= LONGEST_KIND
        and isinstance(config, dict)
    ):
        raise FrameError("not a request: kind or run-config is missing or wrong")
    for key in ("run", "node"):
        if not (type(head.get(key)) is int and 0 <= head[key] < LARGEST_NUMBER):
            raise FrameError(f"not a request: {key} is no number from 0 to {LARGEST_NUMBER - 1}")


class _Pipe:
    """A :class:`Connection` in memory."""

    def __init__(self, data: bytes = b"") -> None:
        self.data, self._at = bytearray(data), 0

    def sendall(self, data: bytes) -> None:
        """Append ``data``."""
        self.data += data

    def recv_into(self, view: memoryview) -> int:
        """Read the next bytes into ``view``."""
        part = memoryview(self.data)[self._at : self._at + len(view)]
        view[: len(part)] = part
        self._at += len(part)
        return len(part)


def to_bytes(head: Mapping[str, Any], content: RecordDict) -> bytes:
    """The frames of a request, for a file or another process."""
    pipe = _Pipe()
    write(pipe, head, content)
    return bytes(pipe.data)


def from_bytes(data: bytes) -> tuple[dict[str, Any], RecordDict]:
    """The request of :func:`to_bytes`.

    Raises:
        FrameError: it cannot be read.
    """
    pipe = _Pipe(data)
    return read(pipe, receive(pipe)[1])


def receive(connection: Connection) -> tuple[bytes, bytes]:
    """The next frame: its kind and what it holds.

    Raises:
        FrameError: the other side is gone.
    """
    kind, length = FRAME.unpack(_receive_exactly(connection, FRAME.size))
    if length > (most := LARGEST if kind == BLOB else LARGEST_HEAD):
        raise FrameError(f"a frame of {length} bytes; at most {most}")
    return kind, _receive_exactly(connection, length)


def send_text(connection: Connection, kind: bytes, text: str) -> None:
    """Send a frame of text."""
    _send(connection, kind, text.encode())


def request(path: str, message: Message, context: Context) -> Message:
    """Send a message to the service at ``path``; return its answer, or an error that says why.

    The message is left without its content: that and the answer's would be two models at once.
    """
    head = {
        "kind": message.metadata.message_type,
        "run": context.run_id,
        "node": context.node_id,
        "run-config": dict(context.run_config),
    }
    working: Mapping[str, Any] = {}
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(SILENCE_S)
            connection.connect(path)
            write(connection, head, message.content)
            message.content = RecordDict()
            while (frame := receive(connection))[0] == WORKING:
                working = json.loads(frame[1])
            if frame[0] == ERROR:
                reason = frame[1].decode(errors="replace")
                return _failed(message, reason, STOPPED if reason.startswith(TEMPORARY) else RAISED)
            return Message(read(connection, frame[1])[1], reply_to=message)
    except TimeoutError:
        doing = f", after {working['seconds']} s of {working['doing']}" if working else ""
        return _failed(
            message,
            f"ServiceError: the site's service has been silent for {SILENCE_S:g} s{doing}: "
            "it hangs",
            STOPPED,
        )
    except (FileNotFoundError, ConnectionRefusedError):
        return _failed(
            message, f"ServiceError: the site's service is away: nobody listens at {path}", STOPPED
        )
    except PermissionError:
        return _failed(
            message,
            f"ServiceError: this user must not open {path}: see group in the service's site.toml",
        )
    except (FrameError, OSError, ValueError) as error:
        return _failed(
            message,
            f"ServiceError: the site's service died at work or was restarted: {error}",
            STOPPED,
        )


def _failed(message: Message, reason: str, code: int = RAISED) -> Message:
    return Message(Error(code, reason), reply_to=message)


def _send(connection: Connection, kind: bytes, data: bytes) -> None:
    connection.sendall(FRAME.pack(kind, len(data)))
    connection.sendall(data)


def _receive_exactly(connection: Connection, length: int) -> bytes:
    # A BytesIO hands over its bytes without a copy.
    data, part = BytesIO(), memoryview(bytearray(min(length, PART)))
    while left := length - data.tell():
        if not (count := connection.recv_into(part[:left])):
            raise FrameError("the connection was closed")
        data.write(part[:count])
    return data.getvalue()


def _disassembled(content: RecordDict) -> tuple[dict[str, Any], list[bytes]]:
    records: dict[str, Any] = {}
    blobs: list[bytes] = []
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            records[name] = {
                "arrays": [
                    [key, each.dtype, list(each.shape), each.stype] for key, each in record.items()
                ]
            }
            blobs += [each.data for each in record.values()]
        else:
            kind = "metrics" if isinstance(record, MetricRecord) else "config"
            records[name] = {kind: {key: _json_value(value) for key, value in record.items()}}
    return records, blobs


def _assembled(connection: Connection, records: Mapping[str, Any]) -> RecordDict:
    content = RecordDict()
    for name, record in records.items():
        [(kind, parts)] = record.items()
        if kind == "arrays":
            content[name] = ArrayRecord(
                {
                    key: Array(dtype, tuple(shape), stype, _blob(connection))
                    for key, dtype, shape, stype in parts
                }
            )
        else:
            content[name] = KINDS[kind]({key: _value(value) for key, value in parts.items()})
    return content


def _blob(connection: Connection) -> bytes:
    kind, data = receive(connection)
    if kind != BLOB:
        raise FrameError("an array is missing")
    return data


def _json_value(value: Any) -> Any:
    """A value as JSON: bytes become an object with their base64."""
    if isinstance(value, bytes):
        return {"base64": b64encode(value).decode()}
    return [_json_value(each) for each in value] if isinstance(value, list) else value


def _value(value: Any) -> Any:
    if isinstance(value, dict):
        return b64decode(value["base64"])
    return [_value(each) for each in value] if isinstance(value, list) else value
