"""The overview of a run for the page, from the files of its folder.

The files are ``config.toml``, ``sites.csv``, ``metrics.csv`` and ``events.jsonl``; a folder without
the last one, of an older version, says less.
"""

import csv
import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from server_app.event_log import ALL, FILE, is_running
from server_app.events import EVERYBODY

METRICS, CONFIG, SITES = "metrics.csv", "config.toml", "sites.csv"
POINTS = 1000  # of a curve
EVENTS = 500
DEEPEST = 4  # folders in folders
TRAINING = (
    "loss",
    "lr-first",
    "lr-last",
    "local-epochs",
    "staleness",
    "model-change",
    "disagreement",
)
COLUMNS = ("round", "seconds", "bytes_up", "bytes_down", "site", "split", "metric", "value")


def read_metrics(file: Path) -> pd.DataFrame:
    """``metrics.csv``, without a last row that was cut off."""
    text = file.read_text()
    exact = {"seconds": float, "value": float}  # to the last bit, in every version of pandas
    return pd.read_csv(
        StringIO(text[: text.rfind("\n") + 1]), dtype={"site": str}, converters=exact
    )


def runs(root: Path) -> dict[str, Path]:
    """The folders of runs in a folder, by relative path, the newest first; no link is followed."""
    found = {}
    for folder, folders, files in os.walk(root):
        path = Path(folder)
        if CONFIG in files or METRICS in files:
            found[path.relative_to(root).as_posix()] = path
        folders[:] = [] if len(path.relative_to(root).parts) >= DEEPEST else sorted(folders)
    return dict(sorted(found.items(), key=lambda item: _newest(item[1]), reverse=True))


def _newest(folder: Path) -> float:
    return max((stamp for _, stamp, _ in _stamps(folder)), default=0.0)


def _stamps(folder: Path) -> tuple[tuple[str, float, int], ...]:
    found = []
    for name in (CONFIG, SITES, METRICS, FILE):
        with suppress(OSError):
            about = (folder / name).lstat()
            found.append((name, about.st_mtime, about.st_size))
    return tuple(found)


def overview(folder: Path, name: str = "") -> dict[str, Any]:
    """The data that the page shows of a run."""
    found = dict(_read(folder, _stamps(folder)))
    going = is_running(folder / FILE)
    if found["state"] == "stopped" and going:
        found["state"] = "running"
    return found | {"name": name or folder.name, "updated": _newest(folder), "live": going}


def summary(folder: Path, name: str) -> dict[str, Any]:
    """The row of a run in the list of runs."""
    found = overview(folder, name)
    return {
        key: value
        for key, value in found.items()
        if key not in ("curves", "events", "links", "edges", "config", "sites")
    } | {
        "sites": len(found["sites"]),
        "data": found["config"].get("data.source"),
    }


@lru_cache(maxsize=256)
def _read(folder: Path, _: tuple[tuple[str, float, int], ...]) -> dict[str, Any]:
    """The overview of a run, which is cached until one of its files changes."""
    config = _flat(_config(folder / CONFIG))
    lines = list(_lines(folder / FILE))
    began: dict[str, Any] = next((line for line in reversed(lines) if line["kind"] == "began"), {})
    try:
        metrics = read_metrics(folder / METRICS)
    except (OSError, ValueError):  # not yet there, or empty
        metrics = pd.DataFrame(
            [],
            columns=list(COLUMNS),
        )
    tested = metrics[(metrics["split"] == "test")]["metric"].unique()
    headline = began.get("headline") or next(
        (name for name in ("accuracy", *tested) if name in tested), "accuracy"
    )
    last = metrics.iloc[-1] if len(metrics) else None
    everybody = metrics[(metrics["site"] == EVERYBODY)]
    state, error = _state(lines)
    return {
        "state": state,
        "error": error,
        "method": began.get("method") or config.get("strategy"),
        "unit": began.get("unit", "round"),
        "headline": headline,
        "larger": began.get("larger", True),
        "parameters": began.get("parameters"),
        "began": lines[0]["time"] if lines else None,
        "updated": lines[-1]["time"] if lines else None,
        "progress": _progress(lines, config),
        "round": int(last["round"]) if last is not None else 0,
        "seconds": float(metrics["seconds"].max()) if last is not None else 0.0,
        "now": {
            split: _newest_of(everybody[everybody["split"] == split])
            for split in ("train", "test", "consensus")
        },
        "bytes": _traffic(everybody),
        "curves": {
            split: _curves(metrics[metrics["split"] == split], split, headline)
            for split in ("train", "test")
        },
        "sites": _sites(
            folder, began, lines, metrics, config, headline, state in ("finished", "failed")
        ),
        "links": _links(metrics),
        "edges": began.get("edges", []),
        "config": config,
        "events": [line for line in lines if line["kind"] != "began"][-EVENTS:],
    }


def _config(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def _flat(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables as one, with dots in its keys."""
    found: dict[str, Any] = {}
    for key, value in tables.items():
        found |= (
            {f"{key}.{inner}": each for inner, each in value.items()}
            if isinstance(value, Mapping)
            else {key: value}
        )
    return found


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of an event log, without a last one that was cut off."""
    try:
        text = file.read_text()
    except (OSError, ValueError):
        return
    for line in text.splitlines():
        with suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and {"time", "kind"} <= found.keys():
                yield found


def _state(lines: list[dict[str, Any]]) -> tuple[str, str | None]:
    """Whether a run is finished, failed, stopped or unknown; and its error."""
    last = next((line for line in reversed(lines) if line["kind"] in ("began", "ended")), None)
    if last is None or last["kind"] == "began":
        return "unknown" if last is None else "stopped", None
    return ("failed" if last.get("error") else "finished"), last.get("error")


def _progress(lines: list[dict[str, Any]], config: Mapping[str, Any]) -> dict[str, Any]:
    line = next((line for line in reversed(lines) if line["kind"] == "progress"), None)
    if line is None:
        return {"done": None, "total": config.get("epochs"), "left": None}
    done, total, seconds = line["done"], line["total"], line["seconds"]
    left = seconds / done * max(0.0, total - done) if done else None
    return {"done": done, "total": total, "left": left}


def _traffic(everybody: pd.DataFrame) -> dict[str, int]:
    return {
        way: int(everybody[f"bytes_{way}"].max()) if len(everybody) else 0 for way in ("up", "down")
    }


def _newest_of(rows: pd.DataFrame) -> dict[str, float]:
    return {
        str(name): float(value)
        for name, value in rows.groupby("metric", sort=False)["value"].last().items()
    }


def _curves(rows: pd.DataFrame, split: str, headline: str) -> dict[str, Any]:
    """Each metric by round, seconds and bytes: of all sites together, the least and the most."""
    names = (headline, "loss") if split == "test" else (headline, *TRAINING)
    rows = rows[rows["metric"].isin(names)]
    of_all = rows[rows["site"] == EVERYBODY].drop_duplicates(["round", "metric"], keep="last")
    table = of_all.pivot(index="round", columns="metric", values="value")
    if table.empty:
        return {"round": [], "seconds": [], "bytes": [], "metrics": {}}
    where = of_all.groupby("round")[["seconds", "bytes_up", "bytes_down"]].max()
    chosen = table.index[
        np.unique(np.linspace(0, len(table) - 1, min(len(table), POINTS)).round().astype(int))
    ]
    each = rows[(rows["site"] != EVERYBODY) & rows["round"].isin(chosen)]
    spread = each.groupby(["metric", "round"])["value"].agg(["min", "max"])
    found = {}
    for name in (str(column) for column in table.columns):
        found[name] = {"all": _short(table.loc[chosen, name])}
        if split == "test" and name in spread.index.get_level_values(0):
            extremes = spread.loc[name].reindex(chosen)
            found[name] |= {"min": _short(extremes["min"]), "max": _short(extremes["max"])}
    where = where.loc[chosen]
    megabytes = where["bytes_up"] + where["bytes_down"]
    return {
        "round": [int(number) for number in chosen],
        "seconds": _short(where["seconds"]),
        "bytes": [int(number) for number in megabytes],
        "metrics": found,
    }


def _short(values: "pd.Series[float]") -> list[float | None]:
    """A number with five digits: a picture shows no more."""
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in values.astype(float)]


def _links(metrics: pd.DataFrame) -> list[list[int]]:
    """Reader, sender and bytes of each link between peers."""
    rows = metrics[metrics["split"] == "links"].drop_duplicates(["site", "metric"], keep="last")
    prefix = "bytes-to-"
    return [
        [int(site), int(str(metric).removeprefix(prefix)), int(value)]
        for site, metric, value in zip(rows["site"], rows["metric"], rows["value"], strict=True)
        if str(metric).startswith(prefix)
    ]


def _sites(
    folder: Path,
    began: Mapping[str, Any],
    lines: list[dict[str, Any]],
    metrics: pd.DataFrame,
    config: Mapping[str, Any],
    headline: str,
    over: bool,
) -> list[dict[str, Any]]:
    """The rows of the table of sites."""
    known = began.get("sites") or _sites_file(folder / SITES)
    rows = {
        int(each["site"]): dict(each) | {"does": "", "seen": None, "refused": {}, "why": None}
        for each in known
    }
    _follow(rows, lines, over)
    own = metrics[metrics["site"] != EVERYBODY]
    newest = own.drop_duplicates(["site", "split", "metric"], keep="last")
    values: dict[int, dict[str, float]] = {}
    for site, split, metric, value in zip(
        newest["site"], newest["split"], newest["metric"], newest["value"], strict=True
    ):
        values.setdefault(int(site), {})[f"{split} {metric}"] = float(value)
    traffic = own.groupby("site")[["bytes_up", "bytes_down"]].max()
    speeds = _speeds(own, values, config)
    for number, row in rows.items():
        found = values.get(number, {})
        key = str(number)
        row |= {
            "metrics": {
                name: found[name] for name in (f"test {headline}", "test loss") if name in found
            },
            "up": int(traffic["bytes_up"].get(key, 0)),
            "down": int(traffic["bytes_down"].get(key, 0)),
            "speed": speeds.get(number),
        }
    return list(rows.values())


def _sites_file(file: Path) -> list[dict[str, Any]]:
    try:
        with file.open(newline="") as opened:
            return [
                {
                    "site": int(row["site"]),
                    "name": row["name"],
                    "train": int(row["train"]),
                    "test": int(row["test"]),
                }
                for row in csv.DictReader(opened)
            ]
    except (OSError, ValueError, KeyError):
        return []


def _follow(rows: dict[int, dict[str, Any]], lines: list[dict[str, Any]], over: bool) -> None:
    """Add to the rows of sites what the event log says: last answer, state, what was refused."""
    for line in lines:
        reported = line.get("reported")
        for number in rows if reported == ALL else reported or ():
            if number in rows:
                rows[number] |= {"seen": line["time"], "does": "works"}
        row = rows.get(line.get("site", -1)) if isinstance(line.get("site"), int) else None
        if row is None:
            continue
        match line["kind"]:
            case "refused":
                rule = str(line.get("rule") or line.get("phase") or "other")
                row["refused"][rule] = row["refused"].get(rule, 0) + 1
                row |= {
                    "seen": line["time"],
                    "does": f"left out of the {line.get('phase')}",
                    "why": line.get("reason"),
                }
            case "back":
                row |= {"seen": line["time"], "does": "works"}
            case "away":
                row |= {"does": "away", "why": line.get("reason", row["why"])}
    for row in rows.values():
        row["does"] = "" if over and row["does"] == "works" else row["does"]


def _speeds(
    own: pd.DataFrame, values: Mapping[int, Mapping[str, float]], config: Mapping[str, Any]
) -> dict[int, float]:
    """Samples a second of each site, from its last report but one to the last, waiting included.

    Where sites do not tell samples: of its updates or, of a peer, of the exchanges that there were.
    """
    of_update = float(config.get(f"{config.get('strategy')}.local-steps", 1)) * float(
        config.get("training.batch-size", 1)
    )
    reports = own[own["split"] == "train"].drop_duplicates(["site", "round"], keep="last")
    moments: dict[int, list[tuple[float, float]]] = {}
    for site, number, seconds in zip(
        reports["site"], reports["round"], reports["seconds"], strict=True
    ):
        moments[int(site)] = [
            *moments.get(int(site), [(0.0, 0.0)])[-1:],
            (float(number), float(seconds)),
        ]
    found = {}
    for site, ((before, start), (last, end)) in moments.items():
        reported = values.get(site, {})
        count = reported.get(
            "train samples", reported.get("train updates", last - before) * of_update
        )
        if end > start:
            found[site] = count / (end - start)
    return found
