"""Start a run, follow it to its end, and say by the exit code how it ended.

    python -m deploy.run -- [APP] [SUPERLINK] [--run-config ...] [--federation-config ...]

takes the arguments of ``flwr run``; without APP it runs this checkout. The run's log is shown as it
comes, and what ended the run last, without a traceback where its user can mend it. A SuperLink that
is away for a while is waited for, since the run goes on; a ServerApp that was killed is started
again, and goes on from its checkpoint.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from click import ClickException

from configuration.__main__ import pairs, parsed
from configuration.config import Config, configuration
from configuration.errors import ConfigError

ROOT = Path(__file__).parent.parent
# The one place that says how a run that was killed goes on: what is set in its configuration when
# it is started again.
RESUME: dict[str, Any] = {"results.resume": "auto"}
RESTARTS = 10  # of a run; one that goes on for STEADY_S starts counting from 0
STEADY_S = 3600.0
FIRST_WAIT_S, LONGEST_WAIT_S = 5.0, 300.0
ASK_S = 1.0  # from one question to the SuperLink to the next
# Flower's words where a SuperLink came back without its database, and where a ServerApp was ended.
LOST = "Run ID not found"
KILLED = LOST, "No heartbeat received", "Task failed with unknown error"
OURS = re.compile(r"(configuration|server_app|strategies|datasets|models)\.[\w.]+Error")
# Lines of the command, not of the run.
OF_COMMAND = re.compile(r"^Using SuperLink|(Starting|Exiting) logstream")
FAILED = re.compile(r"ERROR\s*:\s*(ServerApp|Simulation) raised an exception")
STARTED = re.compile(r"Successfully started run (\d+)")
COLOURS = re.compile(r"\x1b\[[\d;]*m")


class Exit(IntEnum):
    """How a run ended; ``make run`` ends with make's own 2 where this is not 0, and shows it."""

    FINISHED = 0
    ERROR = 1
    """of the program, or of Flower: it was not started, or it ended with a traceback"""
    REFUSED = 2
    """the configuration cannot be run"""
    ENDED = 3
    """it could not start or go on: too few sites, a model that is not finite, a full disk; the
    message says what"""
    CRASHED = 4
    """the ServerApp was killed again and again"""
    STOPPED = 5
    """by ``flwr stop``"""
    INTERRUPTED = 130
    """this program was interrupted (Ctrl-C); the run goes on"""


class RunStatus(NamedTuple):
    """What Flower says of a run."""

    status: str
    details: str


class Run:
    """One ``flwr run``.

    Args:
        config: of the run.
        asked: the other arguments.
    """

    def __init__(self, config: Config, asked: Namespace) -> None:
        self._superlink = [asked.superlink] if asked.superlink else []
        self._command = [
            "flwr",
            "run",
            asked.app,
            *self._superlink,
            "--stream",
            "--run-config",
            pairs(config),
        ]
        if asked.federation:
            self._command += ["--federation", asked.federation]
        for each in asked.federation_config:
            self._command += ["--federation-config", each]
        self._shown, self._held = 0, list[str]()
        self.id = ""

    def start(self) -> bool:
        """Start the run and show its log; return whether Flower took it."""
        print("+", shlex.join(self._command), flush=True)
        self._show(self._command)
        return bool(self.id)

    def follow(self) -> RunStatus:
        """Wait for its end, with what it logs, however often the SuperLink is away."""
        away = False
        while True:
            found = self._status()
            if found is not None and found.status.startswith("finished:"):
                self._show(["flwr", "log", self.id, *self._superlink, "--stream"], quiet=True)
                return found
            if found is None and not away:
                _print("the SuperLink does not answer: waiting for it; the run goes on meanwhile")
            away = found is None
            time.sleep(ASK_S)
            if found is not None:
                self._show(["flwr", "log", self.id, *self._superlink, "--stream"], quiet=True)

    def exit_code(self, ended: RunStatus) -> Exit:
        """The exit code of a run that is over; print why it ended."""
        if ended.status == "finished:completed":
            self._release()
            return Exit.FINISHED
        if ended.status == "finished:stopped":
            self._release()
            return _print_and_return(Exit.STOPPED, "the run was stopped")
        if ended.details.startswith(KILLED):
            self._release()
            return _print_and_return(Exit.CRASHED, f"run {self.id} was killed: {ended.details}")
        message = ended.details.partition("failed with exception: ")[2] or ended.details
        first = re.escape(message.partition("\n")[0])
        kinds = [
            found[1]
            for line in self._held
            if (found := re.match(rf"([\w.]+): {first}", COLOURS.sub("", line)))
        ]
        if not kinds or not OURS.fullmatch(kinds[-1]):
            self._release()
            return _print_and_return(Exit.ERROR, message)
        return _print_and_return(
            Exit.ENDED if kinds[-1].endswith(".RunError") else Exit.REFUSED, message
        )

    def _show(self, command: list[str], quiet: bool = False) -> None:
        """Show the lines of the run's log that were not shown yet.

        From Flower's report of an exception on they are held.
        """
        seen, error = 0, subprocess.DEVNULL if quiet else None
        env = os.environ | {"PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=error, text=True, bufsize=1, env=env
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                plain = COLOURS.sub("", line)
                if not self.id:
                    self.id = found[1] if (found := STARTED.search(plain)) else ""
                    print(line, end="", flush=True)
                    continue
                if OF_COMMAND.search(plain):
                    continue
                seen += 1
                if seen <= self._shown:
                    continue
                if self._held or FAILED.match(plain):
                    self._held.append(line)
                else:
                    print(line, end="", flush=True)
        self._shown = max(self._shown, seen)

    def _release(self) -> None:
        print("".join(self._held), end="", flush=True)

    def _status(self) -> RunStatus | None:
        """What Flower says of the run; None where the SuperLink does not answer."""
        command = ["flwr", "list", *self._superlink, "--run-id", self.id, "--format", "json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if LOST in done.stdout + done.stderr:
            return RunStatus("finished:failed", LOST)
        try:
            (run,) = json.loads(done.stdout)["runs"]
            return RunStatus(run["status"], run["status-details"])
        except (ValueError, KeyError, TypeError):
            return None


def read(arguments: list[str]) -> tuple[Config, Namespace]:
    """The arguments of ``flwr run``: the configuration, and the others.

    Raises:
        ConfigError: it cannot be run.
    """
    parser = ArgumentParser(prog="python -m deploy.run --", allow_abbrev=False)
    parser.add_argument("app", nargs="?", default=str(ROOT))
    parser.add_argument("superlink", nargs="?", default="")
    parser.add_argument("-c", "--run-config", action="append", default=[])
    parser.add_argument("--federation", default="")
    parser.add_argument("--federation-config", action="append", default=[])
    parser.add_argument("--stream", action="store_true", help="always")
    asked = parser.parse_args(arguments)
    whole = " ".join(asked.run_config)
    return configuration(whole) if whole.endswith(".toml") else configuration(
        **parsed(whole)
    ), asked


def main(arguments: list[str]) -> Exit:
    """Start a run, follow it to its end, and start it again if it was killed."""
    try:
        config, asked = read(arguments[1:] if arguments[:1] == ["--"] else arguments)
        run = Run(config, asked)
    except (ConfigError, ClickException) as error:
        return _print_and_return(Exit.REFUSED, str(error))
    wait, restarts = FIRST_WAIT_S, 0
    while True:
        start = time.monotonic()
        if not run.start():
            return Exit.ERROR
        code = run.exit_code(run.follow())
        if time.monotonic() - start > STEADY_S:
            wait, restarts = FIRST_WAIT_S, 0
        if code != Exit.CRASHED or restarts == RESTARTS:
            return code
        _print(f"it is started again in {wait:g} s, from its checkpoint")
        time.sleep(wait)
        run = Run(configuration(**config.flat() | RESUME), asked)
        wait, restarts = min(2 * wait, LONGEST_WAIT_S), restarts + 1


def _print(message: str) -> None:
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)


def _print_and_return(code: Exit, message: str) -> Exit:
    _print(message)
    return code


if __name__ == "__main__":
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(
            _print_and_return(
                Exit.INTERRUPTED,
                "no longer followed; the run goes on: flwr list, flwr log RUN, flwr stop RUN",
            )
        )
