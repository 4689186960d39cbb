"""Hyperparameter search: the best keys of a method within a budget, on no example of the test part.

found = search("conf/fedavg.toml", space={"training.lr": [0.01, 0.03, 0.1, 0.3]})
found.table(); found.plot(); found.at_border
simulate(**found.best)
"""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import optuna
import pandas as pd
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from optuna.samplers import TPESampler
from optuna.storages import InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from tqdm.auto import tqdm

from configuration.config import Config, configuration, flatten, identity
from configuration.errors import ConfigError
from server_app import checkpoint
from server_app.discovery import RunError
from simulation import plots
from simulation.laboratory import check_engine, run_one
from simulation.pool import KILLED, in_processes
from simulation.world import World
from strategies.randomness import derive

Value = bool | int | float | str
Space = Mapping[str, Any]  # of each key a list, or a tuple for a range
VALIDATION = 0.2  # of the training examples, where data.validation does not say
# Trials that begin together, whatever the number of processes, which must change no result: the
# first are random, the others follow from all before them.
FIRST, TOGETHER = 10, 4
NEAR = 0.05  # the border of a range: so much of it
FIXED = ("seed", "epochs", "data.validation")  # what makes a budget, and what trials are judged by


@dataclass(frozen=True, repr=False)
class Search:
    """Trials of a method.

    Attributes:
        trials: tidy, a row a trial and seed: trial, a column a key of the space, seed, the headline
            of the run's task on the validation part (NaN where the run failed or diverged), and
            failure, which says why.
        config: of all trials, but for the space.
        base: what of it was given.
        space: as it was given.
    """

    trials: pd.DataFrame
    config: Config
    base: Mapping[str, Any]
    space: Space

    @property
    def headline(self) -> str:
        """The metric by which trials are judged."""
        return self.config.task.headline

    def table(self) -> pd.DataFrame:
        """A row a trial, the best first: keys, mean and standard error over seeds.

        Both are NaN, and the trial comes last, where a seed failed.
        """
        values = self.trials.groupby("trial")[self.headline]
        table = self.trials.drop_duplicates("trial").set_index("trial")[list(self.space)]
        table[self.headline] = values.mean().where(values.count() == values.size())
        table["s.e."] = values.sem().where(table[self.headline].notna())
        return table.sort_values(
            self.headline, ascending=not self.config.task.larger, kind="stable"
        )

    @property
    def best(self) -> dict[str, Any]:
        """The configuration with the best keys, for ``simulate(**best)``: tested on the test part.

        The first of several trials that are alike.

        Raises:
            ValueError: no trial is finished, or each failed.
        """
        return {**self.base, **self._chosen(), "data.validation": 0.0}

    def _chosen(self) -> dict[str, Value]:
        table = self.table()
        if table.empty or math.isnan(table[self.headline].iloc[0]):
            raise ValueError(f"of {len(table)} trials none was finished without a failure")
        return {key: _plain(table[key].iloc[0]) for key in self.space}

    @property
    def at_border(self) -> tuple[str, ...]:
        """The keys whose best value is the smallest or largest, or nearly, of those allowed to it.

        The best may lie beyond: give these a wider space. A value beyond which none is allowed, or
        one that is no number, is at no border.
        """
        return tuple(key for key, value in self._chosen().items() if self._is_at_border(key, value))

    def _is_at_border(self, key: str, value: Value) -> bool:
        numbers = [each for each in self.space[key] if _is_number(each)]
        if not _is_number(value) or (low := min(numbers)) == (high := max(numbers)):
            return False
        if isinstance(self.space[key], tuple):
            scale = math.log if len(self.space[key]) > 2 else float
            place = (scale(value) - scale(low)) / (scale(high) - scale(low))
        else:
            place = {low: 0.0, high: 1.0}.get(value, 0.5)
        if NEAR < place < 1 - NEAR:
            return False
        border = low if place <= NEAR else high
        step = 1 if isinstance(border, int) else 0.01 * (abs(border) or high - low)
        beyond = border + (step if border == high else -step)
        return not _fault(self.base, {**self._chosen(), key: beyond})

    def plot(self) -> Figure:
        """The headline on the validation part by each key; bars are one standard error."""
        return plots.search(self.table(), self.space, self.headline)

    def __repr__(self) -> str:
        table = self.table()
        try:
            lines = [
                f"best: {', '.join(f'{key} = {value!r}' for key, value in self._chosen().items())}",
                *(f"{key} is at the border of {self.space[key]}" for key in self.at_border),
            ]
        except ValueError as error:
            lines = [str(error)]
        return "\n".join([str(table.to_string()), *lines])


def search(
    conf: str | Path | None = None,
    *,
    space: Space,
    trials: int = 20,
    seeds: int | Sequence[int] = 1,
    engine: str = "app",
    world: World | None = None,
    folder: str | Path | None = None,
    processes: int | None = None,
    progress: bool = True,
    **changes: Any,
) -> Search:
    """Search the keys with which a method does best after ``epochs``, in several processes.

    Sites test on ``data.validation`` (by default a fifth) of their training examples, never on the
    test part. All values, where they are lists and their combinations not more than ``trials``;
    else Optuna's TPE. A run that fails or diverges makes its trial the worst. The same call has the
    same result, whatever the number of processes. Interrupted, it returns the finished trials.

    Args:
        conf: a file of ``conf/``.
        space: of each key a list of values, or a range: ``(low, high)``, ``(low, high, "log")``.
        trials: at most so many; the same for every method that is compared.
        seeds: so many for each trial, from 1 on, or which.
        engine: as of :func:`simulation.laboratory.simulate`.
        world: the same.
        folder: of this search, and of no other: called again after it was interrupted or killed, or
            with more trials, it goes on.
        processes: by default one a GPU, or one a core where there is none.
        progress: show a bar.
        **changes: the run configuration of all trials.

    Raises:
        ConfigError: before the first run: names the key, its value and what is allowed; the folder
            holds another search, or one that is going on.
        RunError: every trial failed.
    """
    chosen = list(range(1, seeds + 1)) if isinstance(seeds, int) else list(seeds)
    if not chosen or trials < 1:
        raise ConfigError(f"seeds = {seeds}, trials = {trials}: at least one of each is needed")
    given: dict[str, Any] = flatten(changes) | ({} if conf is None else {"conf": conf})
    if "seed" in given:
        raise ConfigError(f"seed = {given['seed']!r}: a search has seeds = {given['seed']!r}")
    own = configuration(**given).data.validation or VALIDATION
    base = given | {"data.validation": own, "seed": chosen[0]}
    space = {key: _listed(key, values) for key, values in flatten(space).items()}
    grid = _grid(space, trials)
    _check(base, space, grid)
    config, place = configuration(**base), None if folder is None else Path(folder)
    for key, values in space.items():
        if isinstance(values, tuple) and isinstance(config.flat()[key], float):
            space[key] = (*map(float, values[:2]), *values[2:])  # 1 to 10 has 1.5 in it
    for seed in chosen:
        check_engine(engine, configuration(**base | {"seed": seed}), world)

    marks = {"space": repr(space), "seeds": chosen, "engine": engine, "world": repr(world)}
    run = partial(_value, base, world or World(), engine)
    with _study(config, marks, place) as study:
        for point in grid:
            study.enqueue_trial(point, skip_if_exists=True)
        total = len(study.trials) if grid else trials
        units, over = total * len(chosen) * config.epochs, False
        with tqdm(total=units, desc="search", unit="epoch", disable=not progress) as bar:
            try:
                for batch in _batches(study, space, total, chosen[0], together=bool(grid)):
                    _run(study, batch, chosen, run, processes, bar)
                over = True
            except KeyboardInterrupt:
                done = sum(_is_done(trial, chosen) for trial in study.trials)
                warnings.warn(f"interrupted: {done} of {total} trials are finished", stacklevel=2)
        known = [trial for trial in study.trials[:total] if _is_done(trial, chosen)]
    found = Search(_tidy(known, space, chosen, config), config, given, space)
    failures = found.trials["failure"]
    if over and len(failures) and found.table()[found.headline].isna().all():
        raise RunError(f"all {len(known)} trials failed: {failures[failures != ''].iloc[0]}")
    for key in found.at_border if over else ():
        warnings.warn(
            f"{key} = {found.best[key]!r} is at the border of {space[key]}: widen it", stacklevel=2
        )
    return found


def _listed(key: str, values: Any) -> Sequence[Value]:
    """The values of a key, or a range, as they are given, of Python's own types."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        values = []
    plain = [_plain(value) for value in values]
    if key in FIXED:
        raise ConfigError(f"space: {key}: the same for all trials; allowed: other keys")
    if not isinstance(values, tuple):
        ordered, expected = bool(plain), "a list of values, or (low, high) or (low, high, 'log')"
    else:
        low, high, *rest = plain if len(plain) > 1 else (0, 0)
        numbers = _is_number(low) and _is_number(high)
        ordered = numbers and rest in ([], ["log"]) and low < high and (low > 0 or not rest)
        expected = "(low, high) or (low, high, 'log'), low < high, above 0 with 'log'"
    if not ordered:
        raise ConfigError(f"space: {key} = {values!r}: {expected} is expected")
    return tuple(plain) if isinstance(values, tuple) else plain


def _plain(value: Any) -> Any:
    """Python's own number in place of NumPy's."""
    return value.item() if isinstance(value, np.generic) else value


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _grid(space: Space, trials: int) -> list[dict[str, Value]]:
    """All combinations, where there are so many at most; none where there is a range."""
    if any(isinstance(values, tuple) for values in space.values()):
        return []
    if math.prod(map(len, space.values())) > trials:
        return []
    return [dict(zip(space, point, strict=True)) for point in product(*space.values())]


def _check(base: Mapping[str, Any], space: Space, grid: Sequence[Mapping[str, Value]]) -> None:
    """Make sure that all combinations of a grid can be run, or each value with some others.

    Raises:
        ConfigError: the first that cannot.
    """
    ends = {
        key: values[:2] if isinstance(values, tuple) else values for key, values in space.items()
    }
    others = [{key: values[at] for key, values in ends.items()} for at in (0, -1)]
    single = [[each | {key: value} for each in others] for key in space for value in ends[key]]
    for points in [[point] for point in grid] or single:
        errors = [error for point in points if (error := _fault(base, point))]
        if len(errors) == len(points):
            raise ConfigError(f"space: {errors[0]}")


def _fault(base: Mapping[str, Any], point: Mapping[str, Value]) -> str:
    """What is wrong with a point of the space."""
    try:
        configuration(**{**base, **point})
    except ConfigError as error:
        return str(error)
    return ""


@contextmanager
def _study(config: Config, marks: Mapping[str, Any], folder: Path | None) -> Iterator[optuna.Study]:
    """The study of a folder, for this process alone.

    Raises:
        ConfigError: it is that of another search, or of one that is going on.
    """
    with ExitStack() as stack:
        storage: optuna.storages.BaseStorage = InMemoryStorage()
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(FileLock(folder / "search.lock", timeout=0))
            except Timeout:
                raise ConfigError(f"folder = {str(folder)!r}: a search is going on in it") from None
            _drop_half_a_line(folder / "search.log")
            storage = JournalStorage(JournalFileBackend(str(folder / "search.log")))
        stack.callback(optuna.logging.set_verbosity, optuna.logging.get_verbosity())
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(
            storage=storage,
            study_name="search",
            direction="maximize" if config.task.larger else "minimize",
            load_if_exists=True,
        )
        known = study.user_attrs.get("marks")
        if folder and known:
            checkpoint.check(config, known.pop("config"), folder)
            for key, mark in marks.items():
                if mark != known[key]:
                    said = f"{known[key]} is that of the search in {folder}"
                    raise ConfigError(f"{key} = {mark}: {said}")
        else:
            study.set_user_attr("marks", {**marks, "config": identity(config.flat())})
        yield study


def _drop_half_a_line(journal: Path) -> None:
    """What a full disk or a power cut left of an entry: the next one would be written behind it."""
    written = journal.read_bytes() if journal.exists() else b""
    if written and not written.endswith(b"\n"):
        os.truncate(journal, written.rfind(b"\n") + 1)


def _batches(
    study: optuna.Study, space: Space, total: int, seed: int, *, together: bool
) -> Iterator[list[Trial]]:
    """Trials to be run at the same time, with their values; those that are finished are left out.

    Each is drawn by a sampler of its own, from what trials of earlier batches found: a search that
    was killed goes on as if it had not been.
    """
    start = 0
    while start < total:
        end = total if together else min(total, start + (TOGETHER if start else FIRST))
        known, batch = study.trials, []
        for number in range(start, end):
            there = known[number] if number < len(known) else None
            if there and there.state.is_finished():
                continue
            study.sampler = TPESampler(
                n_startup_trials=FIRST, seed=derive(seed, "search", number) % 2**32
            )
            begun = there is not None and there.state == TrialState.RUNNING
            trial = Trial(study, there._trial_id) if there and begun else study.ask()
            for key, values in space.items():
                _suggest(trial, key, values)
            batch.append(trial)
        yield batch
        start = end


def _suggest(trial: Trial, key: str, values: Sequence[Any]) -> None:
    if not isinstance(values, tuple):
        trial.suggest_categorical(key, values)
    else:
        low, high, *log = values
        suggest = trial.suggest_int if isinstance(low, int) else trial.suggest_float
        suggest(key, low, high, log=bool(log))


def _run(
    study: optuna.Study,
    batch: Sequence[Trial],
    seeds: Sequence[int],
    run: Callable[..., float | str],
    processes: int | None,
    bar: "tqdm[Any]",
) -> None:
    """Run what is missing of a batch, and tell the study what it found."""
    jobs = [(trial, seed) for trial in batch for seed in seeds if str(seed) not in trial.user_attrs]
    calls = [partial(run, trial.number, trial.params, seed) for trial, seed in jobs]
    for index, value in in_processes(calls, processes, bar):
        trial, seed = jobs[index]
        trial.set_user_attr(str(seed), KILLED if value is None else value)
    worst = -math.inf if study.direction == StudyDirection.MAXIMIZE else math.inf
    for trial in batch:
        values = [trial.user_attrs[str(seed)] for seed in seeds]
        failed = any(isinstance(value, str) for value in values)
        study.tell(trial, worst if failed else sum(values) / len(values))


def _value(
    base: Mapping[str, Any],
    world: World,
    engine: str,
    number: int,
    keys: Mapping[str, Value],
    seed: int,
    file: Path,
) -> float | str:
    """The headline on the validation part, or why there is none."""
    keys = {**keys, "seed": seed}
    if wrong := _fault(base, keys):  # these do not go together
        return wrong
    config = configuration(**{**base, **keys})
    run = run_one(f"trial {number}, seed {seed}", config, world, engine, None, file)
    if isinstance(run, str):
        return run
    if not run.finished:
        raise KeyboardInterrupt
    value = float(run.summary.get(run.headline, math.nan))
    return value if math.isfinite(value) else f"{run.headline} is {value}"


def _is_done(trial: FrozenTrial, seeds: Sequence[int]) -> bool:
    return all(str(seed) in trial.user_attrs for seed in seeds)


def _tidy(
    trials: Sequence[FrozenTrial], space: Space, seeds: Sequence[int], config: Config
) -> pd.DataFrame:
    rows = []
    for trial in trials:
        for seed in seeds:
            value = trial.user_attrs[str(seed)]
            failed = isinstance(value, str)
            rows.append(
                {"trial": trial.number}
                | {key: trial.params[key] for key in space}
                | {"seed": seed, config.task.headline: math.nan if failed else value}
                | {"failure": value if failed else ""}
            )
    columns = ["trial", *space, "seed", config.task.headline, "failure"]
    return pd.DataFrame(rows, columns=columns)
