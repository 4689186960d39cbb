"""Experiment trackers: each gets the metrics over all sites, and each site's headline and loss.

They are chosen by ``results.trackers = "tensorboard mlflow"``. TensorBoard's files go into the
run's folder; MLflow goes where its own environment variables say (``MLFLOW_TRACKING_URI``,
``MLFLOW_EXPERIMENT_NAME``). Their libraries are extras of this project.
"""

import math
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from logging import WARNING
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Any

from configuration.config import Config
from configuration.errors import ConfigError
from configuration.flower import log
from server_app.events import EVERYBODY, Ended, Event, Reported

WAITING = 100_000  # events that a slow tracker has not yet taken; it loses further ones
PATIENCE_S = 60.0  # at the end of a run

Write = Callable[[int, Mapping[str, float]], None]
"""Of a round: values by name."""


class Trackers:
    """The sink of all trackers.

    They work in a thread: neither their pace nor their failures affect the run.

    Args:
        config: the run.

    Raises:
        ConfigError: a library is missing.
    """

    def __init__(self, config: Config) -> None:
        self._config, self._names = config, tuple(dict.fromkeys(config.results.trackers.split()))
        for name in self._names:
            if find_spec(name) is None:
                raise ConfigError(
                    f"results.trackers = {config.results.trackers!r}: {name} is not installed; "
                    f"it is the extra {name!r} of this project: "
                    f"python -m uv sync --inexact --python .venv/bin/python --extra {name}"
                )
        self._events: Queue[Event] = Queue(WAITING)

    def begin(self, folder: Path) -> "Trackers":
        """Start the trackers of a run, whose results are in a folder."""
        self._threads = (
            [Thread(target=self._work, args=[folder], daemon=True)] if self._names else []
        )
        for thread in self._threads:
            thread.start()
        return self

    def __call__(self, event: Event) -> None:
        """Pass an event to the trackers."""
        if self._threads and isinstance(event, Reported | Ended):
            try:
                self._events.put(event, timeout=PATIENCE_S if isinstance(event, Ended) else 0)
            except Full:
                return
        if isinstance(event, Ended):
            for thread in self._threads:
                thread.join(PATIENCE_S)

    def _work(self, folder: Path) -> None:
        writers: dict[str, tuple[Write, Callable[[str], None]]] = {}
        for name in self._names:
            try:
                writers[name] = STARTS[name](self._config, folder)
            except Exception as error:
                _without(name, error)
        while True:
            event = self._events.get()
            for name, (write, end) in list(writers.items()):
                try:
                    if isinstance(event, Ended):
                        end("FAILED" if event.error else "FINISHED")
                    elif isinstance(event, Reported) and (values := self._values(event)):
                        write(event.number, values)
                except Exception as error:
                    del writers[name]
                    _without(name, error)
            if isinstance(event, Ended):
                return

    def _values(self, event: Reported) -> dict[str, float]:
        chosen = dict(event.metrics)
        if event.site == EVERYBODY:
            chosen |= {
                "seconds": event.seconds,
                "bytes-up": event.bytes_up,
                "bytes-down": event.bytes_down,
            }
        else:
            known = (self._config.task.headline, "loss")
            chosen = {f"{name}/site-{event.site}": chosen[name] for name in known if name in chosen}
        return {
            f"{event.split}/{name}": float(value)
            for name, value in chosen.items()
            if math.isfinite(value)
        }


def _tensorboard(config: Config, folder: Path) -> tuple[Write, Callable[[str], None]]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def write(number: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, number)
        writer.flush()

    return write, lambda _: writer.close()


def _mlflow(config: Config, folder: Path) -> tuple[Write, Callable[[str], None]]:
    import mlflow

    client: Any = mlflow.MlflowClient()
    run = mlflow.start_run(run_name=folder.name)
    mlflow.log_params(config.flat())

    def write(number: int, values: Mapping[str, float]) -> None:
        moment = time.time_ns() // 10**6
        entities = [
            mlflow.entities.Metric(name, value, moment, number) for name, value in values.items()
        ]
        client.log_batch(run.info.run_id, entities)

    return write, lambda status: client.set_terminated(run.info.run_id, status)


STARTS: dict[str, Callable[[Config, Path], tuple[Write, Callable[[str], None]]]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
}


def _without(name: str, error: Exception) -> None:
    """Log that a tracker fails."""
    text = "%s: %s: %s; the run goes on without it"
    log(WARNING, text, name, type(error).__name__, error)
