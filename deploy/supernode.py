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
from pathlib import Path
from typing import Any

ASK_EVERY_S = 15.0


def end_clientapps_with_their_runs() -> None:
    """Ask the SuperLink once in a while whether the runs of the ClientApps go on.

    Raises:
        ImportError, AttributeError: another version of Flower has other parts.
    """
    from flwr.supercore.run import RunNotRunningException
    from flwr.supernode import start_client_internal as supernode

    pull, due = supernode._pull_and_store_message, 0.0

    def ask_and_pull(*, state: Any, get_run: Any, **rest: Any) -> Any:
        nonlocal due
        if time.monotonic() >= due:
            for process, token in _clientapps():
                if task := state.get_task_by_token(token):
                    try:
                        get_run(task.run_id)
                    except RunNotRunningException:
                        with suppress(ProcessLookupError):
                            os.kill(process, signal.SIGTERM)
            due = time.monotonic() + ASK_EVERY_S
        return pull(state=state, get_run=get_run, **rest)

    supernode._pull_and_store_message = ask_and_pull  # called again and again, with all it needs


def _clientapps() -> Iterator[tuple[int, str]]:
    """The processes of this machine's ClientApps, and by what their SuperNode knows each."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError, ValueError):  # it ended just now, or is none
            words = file.read_bytes().decode(errors="replace").split("\0")
            if any(word.endswith("flwr-clientapp") for word in words[:2]):
                yield int(file.parent.name), words[words.index("--token") + 1]


def main() -> None:
    """Run it."""
    [command] = entry_points(group="console_scripts", name="flower-supernode")
    code = 1
    try:
        run = command.load()
        try:
            end_clientapps_with_their_runs()
        except (ImportError, AttributeError) as error:
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
