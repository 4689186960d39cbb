"""What the page shows of runs, and the server of it.

It reads the files of their folders, whatever names sites chose.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from flwr.app import Message, RecordDict
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from client_app.policy import SiteFile
from client_app.status import Status
from configuration.config import configuration
from page import as_json, document, policy, server
from server_app import plots
from server_app.app import run
from server_app.overview import POINTS, overview, read_metrics, runs
from server_app.results import Folder, Pictures
from server_app.watch import Runs, data
from strategies.protocol import write_card
from tests.app.stubs import NETWORK, Answer, Sites, Spoil, card
from tests.conftest import ROOT

DASHBOARD = json.loads((ROOT / "deploy" / "grafana.json").read_text())
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module", autouse=True)
def no_pictures() -> Iterator[None]:
    """They take most of the time of a small run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pictures, "draw_curves", lambda pictures: None)
        patch.setattr(plots, "save", lambda *arguments: None)
        yield


def honest(site: int, message: Message, content: RecordDict) -> Answer:
    return content


def spoiled(site: int, message: Message, content: RecordDict) -> Answer:
    """Site 1 has a name; site 2 sends in each training what nobody can use."""
    kind = message.metadata.message_type
    if kind == "query.site" and site == 1:
        return write_card(card(CONFIG, 1).model_copy(update={"name": HOSTILE}))
    return RecordDict() if kind == "train" and site == 2 else content


CONFIG = configuration(strategy="fedavg", num_sites=3, model={"name": NETWORK})


def folder_of(root: Path, spoil: Spoil = honest, **changes: Any) -> Path:
    small: dict[str, Any] = (
        {"strategy": "fedavg", "fedavg.local-epochs": 1} if "strategy" not in changes else {}
    )
    config = configuration(
        **small
        | {"num_sites": 3, "epochs": 4}
        | changes
        | {"model.name": NETWORK, "results.folder": str(root)}
    )
    found = Folder(config)
    run(Sites(config, spoil), config, found)
    return found.path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("runs")
    folder_of(found, spoiled)
    folder_of(found / "comparison" / "seed-1", strategy="dmsgd", topology={"name": "ring"})
    return found


def embedded(page: str) -> Any:
    start = '<script type="application/json" id="data">'
    return json.loads(page.partition(start)[2].partition("</script>")[0])


def test_overview_says_what_the_run_reported(root: Path) -> None:
    name, folder = next((name, folder) for name, folder in runs(root).items() if "fedavg" in name)
    found, metrics = overview(folder, name), read_metrics(folder / "metrics.csv")
    test = metrics.query("split == 'test' and metric == 'accuracy'")
    assert found["curves"]["test"]["metrics"]["accuracy"]["all"] == pytest.approx(
        test.query("site == 'all'")["value"].tolist(), rel=1e-4
    )
    assert found["curves"]["test"]["metrics"]["accuracy"]["max"] == pytest.approx(
        test.query("site != 'all'").groupby("round")["value"].max().tolist(), rel=1e-4
    )
    assert found["curves"]["test"]["round"] == [1, 2, 3, 4]
    assert (found["state"], found["live"], found["error"]) == ("finished", False, None)
    assert found["progress"] == {"done": 4.0, "total": 4, "left": 0.0}
    last = metrics.query("site == 'all'").iloc[-1]
    assert found["bytes"] == {"up": last["bytes_up"], "down": last["bytes_down"]}
    first, hostile, refused = found["sites"]
    assert hostile["name"] == HOSTILE
    assert first["up"] == metrics.query("site == '0'")["bytes_up"].max()
    assert first["metrics"]["test accuracy"] == test.query("site == '0'")["value"].iloc[-1]
    assert (first["refused"], first["why"]) == ({}, None)
    assert sum(refused["refused"].values()) >= 2
    assert refused["why"]
    assert first["speed"] > 0


def test_peers_and_their_links(root: Path) -> None:
    found = overview(next(folder for name, folder in runs(root).items() if "dmsgd" in name))
    assert {tuple(sorted(edge)) for edge in found["edges"]} == {(0, 1), (0, 2), (1, 2)}
    metrics = read_metrics(next(root.glob("comparison/seed-1/*/metrics.csv"))).query(
        "split == 'links'"
    )
    assert sorted(count for _, _, count in found["links"]) == sorted(metrics["value"])
    assert found["unit"] == "exchange"


def test_folders_of_killed_and_older_runs(root: Path, tmp_path: Path) -> None:
    whole = next(folder for name, folder in runs(root).items() if "fedavg" in name)
    killed = shutil.copytree(whole, tmp_path / "killed")
    text = (killed / "events.jsonl").read_text()
    (killed / "events.jsonl").write_text(text[: text.rindex('{"time"')] + '{"time": "cut o')
    table = (killed / "metrics.csv").read_text()
    (killed / "metrics.csv").write_text(table[:-5])
    assert overview(killed)["state"] == "stopped"
    assert overview(killed)["sites"][1]["name"] == HOSTILE
    older = shutil.copytree(whole, tmp_path / "older")
    (older / "events.jsonl").unlink()
    found = overview(older)
    assert (found["state"], found["headline"], len(found["sites"])) == ("unknown", "accuracy", 3)
    for file in ("metrics.csv", "sites.csv"):
        (older / file).write_text("")
    assert overview(older)["curves"]["test"]["round"] == []
    (older / "config.toml").write_bytes(b"\xff = [")
    assert overview(older)["config"] == {}


def test_sites_that_are_away_and_back(root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(
        next(folder for name, folder in runs(root).items() if "fedavg" in name), tmp_path / "one"
    )
    line = {"time": "2026-11-27T00:00:00Z", "run": "one", "round": 4, "site": 0}
    with (folder / "events.jsonl").open("a") as file:
        for kind in ("away", "back", "away"):
            file.write(json.dumps({**line, "kind": kind}) + "\n")
            file.flush()
            found = overview(folder)["sites"][0]
            assert found["does"] == ("away" if kind == "away" else "")  # of a run that is over


def test_run_that_goes_on_is_live(tmp_path: Path) -> None:
    seen = []

    def look(site: int, message: Message, content: RecordDict) -> Answer:
        if message.metadata.message_type == "evaluate":
            (folder,) = runs(tmp_path).values()
            seen.append(
                (
                    overview(folder)["state"],
                    embedded((folder / "report.html").read_text())["run"]["state"],
                )
            )
        return content

    folder = folder_of(tmp_path, look)
    assert set(seen) == {("running", "running")}
    assert embedded((folder / "report.html").read_text())["run"]["state"] == "finished"


def test_report_is_the_page_with_the_data_and_no_name_ends_its_element(root: Path) -> None:
    folder = next(folder for name, folder in runs(root).items() if "fedavg" in name)
    page = (folder / "report.html").read_text()
    assert HOSTILE not in page
    assert embedded(page)["run"]["sites"][1]["name"] == HOSTILE
    # The rest is the server's page.
    assert page.replace(as_json(embedded(page)).replace("<", "\\u003c"), "null") == document()
    assert "http://" not in policy()
    assert len(page) < 150_000


def test_report_of_a_long_run_stays_small(root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(
        next(folder for name, folder in runs(root).items() if "fedavg" in name), tmp_path / "long"
    )
    rows = "".join(
        f"{number},{number / 3},{number},{number},{site},{split},{metric},{number / 7}\n"
        for number in range(1, 20_001)
        for site, split, metric in (
            ("all", "test", "accuracy"),
            ("all", "test", "loss"),
            ("0", "test", "accuracy"),
        )
    )
    (folder / "metrics.csv").write_text(
        "round,seconds,bytes_up,bytes_down,site,split,metric,value\n" + rows
    )
    found = overview(folder)
    assert len(found["curves"]["test"]["round"]) == POINTS
    assert found["curves"]["test"]["round"][0] == 1
    assert found["curves"]["test"]["round"][-1] == 20_000
    assert len(document({"run": found})) < 250_000


# --- the server -----------------------------------------------------------------------------------

Ask = Callable[..., tuple[HTTPResponse, bytes]]


@pytest.fixture
def ask(root: Path) -> Iterator[Ask]:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Runs(root))
    served = server(
        ("127.0.0.1", 0), lambda query: data(root, query), lambda: generate_latest(registry)
    )
    thread = Thread(target=served.serve_forever, args=[0.01])
    thread.start()

    def get(path: str, method: str = "GET", **headers: str) -> tuple[HTTPResponse, bytes]:
        line = HTTPConnection("127.0.0.1", served.server_port, timeout=30)
        try:
            line.request(method, path, headers=headers)
            answer = line.getresponse()
            return answer, answer.read()
        finally:
            line.close()

    yield get
    served.shutdown()
    served.server_close()
    thread.join()


def test_page_data_and_their_headers(ask: Ask, root: Path) -> None:
    answer, body = ask("/")
    assert (answer.status, body.decode()) == (200, document())
    assert answer.headers["Content-Security-Policy"] == policy() + "; frame-ancestors 'none'"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "unsafe" not in policy()
    listed = json.loads(ask("/data")[1])["runs"]
    assert [each["name"] for each in listed] == list(runs(root))
    name = next(each["name"] for each in listed if "dmsgd" in each["name"])
    assert json.loads(ask(f"/data?run={name}")[1])["run"]["method"] == "dmsgd"
    assert ask("/", "HEAD")[1] == b""


@pytest.mark.parametrize(
    "path",
    [
        "/data?run=..",
        "/data?run=../" + "x",
        "/data?run=%2Fetc",
        "/data?run=comparison/..",
        "/data?run=.",
        "/data?run=",
        "/../../etc/passwd",
        "/config.toml",
        "//etc/passwd",
    ],
)
def test_nothing_but_runs_is_told(ask: Ask, path: str) -> None:
    answer, body = ask(path)
    assert (answer.status, body) == (404, b"there is no such page\n")


def test_folder_that_is_no_runs_does_not_hide_the_others(ask: Ask, root: Path) -> None:
    other = root / "other"
    other.mkdir()
    (other / "metrics.csv").write_text("epoch,value\n1,2\n")
    try:
        assert [each["name"] for each in json.loads(ask("/data")[1])["runs"]] == [
            name for name in runs(root) if name != "other"
        ]
        answer, body = ask("/data?run=other")
        assert (answer.status, body) == (500, b"KeyError: 'split'\n")
        assert ask("/metrics")[0].status == 200
    finally:
        shutil.rmtree(other)


def test_links_lead_nowhere(root: Path, tmp_path: Path) -> None:
    inside = tmp_path / "runs"
    inside.mkdir()
    (inside / "link").symlink_to(root, target_is_directory=True)
    assert runs(inside) == {}


def test_only_reading_and_only_by_a_loopback_name(ask: Ask) -> None:
    assert ask("/data", "POST")[0].status == 501
    assert ask("/data", Host="evil.example:8080")[0].status == 403
    assert ask("/data", Host="localhost:1")[0].status == 200


def test_prometheus_metrics(ask: Ask, root: Path) -> None:
    answer, body = ask("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    found = {
        (sample.name, sample.labels.get("site"), sample.labels.get("direction")): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }
    newest = overview(next(iter(runs(root).values())))
    assert found["archipelago_round", None, None] == newest["round"]
    assert found["archipelago_run_up", None, None] == 0
    assert found["archipelago_site_up", "0", None] == 0
    assert found["archipelago_bytes_total", "1", "up"] == newest["sites"][1]["up"]
    assert found["archipelago_headline", "all", None] == newest["now"]["test"]["accuracy"]


def test_prometheus_counts_what_is_refused_of_each_site_by_rule(root: Path, tmp_path: Path) -> None:
    folder = next(folder for name, folder in runs(root).items() if "fedavg" in name)
    shutil.copytree(folder, tmp_path / "one")
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Runs(tmp_path))
    families = {
        each.name: each
        for each in text_string_to_metric_families(generate_latest(registry).decode())
    }
    counts = {
        sample.labels["site"]: sample.value for sample in families["archipelago_refused"].samples
    }
    (site,) = (each for each in overview(folder)["sites"] if each["refused"])
    assert counts == {str(site["site"]): sum(site["refused"].values())}


def test_event_log_that_cannot_be_written_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, write, lost = 0, os.write, 0

    def full(file: int, data: bytes) -> int:
        nonlocal lost
        if 3 < count < 8 and b'"kind"' in data:
            lost += 1
            raise OSError(28, "No space left on device")
        return write(file, data)

    def spoil(site: int, message: Message, content: RecordDict) -> Answer:
        nonlocal count
        count += message.metadata.message_type == "train"
        return content

    monkeypatch.setattr(os, "write", full)
    folder = folder_of(tmp_path, spoil)
    kinds = [
        json.loads(line)["kind"] for line in (folder / "events.jsonl").read_text().splitlines()
    ]
    assert lost
    assert kinds == ["began", *["progress"] * 4, "ended"]


def test_every_metric_of_the_dashboard_is_exported(root: Path, tmp_path: Path) -> None:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Runs(root))
    site = SiteFile.model_validate(
        {
            "site": 0,
            "socket": "s",
            "data": {"source": "digits"},
            "state": str(tmp_path),
            "privacy": {"clip-norm": 1.0, "noise-multiplier": 8.0, "epsilon": 8.0},
        }
    )
    registry.register(Status(site, (1, 1), {}, lambda: ("", 0.0)))
    exported = set(re.findall(r"^# HELP (\w+)", generate_latest(registry).decode(), re.MULTILINE))
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    used = {name for each in expressions for name in re.findall(r"archipelago_\w+", each)}
    assert used
    assert used <= exported
