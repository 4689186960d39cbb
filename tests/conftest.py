"""What tests share.

The default configuration, and a run of the real ServerApp and ClientApp in this process.
"""

import logging
import multiprocessing
import os
import re
import signal
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import pandas as pd
import pytest
import torch
from flwr.app import Message
from safetensors.torch import load_file
from torch import Tensor
from xdist.scheduler import LoadScopeScheduling

from client_app.app import app as client_app
from configuration.config import flatten
from server_app import plots
from server_app.app import app as server_app
from server_app.results import Pictures
from simulation.grid import run_in_process
from strategies.methods import find


class EndToEndTogether(LoadScopeScheduling):  # type: ignore[misc]
    """Tests with processes of Flower's own run one after the other in two of pytest's processes.

    Those with SuperNodes, which often wait for a minute, in one, those with Ray and browsers in the
    other; all others run beside them.
    """

    def _split_scope(self, nodeid: str) -> str:
        if "tests/e2e/" not in nodeid:
            return nodeid
        return "SuperNodes" if re.search(r"test_(deploy\w*|service)\.py", nodeid) else "Ray"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> EndToEndTogether:
    """What ``--numprocesses`` distributes tests with."""
    return EndToEndTogether(config, log)


logging.getLogger("flwr").propagate = True  # for caplog, which would hear it twice if this changed


def pytest_sessionfinish() -> None:
    """Python would wait for the processes that a test which failed has left."""
    for process in multiprocessing.active_children():
        assert process.pid
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)  # joblib's have no kill()


ROOT = Path(__file__).parent.parent
mpl.use("agg")
# Small networks, and tests run side by side; also in processes that they start: threads that wait
# for each other spin.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where this process and those that tests start keep decoded data, apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home := tmp_path_factory.mktemp("cache")))
        yield home


def default_config() -> dict[str, Any]:
    """The defaults of ``pyproject.toml``, as Flower hands them over."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        return flatten(tomllib.load(file)["tool"]["flwr"]["app"]["config"])


def own(strategy: str, **keys: Any) -> dict[str, Any]:
    """Those of the keys that a method takes, in its own section."""
    method = find(strategy)
    return {
        f"{method.table}.{key}": value
        for key, value in keys.items()
        if key in method.keys.model_fields
    }


class Run(NamedTuple):
    """What a run left in its folder."""

    folder: Path
    metrics: pd.DataFrame
    model: dict[str, Tensor]

    def trace(self, metric: str, split: str = "test", site: str = "all") -> list[float]:
        """A metric, round by round."""
        chosen = (
            (self.metrics["metric"] == metric)
            & (self.metrics["split"] == split)
            & (self.metrics["site"] == site)
        )
        return [float(value) for value in self.metrics[chosen]["value"]]


RunApp = Callable[..., Run]


@pytest.fixture
def run_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunApp:
    """``run_app(tamper=None, draw=False, epochs=2, ...)`` runs the app on digits.

    Small and fast unless told otherwise.
    """
    small = {
        "num-sites": 3,
        "epochs": 2,
        "model.name": "mlp",
        "results.folder": str(tmp_path / "runs"),
    }

    def run(
        tamper: Callable[[int, Message, Message], Message | None] | None = None,
        draw: bool = False,
        **changes: Any,
    ) -> Run:
        if not draw:  # most of the time of a small run
            monkeypatch.setattr(Pictures, "draw_curves", lambda pictures: None)
            monkeypatch.setattr(plots, "save", lambda *arguments: None)
        before = set((tmp_path / "runs").glob("*"))
        short = own(changes.get("strategy", "co-learning"), local_epochs=1)
        config = default_config() | small | flatten(short) | flatten(changes)
        run_in_process(server_app, client_app, config["num-sites"], config, tamper)
        (folder,) = set((tmp_path / "runs").glob("*")) - before
        return read_run(folder)

    return run


def read_run(folder: Path) -> Run:
    """A run from its folder."""
    model = folder / "model.safetensors"
    return Run(
        folder, pd.read_csv(folder / "metrics.csv"), load_file(model) if model.exists() else {}
    )
