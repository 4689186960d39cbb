"""A ClientApp whose run is over is ended, and answered for where its SuperNode waits for it."""

import signal
import subprocess
from types import SimpleNamespace

import pytest
from flwr.supercore.run import RunNotRunningException

from deploy.supernode import end_with_run


@pytest.mark.parametrize(
    ("over", "awaited", "answered"),
    [(True, [7], True), (True, [8], False), (True, [], False), (False, [7], False)],
)
def test_clientapp_ends_with_its_run(over: bool, awaited: list[int], answered: bool) -> None:
    replies, finished = list[object](), list[int]()
    state = SimpleNamespace(
        _on_task_tokens_expired=replies.extend,
        finish_task=lambda task, status, details: finished.append(task),
    )
    task = SimpleNamespace(run_id=7, task_id=3)

    def get_run(run: int) -> None:
        assert run == 7
        if over:
            raise RunNotRunningException

    with subprocess.Popen(["sleep", "1000"]) as process:
        end_with_run(process.pid, task, state, get_run, awaited)
        if not over:
            assert process.poll() is None
            process.kill()
        assert process.wait() == -signal.SIGKILL
    assert replies == [task] * answered
    assert finished == [3] * over
