"""Flower's SuperNode, with two things that a site needs of it.

    python -P deploy/supernode.py ...       the arguments of flower-supernode

Its process ends when it does: a SuperNode gives up where TLS fails, such as behind a load balancer
that takes connections while the SuperLink restarts, but its process stays, since a thread of its
own goes on, and whoever supervises it sees nothing wrong.

Its ClientApps end when their run does, whether it was stopped or failed: Flower lets them go on for
as long as a message takes, and the site answers no other run. (Both seen with Flower 1.42.)
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import entry_points
from inspect import signature
from pathlib import Path
from threading import Event, Thread
from typing import Any

ASK_EVERY_S = 15.0


def end_clientapps_with_their_runs() -> None:
    """Ask the SuperLink once in a while whether the runs of the ClientApps go on.

    Raises:
        ImportError, AttributeError, TypeError: another version of Flower has other parts.
    """
    from flwr.supernode import start_client_internal as supernode

    pull, started = supernode._pull_and_store_message, Event()
    if not {"state", "get_run"} <= signature(pull).parameters.keys():
        raise TypeError(f"{pull.__name__} takes other arguments")

    awaited: list[int] = []  # the run whose message the SuperNode pulled, and waits to be answered

    def ask(state: Any, get_run: Any) -> None:
        while True:
            time.sleep(ASK_EVERY_S)
            for process, token in _clientapps():
                try:
                    if task := state.get_task_by_token(token):
                        end_with_run(process, task, state, get_run, awaited)
                except Exception as error:  # as long as nobody can be asked, it may go on
                    print(f"{type(error).__name__}: {error}", file=sys.stderr)

    def start_and_pull(*values: Any, **named: Any) -> Any:
        if not started.is_set():
            started.set()
            given = signature(pull).bind(*values, **named).arguments
            Thread(target=ask, args=[given["state"], given["get_run"]], daemon=True).start()
        awaited.clear()
        run = pull(*values, **named)
        awaited.extend([] if run is None else [run])
        return run

    supernode._pull_and_store_message = start_and_pull  # the first that is called with both


def end_with_run(process: int, task: Any, state: Any, get_run: Any, awaited: list[int]) -> None:
    """End the process of a ClientApp if the run of its task is over.

    Args:
        process: its number.
        task: Flower's, of the ClientApp.
        state: the SuperNode's.
        get_run: asks the SuperLink for a run.
        awaited: the run whose message the SuperNode waits to be answered; or none.
    """
    from flwr.supercore.run import RunNotRunningException

    try:
        get_run(task.run_id)
    except RunNotRunningException:
        # Not by SIGTERM: a ClientApp that ends in order sends no reply, and its SuperNode waits for
        # one. One that crashed is given one, here at once instead of after a minute.
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        # But not where it waits for that of another run: it would take the one for the other, and
        # not send that.
        if task.run_id in awaited:
            state._on_task_tokens_expired([task])
        state.finish_task(task.task_id, "stopped", "its run is over")


def _clientapps() -> Iterator[tuple[int, str]]:
    """The processes of this machine's ClientApps, and by what their SuperNode knows each."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError, ValueError):  # it ended just now, or is none
            words = file.read_bytes().decode(errors="replace").split("\0")
            if any(word.endswith("flwr-clientapp") for word in words[:2]):
                yield int(file.parent.name), words[words.index("--token") + 1]


def main() -> None:
    """Run the SuperNode."""
    [command] = entry_points(group="console_scripts", name="flower-supernode")
    code = 1
    try:
        run = command.load()
        try:
            end_clientapps_with_their_runs()
        except (ImportError, AttributeError, TypeError) as error:
            print(f"ClientApps of runs that are stopped will go on: {error}", file=sys.stderr)
        run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
