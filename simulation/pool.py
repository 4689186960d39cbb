"""Many runs at once, in processes of which any may be killed, and a bar that shows all."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from joblib.externals.loky import get_reusable_executor
from tqdm.auto import tqdm

T = TypeVar("T")
IDLE_S = 60  # after which a process ends for which there is no work
KILLED = "its process was killed, twice: perhaps for want of memory; fewer processes take less"


def in_processes(
    jobs: Sequence[Callable[[Path], T]], processes: int | None, bar: "tqdm[Any]"
) -> Iterator[tuple[int, T | None]]:
    """The number and the result of each job, as they come; the number of processes changes none.

    A process that is killed takes all others of its pool with it: what they were at is tried again,
    each in a process alone, and the result of a job that is killed there, too, is None.

    Args:
        jobs: each gets a file, into which it writes how many units of the bar it has done and,
            after a blank, what the bar shall say.
        processes: by default one a GPU, or one a core where there is none.
        bar: moves on.
    """
    gpus = torch.cuda.device_count()
    workers = min(len(jobs), processes or gpus or os.cpu_count() or 1)
    with TemporaryDirectory() as folder, _watching(Path(folder), bar):
        calls = [
            partial(_call, job, index % gpus if gpus else None, Path(folder) / str(index))
            for index, job in enumerate(jobs)
        ]
        if workers > 1:
            yield from _results(calls, workers)
            return
        for index, call in enumerate(calls):
            yield index, call()


def _call(job: Callable[[Path], T], gpu: int | None, file: Path) -> T:
    if gpu is not None:
        torch.cuda.set_device(gpu)  # what device = "auto" means in this process
    return job(file)


def _results(calls: Sequence[Callable[[], T]], workers: int) -> Iterator[tuple[int, T | None]]:
    waiting, suspects = deque(range(len(calls))), deque[int]()
    running: dict[Future[T], int] = {}
    alone, executor = False, None
    try:
        while waiting or suspects or running:
            alone = alone if running else bool(suspects)
            queue, room = (suspects, 1) if alone else (waiting, workers)
            # Its processes are new ones (torch, once used, does not survive a fork).
            executor = get_reusable_executor(room, timeout=IDLE_S)
            with suppress(BrokenExecutor):  # by a process that had no work; there will be another
                while queue and len(running) < room:
                    running[executor.submit(calls[queue[0]])] = queue[0]
                    queue.popleft()
            broken: list[int] = []
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                index = running.pop(future)
                try:
                    result = future.result()
                except BrokenExecutor:
                    broken.append(index)
                else:
                    yield index, result
            if broken and alone:
                yield broken[0], None
            elif broken:
                suspects.extend(sorted([*broken, *running.values()]))
                running.clear()
    finally:
        if running and executor:
            executor.shutdown(kill_workers=True)


@contextmanager
def _watching(folder: Path, bar: "tqdm[Any]") -> Iterator[None]:
    """Show on the bar what the jobs, in whatever process, write into files of the folder."""
    over, before = threading.Event(), bar.n

    def look() -> None:
        while not over.wait(0.5):
            show()

    def show() -> None:
        states = [
            (file.stat().st_mtime, file.read_text().partition(" ")) for file in folder.iterdir()
        ]
        if not states:
            return
        bar.set_postfix_str(max(states)[1][2], refresh=False)
        bar.update(before + sum(int(done or 0) for _, (done, _, _) in states) - bar.n)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        show()
