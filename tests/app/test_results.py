"""What a run writes, whatever becomes of its folder, and whatever names its sites chose."""

import json
import logging
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import pytest
from flwr.app import Error, Message, RecordDict
from safetensors.torch import load_file

from configuration.config import Config, configuration
from configuration.errors import ConfigError
from server_app import results
from server_app.app import run
from server_app.discovery import RunError
from server_app.events import EVERYBODY, Ended, Event
from server_app.overview import read_metrics
from server_app.results import Folder, History, class_counts
from tests.app.stubs import NETWORK, Answer, Sites, Spoil, card, config_of_run, only, written
from tests.app.stubs import outcome as in_memory

mpl.use("agg")


def in_round(number: int, act: Callable[[], object]) -> Spoil:
    """Something happens while the sites train for the so-manieth time."""
    count = 0

    def spoil(site: int, message: Message, content: RecordDict) -> Answer:
        nonlocal count
        if site == 0 and message.metadata.message_type == "train":
            count += 1
            if count == number:
                act()
        return content

    return spoil


def whole(folder: Path, config: Config) -> None:
    """All that a run without any disturbance leaves."""
    undisturbed = in_memory(config)
    pd.testing.assert_frame_equal(read_metrics(folder / "metrics.csv"), undisturbed.metrics)
    assert load_file(folder / "model.safetensors").keys() == undisturbed.models["model"].keys()
    assert {"config.toml", "sites.csv", "curves.png", "schedule.png"} <= {
        file.name for file in folder.iterdir()
    }


def test_folder_that_is_deleted_is_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of_run(tmp_path)
    written(config, in_round(3, lambda: shutil.rmtree(only(tmp_path / "runs"))))
    whole(only(tmp_path / "runs"), config)


def test_folder_that_is_moved_away_stays_as_it_was(tmp_path: Path) -> None:
    config = config_of_run(tmp_path)
    moved = tmp_path / "moved"
    written(config, in_round(3, lambda: only(tmp_path / "runs").rename(moved)))
    whole(only(tmp_path / "runs"), config)
    assert read_metrics(moved / "metrics.csv")["round"].max() == 2


def test_rows_that_are_deleted_are_written_again(tmp_path: Path) -> None:
    config = config_of_run(tmp_path)
    written(config, in_round(3, lambda: (only(tmp_path / "runs") / "metrics.csv").unlink()))
    whole(only(tmp_path / "runs"), config)


def block(folder: Path) -> None:
    """Nothing can be written where the folder was."""
    path = only(folder)
    shutil.rmtree(path)
    path.write_text("no folder")


def test_run_whose_results_cannot_be_written_goes_on_in_memory_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of_run(tmp_path, patience_s=0)
    found = Folder(config)
    with pytest.raises(RunError, match="the results cannot be written: "):
        run(Sites(config, in_round(2, lambda: block(tmp_path / "runs"))), config, found)
    assert "the run goes on in memory, and this is tried again" in caplog.text
    pd.testing.assert_frame_equal(found.metrics, in_memory(config).metrics)
    assert found.models["model"]


def test_what_could_not_be_written_is_written_at_the_end(tmp_path: Path) -> None:
    """Nothing can be when the last model is there; and can again while it is tested."""
    config = config_of_run(tmp_path)
    act = in_round(4, lambda: block(tmp_path / "runs"))

    def spoil(site: int, message: Message, content: RecordDict) -> Answer:
        act(site, message, content)
        if message.metadata.message_type == "evaluate":
            for path in (tmp_path / "runs").glob("*"):
                if path.is_file():
                    path.unlink()
        return content

    written(config, spoil)
    whole(only(tmp_path / "runs"), config)


def test_run_that_is_over_waits_until_its_results_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files take 100 bytes more from the last round on, until the run says that it waits."""
    monkeypatch.setattr(results, "TRY_EVERY_S", 0.0)
    flower, limits = logging.getLogger("flwr"), resource.getrlimit(resource.RLIMIT_FSIZE)
    found = Folder(config := config_of_run(tmp_path))
    left = list[str]()

    def limit() -> None:
        metrics = only(tmp_path / "runs") / "metrics.csv"
        resource.setrlimit(resource.RLIMIT_FSIZE, (metrics.stat().st_size + 100, limits[1]))

    def unlimit(record: logging.LogRecord) -> bool:
        if "waits until its results can be written" in record.getMessage():
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            left.extend(path.name for path in found.path.iterdir())
        return True

    flower.addFilter(unlimit)
    try:
        run(Sites(config, in_round(4, limit)), config, found)
    finally:
        flower.removeFilter(unlimit)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "checkpoints" in left
    whole(found.path, config)
    assert not (found.path / "checkpoints").exists()
    lines = (found.path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["began", *["progress"] * 4, "ended"]


def test_what_stopped_a_run_is_not_hidden_by_what_cannot_be_written(tmp_path: Path) -> None:
    config = config_of_run(tmp_path)
    act = in_round(2, lambda: block(tmp_path / "runs"))
    count = 0

    def spoil(site: int, message: Message, content: RecordDict) -> Answer:
        nonlocal count
        act(site, message, content)
        count += message.metadata.message_type == "train"
        return (
            Error(2, "out of memory")
            if message.metadata.message_type == "train" and count > 6
            else content
        )

    with pytest.raises(RunError, match=r"round 3: 0 sites sent a model .* out of memory"):
        written(config, spoil)


def test_error_in_a_sink_at_the_end_does_not_hide_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of_run(tmp_path)

    def sink(event: Event) -> None:
        if isinstance(event, Ended):
            raise TypeError("of the sink")

    def fail(site: int, message: Message, content: RecordDict) -> Answer:
        return Error(2, "out of memory") if message.metadata.message_type == "train" else content

    with pytest.raises(RunError, match="out of memory"):
        run(Sites(config, fail), config, sink)
    assert "TypeError: of the sink" in caplog.text


def test_row_that_was_cut_off_is_no_row(tmp_path: Path) -> None:
    written(config := config_of_run(tmp_path), lambda site, message, content: content)
    file = only(tmp_path / "runs") / "metrics.csv"
    text, table = file.read_text(), in_memory(config).metrics
    for length in range(len(text) - 200, len(text)):
        file.write_text(text[:length])
        found = read_metrics(file)
        assert len(found) == text[:length].count("\n") - 1
        pd.testing.assert_frame_equal(found, table[: len(found)])


def test_rows_of_an_event_are_written_in_one_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looks at the file at any time finds whole rows, whatever their number."""
    sizes: list[bytes] = []

    def look(site: int, message: Message, content: RecordDict) -> Answer:
        if message.metadata.message_type == "train":
            sizes.append((only(tmp_path / "runs") / "metrics.csv").read_bytes())
        return content

    written(config_of_run(tmp_path, num_sites=30), look)
    assert all(data.endswith(b"\n") for data in sizes)
    assert len(set(sizes)) == 4


def test_model_is_on_the_disk_before_it_takes_the_place_of_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.extend(
            ["fsync"]
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith("model.partial")
            else []
        )
        fsync(descriptor)

    def replaced(source: Any, target: Any) -> None:
        done.extend(["replace"] if str(target).endswith(".safetensors") else [])
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    written(config_of_run(tmp_path, epochs=1), lambda site, message, content: content)
    assert done == ["fsync", "replace"]


@pytest.mark.parametrize("folder", ["\0", "~nobodyhere/x", "/proc/runs"])
def test_folder_that_cannot_be_is_an_error_that_names_the_key(folder: str) -> None:
    with pytest.raises(ConfigError, match=r"results\.folder = .*: nothing can be written there"):
        Folder(configuration(results={"folder": folder}))


NAMES = [
    "[/]",
    "[/foo]",
    "[bold]x",
    "$x_$",
    r"$\foo$",
    "=1+1",
    "@SUM(A1)",
    "-1",
    "+49 30",
    "name",
    "site",
    "x" * 64,
    "a,b\"c'",
]


@pytest.mark.parametrize("strategy", ["fedavg", "d-psgd"])
def test_names_that_sites_choose_do_no_harm(
    strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As names of sites and of classes, in tables, pictures and files.

    A matplotlib that fails would end the run.
    """
    small: dict[str, Any] = {
        "num_sites": len(NAMES),
        "epochs": 1,
        "model": {"name": NETWORK},
        "training.batch-size": 8,
    }
    own: dict[str, Any] = {"fedavg.local-epochs": 1} if strategy == "fedavg" else {}
    config = configuration(
        strategy=strategy, **small | own | {"results.folder": str(tmp_path / "runs")}
    )

    def named(site: int, message: Message, content: RecordDict) -> Answer:
        if message.metadata.message_type != "query.site":
            return content
        classes = [NAMES[site], NAMES[(site + 1) % len(NAMES)]]
        content.config_records["config"].update(
            card(config, site).named() | {"name": NAMES[site], "classes": classes}
        )
        return content

    found = written(config, named)
    printed = capsys.readouterr().out
    for name in NAMES:
        assert name[:20] in printed
    assert list(class_counts(found.sites).index) == NAMES
    folder = only(tmp_path / "runs")
    assert (folder / "sites.png").stat().st_size > 10_000
    sites = (folder / "sites.csv").read_text()
    assert "'=1+1" in sites
    assert "'@SUM(A1)" in sites
    assert "'-1" not in sites  # a number
    assert ",'+49 30," in sites
    assert pd.read_csv(folder / "sites.csv").shape == found.sites.shape
    assert set(found.metrics["site"]) == {*map(str, range(len(NAMES))), EVERYBODY}


def test_history_is_a_sink(tmp_path: Path) -> None:
    config = config_of_run(tmp_path)
    found = History(config)
    run(Sites(config), config, found)
    assert found.metrics["round"].max() == 4
    assert [site.number for site in found.federation.sites] == [0, 1, 2]
