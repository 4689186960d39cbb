"""The event log of a run: one line of JSON for each event.

For the file ``events.jsonl`` of its folder, and the log of ``results.log = "json"``.
"""

import fcntl
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from configuration.config import Config
from configuration.files import append
from configuration.graph import graph_of
from page import as_json
from server_app.discovery import Site
from server_app.events import EVERYBODY, Began, Ended, Event, NewModel, Progress, Reported
from strategies.method import PeerPlan
from strategies.protocol import printable

FILE = "events.jsonl"
MOST = 4 * 2**20  # characters of the file
LONGEST = 500  # of a text
EDGES = 2000  # of a graph of peers
ALL = "all"


class EventFormatter:
    """Makes JSON objects of the events of a run.

    Args:
        config: the run.

    Attributes:
        run: the name of its folder.
        number: of the newest round, update or exchange.
    """

    def __init__(self, config: Config, run: str = "") -> None:
        self._config, self.run, self.number = config, run, 0
        self._reported: set[int] = set()
        self._sites = 0

    def format(self, event: Event) -> dict[str, Any] | None:
        """An event as a JSON object; None for what other files hold.

        That is metrics, models, and what is still to be computed (checkpoints).

        Every line has time, run, kind and round; that of a site also its number and name. The rest
        are the event's fields.
        """
        if isinstance(event, Reported):
            if event.split in ("train", "test") and event.site != EVERYBODY:
                self._reported.add(int(event.site))
            self.number = max(self.number, event.number)
        if isinstance(event, Reported | NewModel) or any(map(callable, event)):
            return None
        line: dict[str, Any] = {
            "time": now(),
            "run": self.run,
            "round": self.number,
            "kind": type(event).__name__.lower(),
        }
        match event:
            case Began():
                return line | self._start(event)
            case Progress():
                event = event._replace(
                    train=_main(event.train, event), test=_main(event.test, event)
                )
                line["round"] = self.number = event.round_number
                line["reported"], self._reported = (
                    ALL if len(self._reported) == self._sites else sorted(self._reported),
                    set(),
                )
        for key, value in event._asdict().items():
            if isinstance(value, Site):
                line |= {"site": value.number, "name": printable(value.name)}
            elif key == "when" and (number := str(value).rpartition(" ")[2]).isdigit():
                line["round"] = int(number)
            else:
                line[key] = _simple(value)
        return line

    def _start(self, began: Began) -> dict[str, Any]:
        config, sites = self._config, began.federation.sites
        self._sites = len(sites)
        edges = (
            [list(edge) for edge in graph_of(config).graph.edges]
            if isinstance(config.plan, PeerPlan)
            else []
        )
        return {
            "method": config.method.name,
            "unit": config.unit,
            "headline": config.task.headline,
            "larger": config.task.larger,
            "parameters": began.model.x.numel(),
            "sites": [
                {
                    "site": each.number,
                    "name": printable(each.name),
                    "train": each.num_train,
                    "test": each.num_test,
                }
                for each in sites
            ],
            "edges": edges[:EDGES],
        }


def _main(metrics: Mapping[str, float], progress: Progress) -> dict[str, float]:
    """The metrics that a line has; metrics.csv has all."""
    return {
        name: metrics[name] for name in ("loss", "lr-last", progress.headline) if name in metrics
    }


def now() -> str:
    """The present time in UTC, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _simple(value: object) -> object:
    """A value as JSON can hold it: an error as its text, None for what is no text or number."""
    if isinstance(value, BaseException):
        return printable(f"{type(value).__name__}: {value}", LONGEST)
    if isinstance(value, str):
        return printable(value, LONGEST)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _simple(each) for key, each in value.items()}
    return (
        [_simple(each) for each in value]
        if isinstance(value, list | tuple | set | frozenset)
        else None
    )


class EventLog:
    """The sink of ``events.jsonl``.

    The file is locked (``flock``) while the run goes on, so that others see whether it does.

    A file that grows above ``MOST`` characters loses the older half of its lines, but for the
    first.

    Args:
        config: the run.
        folder: where.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self._file: int | None = None
        self._path, self._formatter = folder / FILE, EventFormatter(config, folder.name)
        self._lines = (
            self._path.read_text().splitlines(keepends=True) if self._path.exists() else list[str]()
        )
        self._written, self._size = len(self._lines), sum(map(len, self._lines))
        self._ended = False

    def __call__(self, event: Event) -> None:
        """Append a line; all of them where the file is gone.

        The end of a run comes again where there was no space for it.
        """
        if not self._ended and (line := self._formatter.format(event)):
            self._lines.append(as_json(line) + "\n")
            self._size += len(self._lines[-1])
            if self._size > MOST:
                del self._lines[1 : len(self._lines) // 2]
                self._size, self._written = sum(map(len, self._lines)), 0
        self._ended = isinstance(event, Ended)
        if not self._path.exists():
            self._written = 0
        if self._written < len(self._lines):
            self._write()
        if isinstance(event, Ended):
            self._close()

    def _write(self) -> None:
        if self._written == 0:
            self._close()
            self._path.unlink(missing_ok=True)
        if self._file is None:
            self._file = os.open(
                self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644
            )
            with suppress(OSError):  # a file system without locks
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        append(self._file, "".join(self._lines[self._written :]).encode())
        self._written = len(self._lines)

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __del__(self) -> None:
        self._close()


def is_running(file: Path) -> bool:
    """Whether the run of an event log goes on: a process of this machine has locked the file."""
    try:
        with file.open("rb") as log:
            fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


class JsonConsole(logging.Formatter):
    """The console's sink where ``results.log`` is json.

    Events and Flower's log as lines of JSON, each with run, round, site.

    Args:
        config: the run.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.formatter = EventFormatter(config)
        self._logged: Any = None
        self._before = {
            handler: handler.formatter for handler in logging.getLogger("flwr").handlers
        }
        for handler in self._before:
            handler.setFormatter(self)

    def __call__(self, event: Event) -> None:
        """Print it, unless it was logged."""
        line = self.formatter.format(event)
        if line and event is not self._logged:
            print(as_json({"site": None} | line), flush=True)
        if isinstance(event, Ended):
            for handler, former in self._before.items():
                handler.setFormatter(former)

    def format(self, record: logging.LogRecord) -> str:
        """A line; one about an event has its round and site."""
        args = record.args if isinstance(record.args, tuple) else ()
        self._logged = next((each for each in args if hasattr(each, "_asdict")), None)
        line = {
            "time": now(),
            "run": self.formatter.run,
            "round": self.formatter.number,
            "site": None,
            "kind": "log",
        }
        line |= (self.formatter.format(self._logged) or {}) if self._logged else {}
        return as_json(
            line | {"level": record.levelname.lower(), "message": super().format(record)}
        )
