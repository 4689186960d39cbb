"""Serve a page that shows the runs of a folder: those that go on, and those that are over.

    python -m server_app.watch runs/                        http://127.0.0.1:8080
    python -m server_app.watch runs/ --address 127.0.0.1:9000

It reads the folders and writes nothing; it may be started, ended and started again at any time.
``/metrics`` has the runs that go on, and the newest one, for Prometheus. Whoever reaches the
address sees everything: it asks for no password and encrypts nothing.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from page import address_of, server
from server_app.overview import overview, runs, summary

NEWEST = 100  # runs in the list


def data(root: Path, query: Mapping[str, str]) -> dict[str, Any] | None:
    """What the page asks for: a run by its name in the list, or the list."""
    if "run" not in query:
        return {"runs": list(newest(root, summary))}
    folder = runs(root).get(query["run"])
    return {"run": overview(folder, query["run"])} if folder else None


def newest(root: Path, read: Callable[[Path, str], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The newest runs in a folder."""
    for name, folder in islice(runs(root).items(), NEWEST):
        with suppress(Exception):  # its files are not those of a run: the others are shown
            yield read(folder, name)


class Runs(Collector):
    """Prometheus' metrics of the runs that go on, and of the newest one.

    Args:
        root: the folder of runs.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def collect(self) -> Iterable[Metric]:
        """The metrics of live runs, or of the newest, read when Prometheus asks for them."""
        found = list(newest(self._root, overview))
        return _metrics([run for run in found if run["live"]] or found[:1])


def _metrics(chosen: list[dict[str, Any]]) -> Iterator[Metric]:
    gauges = {
        "run_up": "1 while the run goes on",
        "round": "rounds, updates or exchanges so far",
        "epochs_done": "local epochs of a site so far",
        "epochs": "local epochs of a site in the whole run",
        "seconds_left": "time left, if it goes on at this pace",
    }
    families = {
        name: GaugeMetricFamily(f"archipelago_{name}", help, labels=["run"])
        for name, help in gauges.items()
    }
    headline = GaugeMetricFamily(
        "archipelago_headline",
        "the metric by which the task is judged",
        labels=["run", "metric", "site"],
    )
    loss = GaugeMetricFamily("archipelago_loss", "of all sites", labels=["run", "split"])
    up = GaugeMetricFamily(
        "archipelago_site_up", "1 while a site takes part", labels=["run", "site"]
    )
    speed = GaugeMetricFamily(
        "archipelago_site_samples_per_second", "examples trained on", labels=["run", "site"]
    )
    traffic = CounterMetricFamily(
        "archipelago_bytes", "content of messages", labels=["run", "site", "direction"]
    )
    refused = CounterMetricFamily(
        "archipelago_refused", "what could not be used", labels=["run", "site", "rule"]
    )
    for run in chosen:
        name, progress, metric = run["name"], run["progress"], run["headline"]
        values = run["live"], run["round"], progress["done"], progress["total"], progress["left"]
        for family, value in zip(families.values(), values, strict=True):
            if value is not None:
                family.add_metric([name], float(value))
        for split in ("train", "test"):
            if "loss" in run["now"][split]:
                loss.add_metric([name, split], run["now"][split]["loss"])
        if metric in run["now"]["test"]:
            headline.add_metric([name, metric, "all"], run["now"]["test"][metric])
        for site in run["sites"]:
            number = str(site["site"])
            up.add_metric([name, number], float(run["live"] and site["does"] in ("", "works")))
            if f"test {metric}" in site["metrics"]:
                headline.add_metric([name, metric, number], site["metrics"][f"test {metric}"])
            if site["speed"] is not None:
                speed.add_metric([name, number], site["speed"])
            for way in ("up", "down"):
                traffic.add_metric([name, number, way], site[way])
            for rule, count in site["refused"].items():
                refused.add_metric([name, number, rule], count)
    yield from (*families.values(), headline, loss, up, speed, traffic, refused)


def main() -> None:
    """Serve until it is ended."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, help="the folder of runs")
    parser.add_argument(
        "--address", default="127.0.0.1:8080", help="where to listen (default: %(default)s)"
    )
    arguments = parser.parse_args()
    root = arguments.runs.expanduser().absolute()
    if not root.is_dir():
        raise SystemExit(f"{arguments.runs}: there is no such folder")
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Runs(root))
    try:
        served = server(
            address_of(arguments.address), partial(data, root), partial(generate_latest, registry)
        )
    except (ValueError, OSError) as error:
        raise SystemExit(f"--address {arguments.address}: {error}") from None
    print(f"{root}: {served.address}", flush=True)
    try:
        served.serve_forever()
    except KeyboardInterrupt:
        print("ended")


if __name__ == "__main__":
    main()
