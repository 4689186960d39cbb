"""Every task in runs of the app, from files to a model that is used."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from configuration.config import configuration
from configuration.errors import ConfigError
from server_app.discovery import RunError
from simulation.laboratory import compare, simulate
from simulation.trained import load
from tests.conftest import RunApp
from tests.data import squares, write_numbers

QUIET: dict[str, Any] = {"num_sites": 3, "progress": False, "model": {"name": "mlp"}}


def table(path: Path, label: str, task: str, **keys: Any) -> dict[str, Any]:
    return QUIET | {
        "data": {"source": "csv", "path": str(path), "label": label},
        "training": {"task": task, **keys},
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    write_numbers(path := tmp_path_factory.mktemp("data") / "table.csv")
    return path


@pytest.mark.parametrize("strategy", ["co-learning", "gsgm", "dmsgd"])
def test_a_number_is_predicted_in_its_own_unit(strategy: str, file: Path, tmp_path: Path) -> None:
    """Of a deviation of 12.4, noise of deviation 2 cannot be predicted."""
    run = simulate(strategy=strategy, epochs=24, **table(file, "pressure", "regression"))
    summary = run.summary
    assert 1.5 < summary["rmse"] < 5
    last = run.history.iloc[-1]
    assert last["mae"] < last["rmse"]
    assert last["r2"] > 0.8
    trained = load(run.save(tmp_path / "run"), "model-0" if strategy == "dmsgd" else "model")
    frame = pd.read_csv(file)
    frame[["age", "height", "pulse", "old", "tall"]].to_csv(tmp_path / "new.csv", index=False)
    predicted = trained.predict(tmp_path / "new.csv")
    assert list(predicted.columns) == ["example", "pressure"]
    assert np.sqrt(np.mean((predicted["pressure"] - frame["pressure"]) ** 2)) == pytest.approx(
        summary["rmse"], rel=0.5
    )


def test_several_numbers_and_several_labels(file: Path, tmp_path: Path) -> None:
    run = simulate(
        epochs=8, results={"details": True}, **table(file, "pressure, pulse", "regression")
    )
    assert {"rmse", "rmse/pressure", "rmse/pulse", "mae/pulse", "r2"} <= set(run.history.columns)
    labels = simulate(epochs=24, **table(file, "old, tall", "multi-label"))
    with pytest.raises(
        ValueError, match=r"training.task = 'multi-label': examples have no classes to count"
    ):
        labels.plot_sites()
    assert labels.summary["f1-micro"] > 0.85
    table_of_probabilities = load(labels.save(tmp_path / "run")).predict(file)
    frame = pd.read_csv(file)
    assert ((table_of_probabilities["old"] > 0.5) == frame["old"]).mean() > 0.9


def test_one_class_is_said_to_be_nothing_to_learn(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    simulate(epochs=1, **table(file, "age > 0", "classification"))
    assert "all examples are of the class True: there is nothing to tell apart" in caplog.text


def test_pixels_are_classified(tmp_path: Path) -> None:
    keys: dict[str, Any] = QUIET | {
        "model": {"name": "unet"},
        "data": {"source": "tests.data:squares"},
    }
    run = simulate(
        epochs=4,
        fedavg={"local_epochs": 2},
        strategy="fedavg",
        training={"task": "segmentation"},
        **keys,
    )
    assert run.summary["mean-iou"] > 0.7
    trained, examples = load(run.save(tmp_path / "run")), squares("")
    with torch.no_grad():
        decided = trained(examples.x[:4]).argmax(1)
    assert (decided == examples.y[:4])[:, 1:].float().mean() > 0.85


def test_language_is_learnt_and_an_ensemble_is_better(tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text(
        "text,topic\n" + "the cat sat on the mat,pets\nbuy low and sell high,money\n" * 60
    )
    keys: dict[str, Any] = QUIET | {
        "num_sites": 2,
        "data": {
            "source": "text-bytes",
            "path": str(tmp_path / "texts.csv"),
            "group": "topic",
            "context": 16,
        },
        "partition": {"kind": "natural"},
        "model": {"name": "gpt", "layers": 1, "width": 32, "heads": 2},
        "training": {"task": "language", "optimizer": "adamw", "lr": 0.01},
    }
    strategies = {name: {"strategy": name} for name in ("fedavg", "ensemble")}
    apart = compare(strategies, seeds=1, epochs=12, fedavg={"local_epochs": 1}, processes=1, **keys)
    assert apart.runs["fedavg"][0].summary["bits-per-byte"] < 4
    last = apart.runs["ensemble"][0].history.iloc[-1]
    assert last["accuracy"] > last["accuracy-single"]
    assert list(apart.table().columns.unique(0))[:2] == ["bits-per-byte", "loss"]
    assert apart.table()["bits-per-byte"]["mean"].notna().all()


@pytest.mark.parametrize(
    ("strategy", "engine"),
    [
        *((strategy, "app") for strategy in ("fedavg", "local", "gsgm", "dmsgd")),
        *((strategy, "batched") for strategy in ("fedavg", "gsgm", "dmsgd")),
    ],
)
def test_metrics_of_each_class_are_told_on_demand(strategy: str, engine: str) -> None:
    run = simulate(strategy=strategy, engine=engine, epochs=4, results={"details": True}, **QUIET)
    last = run.history.iloc[-1]
    assert 0 < last["calibration-error"] < 0.5
    mean_recall = np.average([last[f"recall/{digit}"] for digit in range(10)])
    assert mean_recall == pytest.approx(last["accuracy"], abs=0.05)
    of_sites = run.metrics[(run.metrics["metric"] == "recall/3") & (run.metrics["split"] == "test")]
    assert set(of_sites["site"]) == {"0", "1", "2", "all"}


@pytest.mark.parametrize("strategy", ["d-psgd", "fedavg"])
def test_batched_engine_learns_numbers_as_the_app_does(file: Path, strategy: str) -> None:
    keys = {"strategy": strategy, "epochs": 2, **table(file, "pressure", "regression")}
    app, batched = (simulate(engine=engine, **keys).summary for engine in ("app", "batched"))
    assert batched["rmse"] == pytest.approx(app["rmse"], rel=1e-4)


def test_run_shows_the_tasks_own_metric(
    file: Path, run_app: RunApp, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {
        "data.source": "csv",
        "data.path": str(file),
        "data.label": "pressure",
        "training.task": "regression",
    }
    run_app(**keys, draw=True)
    output = capsys.readouterr().out
    assert "examples of csv (10,), 1 to predict" in output
    assert "| test rmse " in output
    assert "rmse" in output.rpartition("site")[0]


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"training.task": "regresion"}, "did you mean 'regression'"),
        (
            {"training.task": "examples.my_task:NOTHING"},
            "training.task = 'examples.my_task:NOTHING': it cannot be imported",
        ),
        (
            {"training.task": "models.tasks:IGNORED"},
            "training.task = 'models.tasks:IGNORED': a Task is expected, it is a int",
        ),
        (
            {"training.task": "language"},
            "training.task = 'language': not what data.source = 'digits' is for; allowed: 'classif",
        ),
        (
            {"training.task": "regression", "data.source": "csv", "partition.kind": "dirichlet"},
            (
                "partition.kind = 'dirichlet': examples of regression have no classes; allowed: "
                "iid, sizes, natural"
            ),
        ),
        (
            {
                "training.task": "segmentation",
                "data.source": "tests.data:squares",
                "data.augment": "flip-crop",
            },
            "maps are not flipped",
        ),
        (
            {"training.task": "language", "data.source": "text-bytes", "results.details": True},
            "results.details = True: has no effect with training.task = 'language'",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_a_site_is_asked(keys: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        configuration(**keys)
    assert text in str(error.value)


def test_data_of_another_task_are_refused_by_the_sites(file: Path) -> None:
    with pytest.raises(
        RunError,
        match=r"data.label = 'pressure' of .* holds more than 0 and 1, as training.task needs it",
    ):
        simulate(epochs=1, **table(file, "pressure", "multi-label"))
    with pytest.raises(
        RunError,
        match=r"'pressure' of .*: 240 different classes, .*; to predict a number: "
        r"training.task = 'regr",
    ):
        simulate(epochs=1, **table(file, "pressure", "classification"))
    for label, task in (("pressure pulse", "regression"), ("pressure, pulse", "classification")):
        with pytest.raises(
            RunError,
            match=r"to predict several columns: "
            r"data.label = 'pressure, pulse' with training.task = 'm",
        ):
            simulate(epochs=1, **table(file, label, task))
    with pytest.raises(
        RunError, match=r"numbers to predict come as a tensor y, not with each item"
    ):
        simulate(
            epochs=1,
            **QUIET
            | {"data": {"source": "tests.own_data:labelled"}, "training": {"task": "regression"}},
        )
    with pytest.raises(
        RunError, match=r"training.task needs y \[n\] int64, a class each; got y \(60, 16, 16\)"
    ):
        simulate(epochs=1, **QUIET | {"data": {"source": "tests.data:squares"}})
