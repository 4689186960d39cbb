"""The laboratory: run and compare strategies in one process, in seconds, in a notebook or script.

    world = World(bandwidth_mbps=20)
    run = simulate(strategy="fedavg", num_sites=10, partition={"kind": "dirichlet"}, world=world)
    strategies = {"Co-learning": {}, "FedAvg": {"strategy": "fedavg"}}
    comparison = compare(strategies, seeds=3, num_sites=10)
    comparison.table(); comparison.plot()

What runs is the app itself, with the configuration, the checks and the numbers of ``flwr run``;
time is virtual (:mod:`simulation.grid`).
"""

import math
import shutil
import tomllib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from client_app.app import app as client_app
from configuration.config import Config, configuration, flatten, identity
from configuration.description import Description, is_described, write_models
from configuration.errors import ConfigError
from configuration.files import SITES, write_whole
from datasets import lazy
from server_app import checkpoint
from server_app.app import run as run_server
from server_app.checkpoint import Saved
from server_app.discovery import RunError, discover
from server_app.events import EVERYBODY, Began, Ended, Event, Progress
from server_app.overview import read_metrics
from server_app.plots import plot_class_counts
from server_app.results import (
    Checkpoints,
    History,
    Rows,
    class_counts,
    write_description,
)
from simulation import plots
from simulation.batched import Peers
from simulation.grid import VirtualGrid
from simulation.pool import KILLED, in_processes
from simulation.together import Together
from simulation.vectorised import check_network
from simulation.world import World
from strategies.method import PeerPlan
from strategies.methods import METHODS, find
from strategies.protocol import Started


@dataclass(frozen=True, repr=False)
class Run:
    """One run: what ``flwr run`` writes into a folder, in memory.

    Attributes:
        config: the whole configuration.
        metrics: tidy, a value a row: round, seconds, bytes_up, bytes_down, site, split, metric,
            value. Seconds are virtual in a simulation; the site ``all`` is the mean over sites.
        models: the last model as a state dict, under the name ``model``; where sites learn alone,
            ``model-0``, ``model-1``, ...
        sites: a row a site: site, name, train and test examples, and the examples of each class
            where sites tell.
        finished: whether all epochs were run; an interrupted run holds what it had reached.
        description: of the models; None where there are none, or their files are older than
            descriptions.
    """

    config: Config
    metrics: pd.DataFrame
    models: dict[str, dict[str, Tensor]]
    sites: pd.DataFrame
    finished: bool
    description: Description | None = None

    def __repr__(self) -> str:
        found = ", ".join(f"{key} {value:.4g}" for key, value in self.summary.items())
        unfinished = "" if self.finished else ", unfinished"
        return (
            f"{self.config.strategy} on {self.config.data.source}: "
            f"{found or 'nothing yet'}{unfinished}"
        )

    @property
    def model(self) -> dict[str, Tensor]:
        """The last model as a state dict.

        Raises:
            ValueError: there is none, or one a site.
        """
        if set(self.models) != {"model"}:
            raise ValueError(
                f"this run has the models {', '.join(self.models) or 'none yet'}: "
                "take one from .models"
            )
        return self.models["model"]

    @property
    def headline(self) -> str:
        """The metric by which runs of this task are compared: accuracy, bits-per-byte, rmse, ..."""
        return self.config.task.headline

    @property
    def history(self) -> pd.DataFrame:
        """The test, a row a round, with the metrics of the run's task.

        The columns are round, seconds, hours, megabytes (both ways), accuracy, loss, ...
        """
        chosen = (self.metrics["split"] == "test") & (self.metrics["site"] == EVERYBODY)
        tested = self.metrics[chosen]
        index = ["round", "seconds", "bytes_up", "bytes_down"]
        table = (
            tested.pivot_table(index=index, columns="metric", values="value")
            .reset_index()
            .rename_axis(columns=None)
        )
        for measured in {self.headline, "loss"} - set(
            table.columns
        ):  # of a run that could not be tested
            table[measured] = math.nan
        table["hours"] = table["seconds"] / 3600
        table["megabytes"] = (table["bytes_up"] + table["bytes_down"]) / 1e6
        return table

    @property
    def summary(self) -> "pd.Series[float]":
        """Final headline and loss, rounds, hours, megabytes; sigma and jump.

        With ``results.personalise-epochs`` also the headline of the sites' own models. ``sigma``
        and ``jump`` say how stable the second half of the run was: the standard deviation of its
        headlines, and their mean step. Both are reconstructed readings of the "training stability"
        of GSGM's authors, who could not be read.
        """
        table = self.history
        if table.empty:
            return pd.Series(dtype=float)
        last, half = table.iloc[-1], table[self.headline].iloc[len(table) // 2 :]
        return pd.Series(
            {
                self.headline: last[self.headline],
                "loss": last["loss"],
                "rounds": last["round"],
                "hours": last["hours"],
                "megabytes": last["megabytes"],
                "sigma": half.std(ddof=0),
                "jump": half.diff().abs().mean(),
            }
            | self._personal()
        )

    def _personal(self) -> dict[str, float]:
        found = self.metrics.query(
            "split == 'personal' and site == @EVERYBODY and metric == @self.headline"
        )
        return {f"personal {self.headline}": value for value in found["value"]}

    def until(self, target: float) -> "pd.Series[float]":
        """Rounds, hours and megabytes to the first test with a headline of ``target`` or better.

        NaN where there is none.
        """
        table, sign = self.history, 1 if self.config.task.larger else -1
        reached = table[sign * table[self.headline] >= sign * target] if len(table) else table
        names = ["round", "hours", "megabytes"]
        found = reached.iloc[0][names] if len(reached) else pd.Series(float("nan"), index=names)
        return found.astype(float).rename({"round": "rounds"})

    def plot(self, metric: str | None = None) -> Figure:
        """Plot the metric, by default the headline, on the test parts by round, hour, megabyte."""
        return Comparison({self.config.strategy: [self]}).plot(metric)

    def plot_sites(self) -> Figure:
        """Plot the examples of each class at each site.

        Raises:
            ValueError: the sites of a deployment do not tell; examples have no classes.
        """
        if self.config.task.target != "class":
            raise ValueError(
                f"training.task = {self.config.training.task!r}: "
                "examples have no classes to count; see .sites"
            )
        if (counts := class_counts(self.sites)).empty:
            raise ValueError(
                "these sites keep the number of their examples of each class to themselves"
            )
        return plot_class_counts(counts)

    def save(self, folder: str | Path) -> Path:
        """Write a folder like those of ``flwr run``, without the pictures."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_models(folder, self.models, self.description)
        write_description(folder, self.config, self.sites)
        # The last: whoever finds all epochs in it takes the folder for whole.
        write_whole(folder / "metrics.csv", self.metrics.to_csv(index=False).encode())
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "Run":
        """Read a folder that :meth:`save` or ``flwr run`` wrote."""
        folder = Path(folder)
        config = Config.read(tomllib.loads((folder / "config.toml").read_text()))
        metrics = read_metrics(folder / "metrics.csv")
        epochs = metrics[(metrics["metric"] == "local-epochs") & (metrics["site"] == EVERYBODY)][
            "value"
        ].sum()
        files = sorted(folder.glob("model*.safetensors"))
        models = {file.stem: load_file(file) for file in files}
        description = Description.read(files[0]) if files and is_described(files[0]) else None
        finished = bool(epochs >= config.epochs - 1e-6)
        return cls(
            config, metrics, models, pd.read_csv(folder / "sites.csv"), finished, description
        )


class _Watched(History):
    """Calls ``watch`` with the progress of each round; with a folder, the run can go on from it."""

    def __init__(
        self,
        config: Config,
        watch: Callable[[Progress], None],
        engine: str,
        folder: Path | None,
        saved: Saved | None,
    ) -> None:
        super().__init__(config)
        self._watch, self._engine, self._folder, self._saved = watch, engine, folder, saved

    def __call__(self, event: Event) -> None:
        """Take in an event, and write it where there is a folder."""
        super().__call__(event)
        if isinstance(event, Began) and self._engine == "batched":
            check_network(self.config, event.model)
        if isinstance(event, Began) and self._folder:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._saved:
                self.resume(self._folder, self._saved)
            else:
                write_description(self._folder, self.config, self.sites)
                (self._folder / "metrics.csv").unlink(missing_ok=True)
            started = self._saved.next_start() if self._saved else Started(1, 0)
            # While their folder is there the run is not over, whatever was written: it is made
            # before the first row, and deleted after the last model.
            (self._folder / checkpoint.FOLDER).mkdir(exist_ok=True)
            self._sinks = [Rows(self, self._folder), Checkpoints(self, self._folder, started)]
        if isinstance(event, Ended) and self._folder and self._sinks:
            write_models(self._folder, self.models, self.description)
        for sink in self._sinks:
            sink(event)

    def show_progress(self, progress: Progress) -> None:
        """Pass the progress on to whoever watches."""
        self._watch(progress)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many threads for torch: their number decides in which order it sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def simulate(
    conf: str | Path | None = None,
    *,
    engine: str = "app",
    world: World | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
    threads: int = 1,
    **changes: Any,
) -> Run:
    """Run the app in this process, in virtual time.

    Without a ``folder`` nothing is written; see :meth:`Run.save`.

    Interrupted (by the stop button of a notebook, or Ctrl-C), it returns what was reached.

    Args:
        conf: a file of ``conf/``.
        engine: ``app``; or ``batched``: the sites' local training is one vectorised pass. Methods
            with a server run as in ``app`` otherwise (:mod:`simulation.together`); peers do
            without messages and without a world.
        world: speed, links and presence of the sites; by default all alike.
        folder: of this run, saved as it goes: called again after it was interrupted or killed, the
            run goes on, and a finished run is only read. Of peers, the batched engine begins again.
        progress: show a bar.
        threads: of torch; ``flwr run`` gives each site one.
        **changes: the run configuration, such as ``strategy="fedavg"``, ``num_sites=10``,
            ``training={"lr": 0.1}``.

    Raises:
        ConfigError: names the key, its value and what is allowed; the folder holds another run.
        RunError: too few sites could take part, or remained.
    """
    config = configuration(conf, **changes)
    check_engine(engine, config, world)
    if folder is not None and (known := _finished(config, Path(folder))):
        return known
    with tqdm(total=config.epochs, desc=config.strategy, unit="epoch", disable=not progress) as bar:

        def watch(reached: Progress) -> None:
            tested = (
                {reached.headline: f"{reached.test[reached.headline]:.4f}"}
                if reached.headline in reached.test
                else {}
            )
            bar.set_postfix({"round": reached.round_number} | tested, refresh=False)
            bar.update(round(reached.done) - bar.n)

        run = _simulate(
            config,
            world or World(),
            engine,
            threads,
            watch,
            None if folder is None else Path(folder),
        )
    if not run.finished:
        warnings.warn(
            f"{config.strategy} was interrupted: this run holds what it had reached", stacklevel=2
        )
    return run


def check_engine(engine: str, config: Config, world: World | None) -> None:
    """Make sure that an engine can run a configuration in a world.

    Raises:
        ConfigError: it cannot.
    """
    if not isinstance(world, World | None):
        raise ConfigError(f"world = {world!r}: a World(...) is expected")
    (world or World()).sites(config.num_sites, config.seed)
    if engine not in ("app", "batched"):
        raise ConfigError(f"engine = {engine!r}: allowed: 'app', 'batched'")
    if engine == "batched":
        _check_batched(config, world)


def _check_batched(config: Config, world: World | None) -> None:
    """Make sure that the batched engine can run a configuration.

    Raises:
        ConfigError: it cannot.
    """
    for key in ("checkpointing", "compile", "channels_last"):
        if getattr(config.computing, key):
            raise ConfigError(
                f"computing.{key.replace('_', '-')} = True: not with engine = 'batched'; "
                "allowed: False, or engine = 'app'"
            )
    if size := config.computing.micro_batch:
        raise ConfigError(
            f"computing.micro-batch = {size}: has no effect with engine = 'batched'; "
            "allowed: 0, or engine = 'app'"
        )
    if config.training.optimizer == "muon":
        raise ConfigError(
            "training.optimizer = 'muon': not with engine = 'batched'; "
            "allowed: 'sgd', 'adamw', or engine = 'app'"
        )
    if not isinstance(config.plan, PeerPlan):
        return
    if config.max_change != (most := Config().max_change):
        raise ConfigError(
            f"max-change = {config.max_change:g}: has no effect with engine = 'batched'; "
            f"allowed: {most:g}"
        )
    if config.robust.mean != "mean":
        raise ConfigError(
            f"robust.mean = {config.robust.mean!r}: not with engine = 'batched'; "
            "allowed: 'mean', or engine = 'app'"
        )
    if world is not None:
        raise ConfigError(
            "engine = 'batched': knows no world; leave it out, or take engine = 'app'"
        )


def _finished(config: Config, folder: Path) -> Run | None:
    """The run that a folder holds, if it is over.

    Raises:
        ConfigError: it holds another one.
    """
    if not (folder / "metrics.csv").exists():  # the last of the files that a run begins with
        return None
    known = Config.read(tomllib.loads((folder / "config.toml").read_text()))
    checkpoint.check(config, identity(known.flat()), folder)
    return _over(folder)


def _over(folder: Path) -> Run | None:
    """The run in a folder, if all epochs were run."""
    if (folder / checkpoint.FOLDER).exists() or not (folder / "metrics.csv").exists():
        return None
    run = Run.load(folder)
    return run if run.finished else None


def _simulate(
    config: Config,
    world: World,
    engine: str,
    threads: int,
    watch: Callable[[Progress], None],
    folder: Path | None = None,
) -> Run:
    # Killed before the first one was whole, a run begins again.
    some = folder and any((folder / checkpoint.FOLDER).glob("*.pt"))
    saved = checkpoint.read(folder) if folder and some else None
    if (
        folder and not saved
    ):  # what sites remember of a run that was killed before its first checkpoint
        shutil.rmtree(folder / SITES, ignore_errors=True)
    peers = isinstance(config.plan, PeerPlan)
    kind = Together if engine == "batched" and not peers else VirtualGrid
    grid = kind(
        client_app,
        world.sites(config.num_sites, config.seed),
        config.flat(),
        state=folder and folder / SITES,
        start_s=saved.driver["now"][0] if saved else 0.0,
    )
    history = _Watched(config, watch, engine, folder, saved)
    finished = True
    try:
        with _threads(threads):
            if engine == "batched" and peers:
                Peers(config, discover(grid, config), history).run(history.show_progress)
            else:
                run_server(grid, config, history, saved)
    except KeyboardInterrupt:
        finished = False
    finally:
        lazy.close()
        history.close()
    description = history.description if history.models else None
    run = Run(config, history.metrics, history.models, history.sites, finished, description)
    if folder and engine == "batched" and peers:  # no sink hears of its models
        run.save(folder)
    if folder and finished:
        shutil.rmtree(folder / SITES, ignore_errors=True)
    return run


@dataclass(frozen=True, repr=False)
class Comparison:
    """Runs of several strategies with several seeds.

    Attributes:
        runs: of each strategy, one a seed.
        missing: what there is not: strategy, seed, and why.
    """

    runs: dict[str, list[Run]]
    missing: tuple[str, ...] = ()

    def table(self, target: float | None = None) -> pd.DataFrame:
        """A row a strategy: mean and standard error over seeds.

        They are of what :attr:`Run.summary` says and of what it took to reach ``target``.

        Args:
            target: test accuracy, or the headline of another task; by default what is 5 % worse
                than the best strategy's final one, rounded. The columns "rounds to", "hours to" and
                "megabytes to" are the mean over the seeds that reached it, and "reached" is their
                share.
        """
        target = self._target() if target is None else target
        rows = {}
        for name, runs in self.runs.items():
            found = pd.DataFrame(
                [{**run.summary, **run.until(target).add_suffix(f" to {target:g}")} for run in runs]
            )
            found[f"reached {target:g}"] = found[f"rounds to {target:g}"].notna().astype(float)
            rows[name] = found.agg(["mean", "sem"]).rename(index={"sem": "s.e."}).T.stack()
        return pd.DataFrame(rows).T.reindex(
            columns=max((row.index for row in rows.values()), key=len)
        )

    def _target(self) -> float:
        task = self._some.config.task
        finals = [
            pd.Series([run.summary.get(task.headline, math.nan) for run in runs]).mean()
            for runs in self.runs.values()
        ]
        known = [final for final in finals if not math.isnan(final)]
        if task.larger:
            return round(0.95 * max(known, default=math.nan), 2)
        return round(1.05 * min(known, default=math.nan), 2)

    @property
    def _some(self) -> Run:
        return next(run for runs in self.runs.values() for run in runs)

    def text(self, target: float | None = None) -> pd.DataFrame:
        """The table for people: "mean ± standard error"."""
        numbers = self.table(target)
        shown = {}
        for name in numbers.columns.unique(0):
            shown[name] = [_plus_minus(mean, error) for mean, error in numbers[name].to_numpy()]
        return pd.DataFrame(shown, index=numbers.index)

    def latex(self, target: float | None = None) -> str:
        """The table for a paper: mean and standard error, the best mean of each column in bold.

        It needs the package ``booktabs``; the caption says which seeds. More is better of
        "reached" and, where it is so in the run's task, of the headline; of all else, less is.
        """
        numbers, cells = self.table(target), self.text(target)
        for name in map(str, cells):
            means = numbers[name, "mean"]
            more = name.startswith("reached") or (
                name.removeprefix("personal ") == self._some.headline
                and self._some.config.task.larger
            )
            best = means.max() if more else means.min()
            cells[name] = [
                _latex(cell, bold=mean == best and means.nunique() > 1)
                for cell, mean in zip(cells[name], means, strict=True)
            ]
        seeds = {name: [run.config.seed for run in runs] for name, runs in self.runs.items()}
        common = max(seeds.values(), key=len)
        fewer = "".join(f"; of {name} {_list(own)}" for name, own in seeds.items() if own != common)
        said = f"Mean and standard error over seeds {_list(common)}{fewer}. Best in bold."
        style = cells.style.format_index(escape="latex").format_index(escape="latex", axis=1)
        return str(
            style.to_latex(
                hrules=True,
                position_float="centering",
                column_format="l" + "r" * cells.shape[1],
                caption=_escaped(said),
            )
        )

    def _repr_html_(self) -> str:
        missing = "".join(f"<br>missing: {escape(each)}" for each in self.missing)
        return f"{self.text().to_html() if self.runs else ''}{missing}"

    def __repr__(self) -> str:
        missing = "".join(f"\nmissing: {each}" for each in self.missing)
        return f"{self.text().to_string() if self.runs else ''}{missing}"

    def plot(self, metric: str | None = None) -> Figure:
        """Plot the metric, by default the headline, by round, by hour and by megabyte.

        Lines are means over seeds, bands one standard error.
        """
        units = {
            "update of the server" if run.config.unit == "update" else run.config.unit
            for runs in self.runs.values()
            for run in runs
        }
        histories = {name: [run.history for run in runs] for name, runs in self.runs.items()}
        return plots.comparison(
            histories, metric or self._some.headline, " or ".join(sorted(units))
        )

    def plot_cost(self, target: float | None = None) -> Figure:
        """Plot megabytes against hours to ``target``, as in :meth:`table`: a point a strategy.

        Those that never get there are not in it.
        """
        target = self._target() if target is None else target
        return plots.cost(self.table(target), f"hours to {target:g}", f"megabytes to {target:g}")

    def save(self, folder: str | Path) -> Path:
        """Write a folder a strategy, with one for each run in it, as :meth:`Run.save` does."""
        folder = Path(folder)
        for name, runs in self.runs.items():
            for run in runs:
                run.save(_place(folder, name, run.config.seed))
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "Comparison":
        """Read what :meth:`save` or :func:`compare` wrote; strategies come in alphabetic order.

        Runs that are not over are missing.

        Raises:
            FileNotFoundError: no run in the folder is over.
        """
        found: dict[str, list[Run]] = {}
        missing = []
        for file in sorted(Path(folder).glob("*/*/config.toml")):
            place = file.parent
            if (run := _over(place)) is not None:
                found.setdefault(place.parent.name, []).append(run)
            else:
                missing.append(f"{place.parent.name}, {place.name}: it is not over")
        if not found:
            raise FileNotFoundError(f"{folder}: no STRATEGY/RUN/config.toml of a finished run")
        return cls(found, tuple(missing))


def _place(folder: Path, name: str, seed: int) -> Path:
    """The folder of a run in that of a comparison."""
    return folder / name.replace("/", "_") / f"seed-{seed}"


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _escaped(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(f"\\{each}" if each in "&%$#_{}" else each for each in text)


def _latex(cell: str, *, bold: bool) -> str:
    """A cell of the table for people, for LaTeX."""
    mean, sign, error = cell.partition(" ± ")
    return (f"\\textbf{{{mean}}}" if bold else mean) + (f" $\\pm$ {error}" if sign else "")


def _plus_minus(mean: float, error: float) -> str:
    """Two digits of the error, and never more than four of the mean."""
    if math.isnan(mean):
        return "-"
    if abs(mean) < 1e-9:
        return "0"
    if math.isnan(error) or error < 1e-4 * abs(mean):
        return f"{mean:.4g}"
    digits = max(0, min(1 - math.floor(math.log10(error)), 3 - math.floor(math.log10(abs(mean)))))
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def compare(
    strategies: Mapping[str, Mapping[str, Any]],
    *,
    seeds: int | Sequence[int] = 3,
    engine: str = "app",
    world: World | None = None,
    folder: str | Path | None = None,
    processes: int | None = None,
    progress: bool = True,
    **common: Any,
) -> Comparison:
    """Run several strategies with several seeds, in several processes, which changes no result.

    Interrupted, it returns the runs that were finished, and says which are missing. A process that
    is killed, perhaps for want of memory, takes no finished run with it: what was going on in it is
    tried once more, alone, and then left out.

    Args:
        strategies: for each name, what its run configuration differs in; ``conf="conf/krum.toml"``
            takes a file's.
        seeds: so many, from 1 on, or which.
        engine: as in :func:`simulate`.
        world: that all live in; what is random in it follows from the seed.
        folder: all runs are saved in it as they go, as by :meth:`Comparison.save`: called again
            after it was interrupted or killed, the comparison goes on with those that are not
            finished.
        processes: by default one a GPU, or one a core where there is none.
        progress: show a bar.
        **common: run configuration of all; a method's own section counts where that method runs.

    Raises:
        ConfigError: before the first run: names the strategy, the key, its value and what is
            allowed.
        RunError: every run failed; where only some did, a warning names each, and the others are
            returned.
    """
    chosen = list(range(1, seeds + 1)) if isinstance(seeds, int) else list(seeds)
    if not chosen or not strategies:
        raise ConfigError(
            f"seeds = {seeds}, {len(strategies)} strategies: at least one of each is needed"
        )
    jobs: list[tuple[str, Config, Path | None]] = []
    for name, changes in strategies.items():
        if not isinstance(changes, Mapping) or "seed" in changes:
            raise ConfigError(
                f"{name}: {changes!r}: a dictionary of the run configuration is expected, "
                "without seed (see seeds)"
            )
        own = _shared(common, changes) | flatten(changes)
        conf = own.pop("conf", None)
        try:
            configs = [configuration(conf, **own, seed=seed) for seed in chosen]
            for config in configs:
                check_engine(engine, config, world)
            places = [_place(Path(folder), name, seed) if folder else None for seed in chosen]
            for config, place in zip(configs, places, strict=True):
                if place:
                    _finished(config, place)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
        jobs += [(name, config, place) for config, place in zip(configs, places, strict=True)]

    runs: dict[str, dict[int, Run]] = {name: {} for name in strategies}
    total = sum(config.epochs for _, config, _ in jobs)
    failures: dict[tuple[str, int], str] = {}
    calls = [
        partial(run_one, f"{name}, seed {config.seed}", config, world or World(), engine, place)
        for name, config, place in jobs
    ]
    with tqdm(total=total, desc=f"{len(jobs)} runs", unit="epoch", disable=not progress) as bar:
        try:
            for index, run in in_processes(calls, processes, bar):
                name, config, _ = jobs[index]
                if not isinstance(run, Run):
                    failures[name, config.seed] = run or KILLED
                    warnings.warn(
                        f"{name}, seed {config.seed}: {run or KILLED}; left out", stacklevel=2
                    )
                    continue
                if not run.finished:
                    raise KeyboardInterrupt
                runs[name][config.seed] = run
        except KeyboardInterrupt:
            done = sum(map(len, runs.values()))
            warnings.warn(f"interrupted: {done} of {len(jobs)} runs are finished", stacklevel=2)
    missing = tuple(
        f"{name}, seed {seed}: {failures.get((name, seed), 'interrupted')}"
        for name, found in runs.items()
        for seed in chosen
        if seed not in found
    )
    if len(failures) == len(jobs):
        raise RunError("\n".join(missing))
    return Comparison(
        {
            name: [found[seed] for seed in chosen if seed in found]
            for name, found in runs.items()
            if found
        },
        missing,
    )


def _shared(common: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """What is common to all, without the sections of other methods than this run's."""
    flat = flatten(common)
    strategy = flatten(changes).get("strategy", flat.get("strategy", Config().strategy))
    others = {method.table for name, method in METHODS.items() if name != strategy} - {
        find(strategy).table
    }
    return {
        key: value
        for key, value in flat.items()
        if key.partition(".")[0] not in others or "." not in key
    }


def run_one(
    label: str, config: Config, world: World, engine: str, folder: Path | None, file: Path
) -> Run | str:
    """The run, or why there is none: one that fails does not take others with it.

    ``file`` is told how far it is (:func:`simulation.pool.in_processes`).
    """

    def watch(reached: Progress) -> None:
        value = reached.test.get(reached.headline, math.nan)
        file.write_text(f"{round(reached.done)} {label}: {reached.headline} {value:.4f}")

    try:
        known = _finished(config, folder) if folder else None
        return known or _simulate(config, world, engine, 1, watch, folder)
    except (RunError, ValueError) as error:
        return str(error)
