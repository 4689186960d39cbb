"""What a run reports: in memory, and in a folder that is written as the run goes, so that a killed run leaves what it had."""

import csv
import math
import os
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

import pandas as pd
import tomli_w
from flwr.app import ArrayRecord
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from configuration.config import Config
from configuration.errors import ConfigError
from configuration.graph import graph_of
from models.flat import FlatModel
from server_app import plots
from server_app.census import Federation
from strategies.method import ArrivalPlan, PeerPlan
from strategies.records import STATS, X, unpack

COLUMNS = ("round", "seconds", "bytes_up", "bytes_down", "site", "split", "metric", "value")
DRAW_EVERY_S = 15.0
EVERYBODY = "all"  # the site of a metric that is the mean over sites


class Progress(NamedTuple):
    """How far a run is after a round; printed, it is a line.

    Attributes:
        unit: what is counted: round, update of the server, or exchange of peers.
        round_number: how many there were.
        epochs: local epochs of this round (a fraction where it counts steps), or None where there are no rounds.
        done, total: local epochs a site so far (a fraction where sites do not go in rounds), and of the whole run.
        seconds: since the first round.
        megabytes: sent and received so far.
        train, test: means over the sites.
    """

    unit: str
    round_number: int
    epochs: float | None
    done: float
    total: int
    seconds: float
    megabytes: float
    train: Mapping[str, float]
    test: Mapping[str, float]

    def __str__(self) -> str:
        rates = f"{self.train.get('lr-first', math.nan):.2g} to {self.train.get('lr-last', math.nan):.2g}"
        rounds = self.epochs is not None
        left = self.seconds / self.done * (self.total - self.done) if self.done else math.nan
        parts = (
            f"{self.unit} {self.round_number:>{3 if rounds else 5}}",
            f"epoch {round(self.done):>{len(str(self.total))}}/{self.total}" + (f" (+{self.epochs:.3g})" if rounds else ""),
            f"lr {rates:<15}",
            f"train loss {self.train.get('loss', math.nan):.4f}",
            f"test accuracy {self.test.get('accuracy', math.nan):.4f}",
            f"moved {self.train['model-change']:.3f}" if "model-change" in self.train else "",
            f"staleness {self.train['staleness']:.1f}" if "staleness" in self.train else "",
            f"worst {self.test['accuracy-worst']:.4f}" if "accuracy-worst" in self.test else "",
            f"apart {self.train['disagreement']:.3g}" if "disagreement" in self.train else "",
            f"{self.megabytes:.1f} MB",
            f"{self.seconds:.0f} s, {left:.0f} s to go",
        )
        return " | ".join(part for part in parts if part)


class History:
    """What a run reported so far, in memory.

    Attributes:
        config: the run.
        federation: its sites; nobody before :meth:`begin`.
        arrays: the newest model, or models where sites learn alone; empty before the first round is over.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.federation = Federation((), (), (), None, ())
        self.arrays = ArrayRecord()
        self._rows: list[tuple[object, ...]] = []

    def begin(self, federation: Federation, model: FlatModel) -> None:
        """The sites are known, and the network, at its initial model."""
        self.federation, self._model = federation, model

    def record(
        self,
        round_number: int,
        seconds: float,
        site: int | str,
        split: str,
        metrics: Mapping[str, float],
        bytes_up: int,
        bytes_down: int,
    ) -> None:
        """Metrics of one site, or of everybody; seconds since the first round, bytes up (to the server) and down so far."""
        self.append(
            [
                (round_number, round(seconds, 3), bytes_up, bytes_down, str(site), split, name, value)
                for name, value in metrics.items()
            ]
        )

    def append(self, rows: list[tuple[object, ...]]) -> None:
        """Rows with the columns of ``COLUMNS``."""
        self._rows += rows

    def keep(self, arrays: ArrayRecord) -> None:
        """The newest model."""
        self.arrays = arrays

    def tell(self, progress: Progress) -> None:
        """A round is over."""

    def end(self) -> None:
        """The run is over, for whatever reason."""

    @property
    def metrics(self) -> pd.DataFrame:
        """What was recorded, tidy: a value a row."""
        return pd.DataFrame(self._rows, columns=list(COLUMNS))

    @property
    def sites(self) -> pd.DataFrame:
        """A row a site: site, name, train and test examples and, where sites tell, its examples of each class."""
        columns = ["site", "name", "train", "test"]
        rows = [(site.number, site.name, site.num_train, site.num_test, *site.counts) for site in self.federation.sites]
        told = all(site.counts for site in self.federation.sites)
        return pd.DataFrame([row if told else row[:4] for row in rows], columns=columns + list(self.federation.classes) * told)

    @property
    def models(self) -> dict[str, dict[str, Tensor]]:
        """The newest model under the names of the network's own state dict; one, or one a site where they learn alone."""
        vectors = {name: unpack(array) for name, array in self.arrays.items()}
        if not vectors:
            return {}
        xs = vectors[X].reshape(-1, self._model.x.numel())
        stats = vectors.get(STATS, xs.new_empty(len(xs), 0)).reshape(len(xs), self._model.num_stats)
        names = ["model"] if vectors[X].dim() == 1 else [f"model-{site.number}" for site in self.federation.sites]
        # A peer that was lost left no model: its row is not a number.
        return {name: self._model.state_dict(x, s) for name, x, s in zip(names, xs, stats, strict=True) if not x.isnan().any()}


def class_counts(sites: pd.DataFrame) -> pd.DataFrame:
    """Of :attr:`History.sites`, a row a site by its name and a column a class; no columns where sites do not tell."""
    return sites.iloc[:, 4:].set_axis(sites["name"].astype(str), axis=0)


def write_models(folder: Path, models: Mapping[str, Mapping[str, Tensor]]) -> None:
    """A state dict each, ``NAME.safetensors``; a file is replaced whole or not at all."""
    for name, state in models.items():
        final = folder / f"{name}.safetensors"
        partial = final.with_suffix(".partial")
        partial.touch()  # safetensors makes a file that only its owner can read: keep the mode of this one
        save_file({key: value.contiguous() for key, value in state.items()}, partial)
        os.replace(partial, final)


def write_description(folder: Path, config: Config, sites: pd.DataFrame) -> None:
    """``config.toml``, the whole configuration, which ``--run-config`` takes back, and ``sites.csv``."""
    with (folder / "config.toml").open("wb") as file:
        tomli_w.dump(config.flat(), file)
    sites.to_csv(folder / "sites.csv", index=False)


class Folder(History):
    """Writes the folder of a run.

    ``config.toml``: the whole configuration, which ``--run-config`` takes back. ``sites.csv``: who takes part. ``metrics.csv``:
    tidy. ``model*.safetensors``: the newest model. ``*.png``: pictures.

    Attributes:
        path: absolute.

    Raises:
        ConfigError: nothing can be written where it should be.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        wanted = Path(config.results.folder).expanduser().absolute()
        try:
            TemporaryFile(dir=next(path for path in (wanted, *wanted.parents) if path.exists())).close()
        except OSError as error:
            raise ConfigError(f"results.folder = {config.results.folder!r}: nothing can be written there: {error}") from error

    def begin(self, federation: Federation, model: FlatModel) -> None:
        """Make the folder and say what is about to run."""
        super().begin(federation, model)
        self.path = new_folder(Path(self.config.results.folder), self.config.strategy)
        self._drawn = time.monotonic()
        write_description(self.path, self.config, self.sites)
        with (self.path / "metrics.csv").open("w", newline="") as file:
            csv.writer(file).writerow(COLUMNS)
        train = sum(site.num_train for site in federation.sites)
        print(
            f"{self.config.strategy}: {len(federation.sites)} sites, {train:,} training examples of {self.config.data.source} "
            f"{federation.shape} in {len(federation.classes)} classes, {self.config.model.name} of {model.x.numel():,} parameters, "
            f"{self.config.epochs} epochs a site\nresults: {self.path}",
            flush=True,
        )
        if not (counts := class_counts(self.sites)).empty:
            plots.save(plots.who_has_what(counts), self.path / "sites.png")
        if isinstance(self.config.plan, PeerPlan):
            found = graph_of(self.config)
            plots.save(plots.graph(found, self.config.topology.name, self.sites["name"].tolist()), self.path / "topology.png")

    def append(self, rows: list[tuple[object, ...]]) -> None:
        """Append to ``metrics.csv``."""
        super().append(rows)
        with (self.path / "metrics.csv").open("a", newline="") as file:
            csv.writer(file).writerows(rows)

    def keep(self, arrays: ArrayRecord) -> None:
        """Write the newest model."""
        super().keep(arrays)
        write_models(self.path, self.models)

    def tell(self, progress: Progress) -> None:
        """Print a line of progress; every few seconds, draw."""
        print(progress, flush=True)
        if time.monotonic() - self._drawn > DRAW_EVERY_S:
            self._draw()

    def _draw(self) -> None:
        metrics = self.metrics
        title = f"{self.config.strategy} on {self.config.data.source}, {self.config.num_sites} sites"
        epsilon = getattr(self.config.keys, "epsilon", 0.0)
        plots.save(plots.curves(metrics, title, self.config.unit), self.path / "curves.png")
        if isinstance(self.config.plan, ArrivalPlan):
            plots.save(plots.arrivals(metrics, title), self.path / "arrivals.png")
        elif not isinstance(self.config.plan, PeerPlan):
            plots.save(plots.schedule(metrics, title, self.config.training.lr_shape, epsilon), self.path / "schedule.png")
        self._drawn = time.monotonic()

    def end(self) -> None:
        """Draw what was reached, print the table of results and where they are."""
        if self._rows:
            self._draw()
        metrics = self.metrics
        tested = metrics[metrics["split"] == "test"]
        console = Console(width=100, highlight=False)
        if not tested.empty:
            last = tested[tested["round"] == tested["round"].max()]
            values = last.set_index(["site", "metric"])["value"]
            title = f"{self.config.strategy} after {last['round'].iloc[0]} {self.config.unit}s"
            table = Table(title=title, title_justify="left")
            for heading in ("site", "train examples", "test examples", "accuracy", "loss"):
                table.add_column(heading, justify="left" if heading == "site" else "right")
            for site in self.federation.sites:
                if (key := str(site.number)) in values.index.get_level_values("site"):
                    numbers = (f"{values[key, 'accuracy']:.4f}", f"{values[key, 'loss']:.4f}")
                    table.add_row(site.name, f"{site.num_train:,}", f"{site.num_test:,}", *numbers)
            train, test = (sum(getattr(site, part) for site in self.federation.sites) for part in ("num_train", "num_test"))
            numbers = (f"{values[EVERYBODY, 'accuracy']:.4f}", f"{values[EVERYBODY, 'loss']:.4f}")
            table.add_section()
            table.add_row("all", f"{train:,}", f"{test:,}", *numbers, style="bold")
            console.print(table)
            together = metrics[metrics["split"] == "consensus"].set_index("metric")["value"]
            if "accuracy-of-mean" in together:
                told = f"accuracy {together['accuracy-of-mean']:.4f}, consensus distance {together['consensus-distance']:.3g}"
                console.print(f"the mean of all models: {told}")
            end = last.iloc[-1]
            megabytes = f"{end['bytes_up'] / 1e6:.1f} MB up, {end['bytes_down'] / 1e6:.1f} MB down"
            console.print(f"{end['seconds']:.1f} s of training and testing, {megabytes}")
        console.print(f"results: {self.path}", soft_wrap=True)


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
