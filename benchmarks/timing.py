"""Times loops side by side, and the rounds of the app."""

import time
from collections.abc import Callable, Mapping

from client_app.app import app
from configuration.config import Config
from server_app.app import run as run_server
from server_app.events import Progress
from server_app.results import History
from simulation.grid import VirtualGrid
from simulation.world import World


class Ends(History):
    """A history that notes when each round ended, in seconds of the clock."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.ends: list[float] = []

    def show_progress(self, progress: Progress) -> None:
        """Note the time."""
        self.ends.append(time.time())


def rounds(config: Config, kind: type[VirtualGrid] = VirtualGrid) -> Ends:
    """Run the app in this process."""
    history = Ends(config)
    grid = kind(app, World().sites(config.num_sites, 1), config.flat())
    run_server(grid, config, history)
    return history


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
