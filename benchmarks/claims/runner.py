"""Runs the cells of a claim, each run once: what is finished stands in one small file.

A run's file is named by the whole configuration: a claim that is killed goes on, and claims share
runs. Which commit made a run stands in its file and on the page; after a change of the code or the
data that changes results, delete ``runs/claims/``.
"""

import hashlib
import json
import logging
import math
import os
import platform
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from benchmarks.claims.claim import Cell, Censored, Claim, Measure, Record, Setting
from configuration.config import ROOT, Config, flatten
from configuration.errors import ConfigError
from configuration.graph import graph_of
from server_app.discovery import RunError
from simulation.laboratory import Run, simulate
from simulation.pool import KILLED, in_processes
from strategies.method import PeerPlan
from strategies.topology import TopologyError

FOLDER = ROOT / "runs/claims"
Final = Callable[[Run], dict[str, float]]


def digest(value: Any) -> str:
    """A name for a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


def identity(config: Config, cell: Cell, final: Final | None) -> dict[str, Any]:
    """All that a run's result follows from, but for the code.

    Where the data lie on this machine is not in it.
    """
    world = cell.setting.world
    told = {**cell.setting.keys, **flatten(cell.candidate.keys)}
    return {
        "keys": config.flat() | {"data.path": told.get("data.path", ""), "results.folder": ""},
        "engine": cell.engine,
        "world": world.model_dump(mode="json") if world else None,
        "final": f"{final.__module__}.{final.__qualname__}" if final else None,
    }


def write(file: Path, value: Any) -> None:
    """A file of JSON, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial_file = file.with_suffix(f".{os.getpid()}")
    partial_file.write_text(json.dumps(value))
    partial_file.replace(file)


def place(folder: Path, cell: Cell, seed: int, final: Final | None) -> Path:
    """The file of a run."""
    return folder / "records" / f"{digest(identity(cell.config(seed), cell, final))}.json"


def read(file: Path) -> Record | None:
    """What is kept of a run; None where it is not finished."""
    try:
        found = json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # the power may fail before a file is whole
        return None
    found.pop("run")
    return Record(**found | {"history": pd.DataFrame(found["history"])})


@cache
def commit() -> str:
    """Of this checkout; with a plus where files differ from it."""
    try:
        said = ("git", "-C", str(ROOT), "describe", "--always", "--abbrev=7", "--exclude=*")
        return subprocess.check_output([*said, "--dirty=+"], text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@cache
def machine() -> str:
    """This one."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        model = next(line for line in text.splitlines() if line.startswith("model name"))
        processor = model.partition(":")[2].strip()
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    return f"{processor}, {os.cpu_count()} cores, torch {torch.__version__}"


def check(cells: Sequence[Cell], seeds: int) -> None:
    """Make sure that everything can be configured.

    Raises:
        ConfigError: names the cell, the key, its value and what is allowed.
    """
    for cell in cells:
        points: list[dict[str, Any]] = [{}]
        points += [{key: value} for key, values in cell.candidate.space.items() for value in values]
        for point in points:
            try:
                for seed in range(1, seeds + 1):
                    config = Cell(cell.setting, cell.candidate, {**cell.keys, **point}).config(seed)
                    if isinstance(config.plan, PeerPlan):
                        graph_of(config)
                    if cell.setting.world:
                        cell.setting.world.sites(config.num_sites, seed)
            except (ConfigError, TopologyError) as error:
                where = f"{cell.setting.name}, {cell.candidate.name}"
                raise ConfigError(f"{where}: {error}") from None


def run_cells(
    claim: Claim, cells: Sequence[Cell], seeds: int, folder: Path, processes: int | None
) -> None:
    """Run what is not finished: all cells with the first seed, then all with the second, ...

    Raises:
        KeyboardInterrupt: what was finished is kept.
    """
    jobs: list[tuple[Path, Cell, int]] = []
    for seed in range(1, seeds + 1):
        for cell in cells:
            file = place(folder, cell, seed, claim.final)
            if not _is_kept(file) and file not in [known for known, *_ in jobs]:
                jobs.append((file, cell, seed))
    calls = [partial(_run, file, cell, seed, claim.final, commit()) for file, cell, seed in jobs]
    with tqdm(total=len(jobs), desc="runs", unit="run") as bar:
        for index, finished in in_processes(calls, processes, bar):
            _, cell, seed = jobs[index]
            name = f"{cell.setting.name}, {cell.candidate.name}, seed {seed}"
            if finished is None:
                warnings.warn(f"{name}: {KILLED}", stacklevel=2)
            elif not finished:
                raise KeyboardInterrupt


def _is_kept(file: Path) -> bool:
    """Whether a run is finished; one that failed with another commit is tried again."""
    known = read(file)
    return known is not None and (not known.failure or known.commit == commit())


def _run(
    file: Path, cell: Cell, seed: int, final: Final | None, commit: str, progress: Path
) -> bool:
    """Run it and keep it; False where it was interrupted."""
    config, start = cell.config(seed), time.perf_counter()
    found: dict[str, Any] = {"history": {}, "final": {}, "failure": ""}
    try:
        keys: dict[str, Any] = config.flat()
        with _quiet():
            run = simulate(engine=cell.engine, world=cell.setting.world, progress=False, **keys)
        if not run.finished:
            return False
        found["history"] = run.history.to_dict("list")
        found["final"] = final(run) if final else {}
    except (RunError, ValueError) as error:
        found["failure"] = str(error)
    found |= {
        "headline": config.task.headline,
        "larger": config.task.larger,
        "commit": commit,
        "machine": machine(),
        "seconds": time.perf_counter() - start,
        "run": identity(config, cell, final),
    }
    write(file, found)
    progress.write_text(f"1 {cell.setting.name}, {cell.candidate.name}, seed {seed}")
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    """That a world takes sites away and brings them back is no news, and would hide the bar."""
    logger = logging.getLogger("flwr")

    def news(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logger.addFilter(news)
    try:
        yield
    finally:
        logger.removeFilter(news)


def results(
    claim: Claim, cells: Sequence[Cell], seeds: int, folder: Path
) -> tuple[pd.DataFrame, dict[tuple[str, str, int], Record]]:
    """The measures of all finished runs, tidy, and their records.

    The table has the columns setting, candidate, seed, measure, value (NaN where the run failed, or
    has none), censored (whether that is only a lower bound) and tuned (keys and what the search
    found).
    """
    records: dict[tuple[str, str, int], Record] = {}
    for cell, seed in product(cells, range(1, seeds + 1)):
        if (record := read(place(folder, cell, seed, claim.final))) is not None:
            records[cell.setting.name, cell.candidate.name, seed] = record
    rows = []
    for cell, seed, measure in product(cells, range(1, seeds + 1), claim.measures):
        key = (cell.setting.name, cell.candidate.name, seed)
        if key in records:
            beside = records.get((cell.setting.name, measure.beside, seed))
            value = _measured(measure, cell.setting, records[key], beside)
            tuned = " ".join(f"{each}={cell.keys[each]}" for each in cell.candidate.space)
            rows.append((*key, measure.name, float(value), isinstance(value, Censored), tuned))
    columns = ["setting", "candidate", "seed", "measure", "value", "censored", "tuned"]
    return pd.DataFrame(rows, columns=columns), records


def _measured(measure: Measure, setting: Setting, record: Record, beside: Record | None) -> float:
    if record.failure or (measure.beside and (beside is None or beside.failure)):
        return math.nan
    return measure.of(record, setting, *([beside] if measure.beside else []))
