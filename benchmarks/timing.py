"""Times loops side by side."""

import time
from collections.abc import Callable, Mapping


def in_turns(runs: Mapping[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, ``repeats`` times, in turns, so that a busy machine disturbs all.

    The first turn warms up and is not counted.
    """
    times: dict[str, list[float]] = {label: [] for label in runs}
    for repeat in range(repeats + 1):
        for label, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat:
                times[label].append(time.perf_counter() - start)
    return times
