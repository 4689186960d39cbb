"""The same search for every candidate, on examples that no table is made of."""

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from benchmarks.claims.claim import Cell, Size
from benchmarks.claims.runner import digest, identity, write
from configuration.config import configuration
from configuration.errors import ConfigError
from server_app.discovery import RunError
from simulation.search import search

FIRST_SEED = 101  # of trials; seeds of runs are below
WIDER = 3  # times at most
RULES = 2  # what was chosen by other rules of searching is not taken
Grid = Mapping[str, list[Any]]


class Choice(NamedTuple):
    """What a search found.

    Attributes:
        keys: the best.
        grid: of each key all values that were tried.
        trials: so many, with those of wider grids.
        value: the mean headline on the validation part; NaN where every trial failed.
        border: keys whose best value is at the border of its grid all the same.
    """

    keys: dict[str, Any]
    grid: dict[str, list[Any]]
    trials: int
    value: float
    border: list[str]


def tuned(cell: Cell, size: Size, folder: Path, processes: int | None) -> Choice:
    """Search a candidate's keys in a setting; what is finished is only read.

    A number whose best value is the smallest or the largest that was tried gets one beyond it, as
    far away as its neighbour on the other side (:func:`_beyond`), until it is not, or that is not
    allowed.

    Raises:
        KeyboardInterrupt: finished trials are kept.
    """
    if found := known(cell, size, folder):
        return found
    grid = {key: list(values) for key, values in cell.candidate.space.items()}
    space: Grid = grid
    sign = 1 if cell.config(1).task.larger else -1
    best: tuple[float, dict[str, Any]] = (math.nan, {})
    trials = 0
    for wider in range(WIDER + 1):
        table, keys = _trials(cell, size, space, folder, processes)
        trials += len(table)
        value = sign * float(table.iloc[0])
        failed = math.isnan(best[0]) and not math.isnan(value)  # all trials until now
        if not best[1] or failed or value > best[0]:
            best = value, keys
        grid = {key: sorted({*grid[key], *space[key]}) for key in grid}
        wanted = _wider(cell, grid, best[1])
        if wanted is None or wider == WIDER:
            break
        space = wanted
    ends = {key: (values[0], values[-1]) for key, values in grid.items() if len(values) > 1}
    border = [key for key in ends if best[1][key] in ends[key]]
    choice = Choice(best[1], grid, trials, sign * best[0], border)
    write(_file(cell, size, folder), choice._asdict())
    return choice


def known(cell: Cell, size: Size, folder: Path) -> Choice | None:
    """What :func:`tuned` found; None where it has not."""
    if not cell.candidate.space:
        return Choice({}, {}, 0, math.nan, [])
    file = _file(cell, size, folder)
    return Choice(**json.loads(file.read_text())) if file.exists() else None


def _file(cell: Cell, size: Size, folder: Path) -> Path:
    limits = {"below": dict(below)} if (below := cell.candidate.below) else {}
    name = _digest(cell, size, {**cell.candidate.space, **limits})
    return folder / "choices" / f"{name}-{RULES}.json"


def _trials(
    cell: Cell, size: Size, space: Grid, folder: Path, processes: int | None
) -> "tuple[pd.Series[float], dict[str, Any]]":
    """The headlines on the validation part, the best first, and its keys."""
    trials = math.prod(map(len, space.values()))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*at the border")  # the grid gets wider
        try:
            found = search(
                space=space,
                trials=trials,
                seeds=list(range(FIRST_SEED, FIRST_SEED + size.tuning_seeds)),
                engine=cell.engine,
                world=cell.setting.world,
                folder=folder / "searches" / _digest(cell, size, space),
                processes=processes,
                **cell.keys,
            )
        except RunError:  # every trial failed
            return pd.Series([math.nan] * trials), {key: space[key][0] for key in space}
    table = found.table()[found.headline]
    if len(table) < trials:
        raise KeyboardInterrupt
    return table, {key: found.best[key] for key in space}


def _wider(cell: Cell, grid: Grid, best: Mapping[str, Any]) -> Grid | None:
    """What to try beyond the first key that is best at the border of its grid."""
    for key, values in grid.items():
        if not all(type(value) in (int, float) for value in values) or len(values) < 2:
            continue
        beside = {values[0]: values[1], values[-1]: values[-2]}.get(best[key])
        if not beside:
            continue
        for beyond in _beyond(best[key], beside):
            if beyond >= cell.candidate.below.get(key, math.inf):
                continue
            try:
                configuration(**{**cell.keys, **best, key: beyond})
            except ConfigError:
                continue
            if beyond not in values:
                return {**grid, key: [beyond]}
    return None


def _beyond(best: float, beside: float) -> Iterator[float]:
    """The next value on a log grid; then, for decays below 1, on one of their distance from 1."""
    following = best * best / beside
    yield round(following) if isinstance(best, int) else float(f"{following:.2g}")
    if best < 1 and beside < 1:
        yield round(1 - float(f"{(1 - best) ** 2 / (1 - beside):.2g}"), 9)


def _digest(cell: Cell, size: Size, space: Mapping[str, Any]) -> str:
    seeds = list(range(FIRST_SEED, FIRST_SEED + size.tuning_seeds))
    return digest([identity(cell.config(seeds[0]), cell, None), space, seeds])
