"""What a run reports: in memory, and in a folder.

The folder is written as the run goes, so that a killed run leaves what it had.
"""

import csv
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from io import StringIO
from logging import WARNING
from pathlib import Path
from tempfile import TemporaryFile

import pandas as pd
import tomli_w
from flwr.app import ArrayRecord
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from configuration.config import Config, identity
from configuration.description import Description, write_models
from configuration.errors import ConfigError
from configuration.files import SITES, append, write_whole
from configuration.flower import log
from configuration.graph import graph_of
from models.flat import FlatModel
from page import document
from server_app import plots
from server_app.checkpoint import Saved, Writer
from server_app.discovery import LOG_EVERY_S, Federation, RunError
from server_app.event_log import EventLog, JsonConsole
from server_app.events import (
    EVERYBODY,
    Began,
    Checkpoint,
    Ended,
    Event,
    NewModel,
    Progress,
    Refused,
    Reported,
    Sink,
)
from server_app.overview import COLUMNS, overview, read_metrics
from server_app.trackers import Trackers
from strategies.method import ArrivalPlan, PeerPlan
from strategies.protocol import Started
from strategies.records import STATS, X, pack, unpack

REFUSED = ("when", "seconds", "site", "name", "phase", "rule", "reason", "by")
MOST_REFUSED, MOST_REFUSED_IN_ALL = (
    1000,
    100_000,
)  # rows of a site, or of a pair of peers, and of all
DRAW_EVERY_S, TRY_EVERY_S = 15.0, 5.0


class History:
    """A sink that keeps in memory what a run reported so far.

    Attributes:
        config: the run.
        federation: its sites; nobody before it began.
        arrays: the newest model, or models where sites learn alone; empty before the first round is
            over.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.federation = Federation((), (), (), None, ())
        self.arrays = ArrayRecord()
        self._rows: list[tuple[object, ...]] = []
        self._sinks: list[Sink] = []  # who writes it

    def close(self) -> None:
        """Unlock the run: another process may resume it."""
        for sink in self._sinks:
            if isinstance(sink, Checkpoints):
                sink.close()

    def resume(self, folder: Path, saved: Saved) -> None:
        """Go on after what a run that was killed had written into a folder."""
        self.arrays, file = pack(saved.arrays), folder / "metrics.csv"
        if file.exists():
            self._rows = list(
                read_metrics(file).head(saved.rows).itertuples(index=False, name=None)
            )
            lines = file.read_text().splitlines(keepends=True)[: len(self._rows) + 1]
            mode = file.stat().st_mode
            write_whole(file, "".join(lines).encode())
            file.chmod(mode)
        if len(self._rows) < saved.rows:  # somebody changed it, or a disk lost it
            log(
                WARNING, "%s: %d rows are expected, %d are there", file, saved.rows, len(self._rows)
            )

    def __call__(self, event: Event) -> None:
        """Take in an event."""
        match event:
            case Began():
                self.begin(event.federation, event.model)
            case Reported():
                self.record(*event)
            case NewModel():
                self.update_model(event.arrays)
            case Progress():
                self.show_progress(event)

    def begin(self, federation: Federation, model: FlatModel) -> None:
        """Note the sites, and the network at its initial model."""
        self.federation, self._model = federation, model

    def record(
        self,
        number: int,
        seconds: float,
        site: int | str,
        split: str,
        metrics: Mapping[str, float],
        bytes_up: int,
        bytes_down: int,
    ) -> None:
        """Add the metrics of a site or of all; arguments as in :class:`Reported`."""
        start = (number, round(seconds, 3), bytes_up, bytes_down, str(site), split)
        self._rows += [(*start, name, value) for name, value in metrics.items()]

    def update_model(self, arrays: ArrayRecord) -> None:
        """Replace the newest model."""
        self.arrays = arrays

    def show_progress(self, progress: Progress) -> None:
        """Show the progress after a round; here nobody watches."""

    @property
    def rows(self) -> Sequence[tuple[object, ...]]:
        """What was recorded, with the columns of ``COLUMNS``."""
        return self._rows

    @property
    def metrics(self) -> pd.DataFrame:
        """What was recorded, tidy: a value a row."""
        return pd.DataFrame(self._rows, columns=list(COLUMNS))

    @property
    def sites(self) -> pd.DataFrame:
        """A row a site: site, name, train and test examples, and examples of each class.

        The latter where sites report them.
        """
        columns = ["site", "name", "train", "test"]
        rows = [
            (site.number, site.name, site.num_train, site.num_test, *site.counts)
            for site in self.federation.sites
        ]
        known = all(site.counts for site in self.federation.sites)
        return pd.DataFrame(
            [row if known else row[:4] for row in rows],
            columns=columns + list(self.federation.classes) * known,
        )

    @property
    def models(self) -> dict[str, dict[str, Tensor]]:
        """The newest model under the names of the network's own state dict.

        One, or one a site where sites learn alone.
        """
        vectors = {name: unpack(array) for name, array in self.arrays.items()}
        if not vectors:
            return {}
        xs = vectors[X].reshape(-1, self._model.x.numel())
        stats = vectors.get(STATS, xs.new_empty(len(xs), 0)).reshape(len(xs), self._model.num_stats)
        names = (
            ["model"]
            if vectors[X].dim() == 1
            else [f"model-{site.number}" for site in self.federation.sites]
        )
        # A peer that was lost left no model: its row is not a number.
        return {
            name: self._model.state_dict(x, s)
            for name, x, s in zip(names, xs, stats, strict=True)
            if not x.isnan().any()
        }

    @property
    def description(self) -> Description:
        """The description that is saved with the models."""
        agreed = self.federation.agreed()
        return Description.of(
            self.config,
            self.federation.shape,
            agreed.classes,
            self.federation.columns,
            agreed.moments,
        )


def class_counts(sites: pd.DataFrame) -> pd.DataFrame:
    """The examples of each class: a row a site by its name and a column a class.

    No columns where sites do not report their classes.
    """
    return sites.iloc[:, 4:].set_axis(sites.iloc[:, 1].astype(str), axis=0)


def write_description(folder: Path, config: Config, sites: pd.DataFrame) -> None:
    """Write the whole configuration to ``config.toml``, for ``--run-config``; and ``sites.csv``."""
    with (folder / "config.toml").open("wb") as file:
        tomli_w.dump(config.tables(), file)
    named = sites.set_axis([_no_formula(str(column)) for column in sites.columns], axis=1)
    # Not by the column's name, which a class may have, too.
    named.isetitem(1, list(map(_no_formula, sites.iloc[:, 1])))
    named.to_csv(folder / "sites.csv", index=False)


def _no_formula(name: str) -> str:
    """A site's name such that no spreadsheet computes it; signed numbers stay as they are."""
    return f"'{name}" if re.match(r"[=+@-](?![\d.]+$)", name) else name


class Rows:
    """The sink of ``metrics.csv``: a killed run leaves whole rows.

    Args:
        history: the rows.
        folder: where.
    """

    def __init__(self, history: History, folder: Path) -> None:
        self._history, self._file, self._written = (
            history,
            folder / "metrics.csv",
            len(history.rows),
        )

    def __call__(self, event: Event) -> None:
        """Append what is new, in one piece; all of it where the file is gone."""
        if isinstance(event, Began | Reported | Ended):
            self._written = _append(self._file, COLUMNS, self._history.rows, self._written)


def _append(
    path: Path, columns: Sequence[str], rows: Sequence[tuple[object, ...]], written: int
) -> int:
    """Append the rows that are not written yet, at once; return how many are written now.

    All are written where the file is gone.
    """
    text = StringIO()
    writer = csv.writer(text)
    if not path.exists():
        written = 0
        writer.writerow(columns)
    writer.writerows(rows[written:])
    if text.tell():
        with path.open("ab") as file:
            append(file.fileno(), text.getvalue().encode())
    return len(rows)


class RefusedRows:
    """The sink of ``refused.csv``: what could not be used, whose it was, and by which key.

    The file exists only where anything was refused.

    Of each site, or of each pair of peers, there is a limited number: a site that sends unusable
    answers for days does not fill the disk.

    Args:
        folder: where.
    """

    def __init__(self, folder: Path) -> None:
        self._file, self._written = folder / "refused.csv", 0
        self._rows: list[tuple[object, ...]] = []
        self._count: Counter[tuple[int, str]] = Counter()

    def __call__(self, event: Event) -> None:
        """Append an event of the kind :class:`Refused` to the file."""
        if isinstance(event, Refused):
            self._count[key := (event.site.number, event.by)] += 1
            if self._count[key] <= MOST_REFUSED and len(self._rows) < MOST_REFUSED_IN_ALL:
                reason = (
                    event.reason
                    if self._count[key] < MOST_REFUSED
                    else f"{event.reason}; more of these are not listed"
                )
                texts = (
                    *map(_no_formula, (event.site.name, event.phase, event.rule, reason, event.by)),
                )
                self._rows.append((event.when, round(event.seconds, 3), event.site.number, *texts))
        if self._rows and isinstance(event, Refused | Ended):
            self._written = _append(self._file, REFUSED, self._rows, self._written)


class Models:
    """The sink of ``model*.safetensors``: always the newest, whole.

    Args:
        history: the models.
        folder: where.
    """

    def __init__(self, history: History, folder: Path) -> None:
        self._history, self._folder, self._outdated = history, folder, False

    def __call__(self, event: Event) -> None:
        """Write the newest model."""
        self._outdated = self._outdated or isinstance(event, NewModel)
        if self._outdated and isinstance(event, NewModel | Ended):
            write_models(self._folder, self._history.models, self._history.description)
            self._outdated = False


class Checkpoints:
    """The sink of ``checkpoints``; a run that ended well has none.

    Args:
        history: what was reported so far.
        folder: where.
        started: by what the sites know this run.
    """

    def __init__(self, history: History, folder: Path, started: Started) -> None:
        self._history, self._folder, self._started, self._writer = (
            history,
            folder,
            started,
            Writer(folder),
        )
        self.close = self._writer.close

    def __call__(self, event: Event) -> None:
        """Write a checkpoint, or delete all when the run has ended well."""
        history = self._history
        match event:
            case Checkpoint() if history.config.results.checkpoint_minutes:
                arrays = {name: unpack(array) for name, array in history.arrays.items()}
                config, rows = identity(history.config.flat()), len(history.rows)
                saved = Saved(
                    config,
                    *self._started,
                    history.federation,
                    rows,
                    arrays,
                    event.state(),
                    event.offers(),
                )
                self._writer.write(saved, self._folder / "metrics.csv")
            case Ended(None):
                self._writer.finish()
                for file in (self._folder.parent / SITES).glob(f"{self._started.run}-*"):
                    file.unlink(missing_ok=True)
                with suppress(OSError):  # it is not there, or has more in it
                    (self._folder.parent / SITES).rmdir()


class Pictures:
    """The sink of ``*.png``; drawn every few seconds and at the end.

    Args:
        history: what is drawn.
        folder: where.
    """

    def __init__(self, history: History, folder: Path) -> None:
        self._history, self._folder, self._drawn = history, folder, time.monotonic()

    def __call__(self, event: Event) -> None:
        """Draw the sites when the run begins, then the curves."""
        match event:
            case Began():
                self.draw_sites()
            case Progress() if time.monotonic() - self._drawn > DRAW_EVERY_S:
                self.draw_curves()
            case Ended() if self._history.rows:
                self.draw_curves()

    def draw_sites(self) -> None:
        """Draw who has which examples, and the communication graph."""
        sites, config = self._history.sites, self._history.config
        if not (counts := class_counts(sites)).empty:
            plots.save(plots.plot_class_counts(counts), self._folder / "sites.png")
        if isinstance(config.plan, PeerPlan):
            found = graph_of(config)
            plots.save(
                plots.graph(found, config.topology.name, sites.iloc[:, 1].tolist()),
                self._folder / "topology.png",
            )

    def draw_curves(self) -> None:
        """Draw the curves of the metrics so far."""
        metrics, config = self._history.metrics, self._history.config
        title = f"{config.method.name} on {config.data.source}, {config.num_sites} sites"
        plots.save(
            plots.curves(metrics, title, config.unit, config.task.headline),
            self._folder / "curves.png",
        )
        if isinstance(config.plan, ArrivalPlan):
            plots.save(plots.arrivals(metrics, title), self._folder / "arrivals.png")
        elif not isinstance(config.plan, PeerPlan):
            epsilon = getattr(config.keys, "epsilon", 0.0)
            plots.save(
                plots.schedule(metrics, title, config.training.lr_shape, epsilon),
                self._folder / "schedule.png",
            )
        self._drawn = time.monotonic()


class Report:
    """The sink of ``report.html``: the page to watch, with this run's data in it.

    It is written every few seconds and at the end.

    Args:
        folder: where, and of what.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._due = folder, 0.0

    def __call__(self, event: Event) -> None:
        """Write the report, but spend no more than a hundredth of the time on it."""
        start = time.monotonic()
        if isinstance(event, Ended) or (isinstance(event, Began | Progress) and start >= self._due):
            partial = self._folder / "report.partial"
            partial.write_text(document({"run": overview(self._folder)}))
            partial.replace(self._folder / "report.html")
            end = time.monotonic()
            self._due = end + max(DRAW_EVERY_S, 100 * (end - start))


class TextConsole:
    """The sink of the console: what will run, a line of progress a round, a table at the end.

    Args:
        history: what is shown.
        folder: where the results are.
    """

    def __init__(self, history: History, folder: Path) -> None:
        self._history, self._folder = history, folder

    def __call__(self, event: Event) -> None:
        """Print an event as a line."""
        match event:
            case Began():
                self._begin(event.federation, event.model.x.numel())
            case Progress():
                print(event, flush=True)
            case Ended():
                self._end()

    def _begin(self, federation: Federation, size: int) -> None:
        config, train = self._history.config, sum(site.num_train for site in federation.sites)
        many = len(federation.classes)
        what = {"class": f" in {many} classes", "map": f" with {many} classes", "tokens": ""}
        data = (
            f"{config.data.source} {federation.shape}"
            f"{what.get(config.task.target, f', {many} to predict')}"
        )
        print(
            f"{config.method.name}: {len(federation.sites)} sites, {train:,} training examples of "
            f"{data}, {config.model.name} of {size:,} parameters, "
            f"{config.epochs} epochs a site\nresults: {self._folder}",
            flush=True,
        )

    def _end(self) -> None:
        metrics, config, console = (
            self._history.metrics,
            self._history.config,
            Console(width=100, highlight=False),
        )
        tested = metrics[metrics["split"] == "test"]
        if not tested.empty:
            last = tested[tested["round"] == tested["round"].max()]
            console.print(self._table(last))
            consensus = metrics[metrics["split"] == "consensus"].set_index("metric")["value"]
            name = config.task.headline
            if f"{name}-of-mean" in consensus:
                found = (
                    f"{name} {consensus[f'{name}-of-mean']:.4f}, "
                    f"consensus distance {consensus['consensus-distance']:.3g}"
                )
                console.print(f"the mean of all models: {found}")
            end = last.iloc[-1]
            megabytes = f"{end['bytes_up'] / 1e6:.1f} MB up, {end['bytes_down'] / 1e6:.1f} MB down"
            console.print(f"{end['seconds']:.1f} s of training and testing, {megabytes}")
        console.print(f"results: {escape(str(self._folder))}", soft_wrap=True)

    def _table(self, last: pd.DataFrame) -> Table:
        """A row a site and one of the means."""
        config, sites = self._history.config, self._history.federation.sites
        values = last.set_index(["site", "metric"])["value"]
        title = f"{config.method.name} after {last['round'].iloc[0]} {config.unit}s"
        table = Table(title=title, title_justify="left")
        measured = dict.fromkeys([config.task.headline, "loss"])
        for heading in ("site", "train examples", "test examples", *measured):
            table.add_column(heading, justify="left" if heading == "site" else "right")

        def row(key: str, name: str, train: int, test: int, style: str = "") -> None:
            if key in values.index.get_level_values("site"):
                # A site may not report them.
                found = [values.get((key, metric)) for metric in measured]
                shown = ["" if value is None else f"{value:.4f}" for value in found]
                table.add_row(escape(name), f"{train:,}", f"{test:,}", *shown, style=style)

        for site in sites:
            row(str(site.number), site.name, site.num_train, site.num_test)
        table.add_section()
        # The others were away.
        tested = [
            site for site in sites if str(site.number) in values.index.get_level_values("site")
        ]
        row(
            EVERYBODY,
            "all",
            sum(site.num_train for site in tested),
            sum(site.num_test for site in tested),
            "bold",
        )
        return table


class Folder(History):
    """Writes the folder of a run, besides keeping everything in memory.

    ``config.toml``: the whole configuration, which ``--run-config`` takes back. ``sites.csv``: who
    takes part. ``metrics.csv``: tidy. ``refused.csv``: what was refused. ``model*.safetensors``:
    the newest model. ``*.png``: pictures. ``events.jsonl``: what happened. ``report.html``: a page
    of all that.

    A disk that is full or a folder that is moved away does not stop a run: it goes on in memory,
    and what is missing is written as soon as that works. At its end a run waits for that as long as
    ``patience-s``; then it leaves its last checkpoint, from which it can be taken up again.

    Args:
        config: the run.
        run: Flower's number of it.
        before: a run that was killed and goes on, and its folder.

    Attributes:
        path: absolute.

    Raises:
        ConfigError: nothing can be written where it should be.
    """

    def __init__(
        self, config: Config, run: int = 0, before: tuple[Path, Saved] | None = None
    ) -> None:
        super().__init__(config)
        self._before, self._started = before, before[1].next_start() if before else Started(run, 0)
        try:
            wanted = Path(config.results.folder).expanduser().absolute()
            with suppress(FileNotFoundError):
                wanted.lstat()
            TemporaryFile(
                dir=next(path for path in (wanted, *wanted.parents) if path.exists())
            ).close()
        except (OSError, ValueError, RuntimeError) as error:  # a zero byte, a user who is not there
            raise ConfigError(
                f"results.folder = {config.results.folder!r}: nothing can be written there: {error}"
            ) from error
        self._trackers = Trackers(config)
        self._json_console = JsonConsole(config) if config.results.log == "json" else None

    def __call__(self, event: Event) -> None:
        """Keep it, then write and print it.

        Raises:
            RunError: at the end of the run, something could still not be written.
        """
        super().__call__(event)
        if isinstance(event, Began):
            if self._before:
                self.path = self._before[0]
                self.resume(*self._before)
            else:
                self.path = new_folder(Path(self.config.results.folder), self.config.method.name)
            if self._json_console:
                self._json_console.formatter.run = self.path.name
            self._sinks = [
                self._describe,
                Rows(self, self.path),
                Models(self, self.path),
                RefusedRows(self.path),
                EventLog(self.config, self.path),
                Pictures(self, self.path),
                Report(self.path),
                self._trackers.begin(self.path),
                Checkpoints(self, self.path, self._started),
            ]
            self._console = self._json_console or TextConsole(self, self.path)
        if not self._sinks:
            return
        failed = None
        if isinstance(event, Ended):
            failed = self._end(event)
        else:
            self._write(event)
        if error := _failure(self._console, event):
            log(WARNING, "nothing can be printed: %s", error)
        if failed:
            raise RunError(f"{self.path}: the results cannot be written: {failed}")

    def _write(self, event: Event) -> None:
        for sink in self._sinks:
            if error := _failure(sink, event):
                self._warn(error, "the run goes on in memory, and this is tried again")

    def _end(self, event: Ended) -> OSError | None:
        """Write each file, and wait where there is no space; the first that could not be."""
        # A run that failed can be taken up again, or has nothing to wait for.
        deadline = time.monotonic() + (0.0 if event.error else self.config.patience_s)
        log_at, failed = 0.0, None
        for sink in self._sinks:
            if failed and isinstance(sink, Checkpoints):
                continue  # it can be taken up again
            while error := _failure(sink, event):
                if (now := time.monotonic()) >= deadline:
                    failed = failed or error
                    break
                if now >= log_at:
                    log_at = now + LOG_EVERY_S
                    self._warn(
                        error,
                        "the run is over and waits until its results can be written, "
                        f"for at most {deadline - now:.0f} s more (patience-s)",
                    )
                time.sleep(TRY_EVERY_S)
        return failed

    def _warn(self, error: OSError, what: str) -> None:
        log(WARNING, "%s: %s; %s", self.path, error, what)

    def _describe(self, event: Event) -> None:
        """Write the description, again where somebody moved the folder away."""
        if not (self.path / "config.toml").exists():
            self.path.mkdir(parents=True, exist_ok=True)
            write_description(self.path, self.config, self.sites)


def _failure(sink: Sink, event: Event) -> OSError | None:
    try:
        sink(event)
    except OSError as error:
        return error
    return None


def new_folder(parent: Path, strategy: str) -> Path:
    """A folder of its own for a run, named after the time and the strategy."""
    parent = parent.expanduser().absolute()
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{strategy}"
    attempt = 0
    while True:
        folder = parent / (f"{name}-{attempt}" if attempt else name)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            attempt += 1
