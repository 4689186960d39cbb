"""The results of a run: one folder, written as the run goes, so that a killed run leaves what it had."""

import csv
import os
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import pandas as pd
import tomli_w
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from server_app import plots
from server_app.census import Federation
from strategies.config import Config

COLUMNS = ("round", "seconds", "bytes_up", "bytes_down", "site", "split", "metric", "value")
DRAW_EVERY_S = 15.0
EVERYBODY = "all"  # the site of a metric that is the mean over sites


class Results:
    """Writes the folder of a run.

    ``config.toml``: the whole configuration, which ``--run-config`` takes back. ``metrics.csv``: tidy, a value a row; seconds since
    the first round, bytes up (to the server) and down so far. ``model*.safetensors``: the newest model. ``*.png``: pictures.

    Attributes:
        folder: absolute.
    """

    def __init__(self, config: Config) -> None:
        parent = Path(config.results_dir).expanduser().absolute()
        name = f"{datetime.now():%Y%m%d-%H%M%S}-{config.strategy}"
        for attempt in range(1000):
            self.folder = parent / (f"{name}-{attempt}" if attempt else name)
            try:
                self.folder.mkdir(parents=True)
                break
            except FileExistsError:
                continue
        self._config = config
        self._rows: list[tuple[object, ...]] = []
        self._drawn = time.monotonic()
        with (self.folder / "config.toml").open("wb") as file:
            tomli_w.dump(config.kebab(), file)
        with (self.folder / "metrics.csv").open("w", newline="") as file:
            csv.writer(file).writerow(COLUMNS)

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
        """Append metrics of one site, or of everybody, to ``metrics.csv``."""
        rows = [
            (round_number, round(seconds, 3), bytes_up, bytes_down, str(site), split, name, value)
            for name, value in metrics.items()
        ]
        self._rows += rows
        with (self.folder / "metrics.csv").open("a", newline="") as file:
            csv.writer(file).writerows(rows)

    @property
    def metrics(self) -> pd.DataFrame:
        """What was recorded so far."""
        return pd.DataFrame(self._rows, columns=list(COLUMNS))

    def save_model(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write models, a state dict each, under file names; a file is replaced whole or not at all."""
        for name, state in states.items():
            final = self.folder / f"{name}.safetensors"
            partial = final.with_suffix(".partial")
            save_file({key: value.contiguous() for key, value in state.items()}, partial)
            os.replace(partial, final)

    def draw_sites(self, federation: Federation) -> None:
        """Save the picture of who has what, where sites tell."""
        if all(site.counts for site in federation.sites):
            counts = {site.name: site.counts for site in federation.sites}
            plots.save(plots.who_has_what(counts, federation.classes), self.folder / "sites.png")

    def draw(self, *, now: bool) -> None:
        """Save the curves: at the end of a run, and every few seconds on the way."""
        if not self._rows or not (now or time.monotonic() - self._drawn > DRAW_EVERY_S):
            return
        metrics = self.metrics
        config = self._config
        title = f"{config.strategy} on {config.data}, {config.num_sites} sites"
        epsilon = config.epsilon if config.strategy == "co-learning" else 0
        plots.save(plots.curves(metrics, title), self.folder / "curves.png")
        plots.save(plots.schedule(metrics, title, config.lr_shape, epsilon), self.folder / "schedule.png")
        self._drawn = time.monotonic()

    def show(self, federation: Federation) -> None:
        """Print the table of results and where they are."""
        metrics = self.metrics
        tested = metrics[metrics["split"] == "test"]
        console = Console(width=100, highlight=False)
        if not tested.empty:
            last = tested[tested["round"] == tested["round"].max()]
            values = last.set_index(["site", "metric"])["value"]
            table = Table(title=f"{self._config.strategy} after {last['round'].iloc[0]} rounds", title_justify="left")
            for heading in ("site", "train examples", "test examples", "accuracy", "loss"):
                table.add_column(heading, justify="left" if heading == "site" else "right")
            for site in federation.sites:
                if (key := str(site.number)) in values.index.get_level_values("site"):
                    numbers = (f"{values[key, 'accuracy']:.4f}", f"{values[key, 'loss']:.4f}")
                    table.add_row(site.name, f"{site.num_train:,}", f"{site.num_test:,}", *numbers)
            train, test = (sum(getattr(site, part) for site in federation.sites) for part in ("num_train", "num_test"))
            numbers = (f"{values[EVERYBODY, 'accuracy']:.4f}", f"{values[EVERYBODY, 'loss']:.4f}")
            table.add_section()
            table.add_row("all", f"{train:,}", f"{test:,}", *numbers, style="bold")
            console.print(table)
            end = last.iloc[-1]
            megabytes = f"{end['bytes_up'] / 1e6:.1f} MB up, {end['bytes_down'] / 1e6:.1f} MB down"
            console.print(f"{end['seconds']:.1f} s of training and testing, {megabytes}")
        console.print(f"results: {self.folder}", soft_wrap=True)
