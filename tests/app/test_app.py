"""The real ServerApp and ClientApp in one process.

Every way of learning, every kind of data, and what they leave behind.
"""

import tomllib
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from matplotlib.image import imread

from configuration.config import Config, configuration
from tests.conftest import RunApp, default_config


def test_metrics_are_tidy_and_read_in_one_line(run_app: RunApp) -> None:
    run = run_app(epochs=3, co_learning={"epsilon": 0.0})
    metrics = pd.read_csv(run.folder / "metrics.csv")
    assert list(metrics.columns) == [
        "round",
        "seconds",
        "bytes_up",
        "bytes_down",
        "site",
        "split",
        "metric",
        "value",
    ]
    assert not metrics.isna().any().any()
    assert not metrics.duplicated(["round", "site", "split", "metric"]).any()
    assert metrics["seconds"].is_monotonic_increasing
    assert set(metrics["site"]) == {"0", "1", "2", "all"}
    assert set(metrics[metrics["split"] == "test"]["metric"]) == {
        "accuracy",
        "loss",
        "num-examples",
    }
    accuracy = metrics.query("metric == 'accuracy' and round == 3").set_index("site")["value"]
    sizes = metrics.query("metric == 'num-examples' and round == 3 and split == 'test'").set_index(
        "site"
    )["value"]
    assert accuracy["all"] == pytest.approx(
        sum(accuracy[site] * sizes[site] for site in "012") / 360
    )


def test_bytes_are_one_vector_each_way_and_message(run_app: RunApp) -> None:
    run = run_app(epochs=2, co_learning={"epsilon": 0.0})
    model = 4 * sum(value.numel() for value in run.model.values())
    last = run.metrics.query("round == 2 and split == 'test' and site == 'all'").iloc[0]
    # Up: two models a site. Down: two for training, which test what came before, one for the last
    # test. The rest is metrics and configuration.
    assert 0 < last["bytes_up"] - 6 * model < 6 * 1000
    assert 0 < last["bytes_down"] - 9 * model < 9 * 1000


def test_folder_holds_the_configuration_that_runs_again(run_app: RunApp) -> None:
    run = run_app(epochs=1, training={"lr": 0.03})
    with (run.folder / "config.toml").open("rb") as file:
        config = tomllib.load(file)
    assert Config.read(config) == configuration(**config)
    assert config["training"]["lr"] == 0.03
    assert run.folder.is_absolute()


def test_two_runs_in_one_second_have_a_folder_each(run_app: RunApp) -> None:
    assert len({run_app(epochs=1, model={"name": "mlp"}).folder for _ in range(2)}) == 2


def test_pictures_are_drawn(run_app: RunApp) -> None:
    run = run_app(epochs=2, draw=True)
    for name in ("curves", "schedule", "sites"):
        picture = imread(run.folder / f"{name}.png")
        assert min(picture.shape[:2]) > 200
        assert len({tuple(pixel) for pixel in picture[::5, ::5].reshape(-1, picture.shape[2])}) > 10
    assert not list(run.folder.glob("*.partial"))


def test_progress_and_table_are_printed(
    run_app: RunApp, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_app(epochs=2, co_learning={"epsilon": 0.0})
    printed = capsys.readouterr().out
    assert (
        "co-learning: 3 sites, 1,437 training examples of digits (1, 8, 8) in 10 classes" in printed
    )
    assert "round   1 | epoch 1/2 (+1) | lr 0.05 to 0.014" in printed
    assert f"test accuracy {run.trace('accuracy')[-1]:.4f}" in printed
    assert f"│ {run.trace('accuracy')[-1]:>8.4f} │" in printed
    assert printed.rstrip().endswith(f"results: {run.folder}")


@pytest.mark.parametrize(
    "changes",
    [
        {"model.name": "resnet20", "model.norm": "group"},
        {"model.name": "cnn", "computing.precision": "bfloat16", "computing.channels-last": True},
        {
            "model.name": "cnn",
            "data.augment": "flip-crop",
            "training.clip-norm": 1.0,
            "training.nesterov": True,
        },
        {
            "model.name": "cnn",
            "partition.kind": "dirichlet-equal",
            "partition.alpha": 0.1,
            "training.lr-shape": "cosine",
            "training.lr-steps": "epoch",
        },
        {
            "model.name": "cnn",
            "training.sam-radius": 0.05,
            "training.optimizer": "adamw",
            "training.lr": 0.002,
            "training.lr-shape": "linear",
        },
    ],
    ids=str,
)
def test_switches_of_local_training_learn(changes: dict[str, Any], run_app: RunApp) -> None:
    losses = run_app(epochs=3, **changes).trace("loss", "train")
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_compiled_network_learns_the_same(run_app: RunApp) -> None:
    plain, compiled = (
        run_app(model={"name": "cnn"}, num_sites=2),
        run_app(model={"name": "cnn"}, computing={"compile": True}, num_sites=2),
    )
    assert compiled.trace("loss", "train") == pytest.approx(plain.trace("loss", "train"), rel=0.05)
    assert compiled.trace("loss", "train")[1] < compiled.trace("loss", "train")[0]


def test_table_with_natural_sites_is_named_after_its_files(
    run_app: RunApp, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:

    folder = tmp_path / "hospitals"
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    for shift, name in enumerate(("bern", "lyon", "oslo")):
        values = torch.randn(80, 2, generator=generator) + shift
        table = pd.DataFrame(
            {"a": values[:, 0], "b": values[:, 1], "sick": (values[:, 0] > values[:, 1]).long()}
        )
        table.loc[:5, "b"] = None
        table.to_csv(folder / f"{name}.csv", index=False)
    run = run_app(
        data={"source": "csv", "path": str(folder), "label": "sick"},
        partition={"kind": "natural"},
        training={"batch_size": 8},
        epochs=40,
    )
    assert run.trace("accuracy")[-1] > 0.85
    assert (
        "bern: of 80 rows, missing values in b (6): filled with the mean of all sites"
        in caplog.text
    )


def test_classes_that_only_some_sites_have_are_counted_alike(run_app: RunApp) -> None:
    """Four of ten classes a site: one that numbers its own from 0 is right on 0.4 at best."""
    run = run_app(
        partition={"kind": "classes", "classes_per_site": 4}, training={"lr": 0.02}, epochs=12
    )
    assert run.trace("accuracy")[-1] > 0.6


def test_relative_results_folder_is_made_absolute(
    run_app: RunApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    from client_app.app import app as client_app
    from server_app.app import app as server_app
    from simulation.grid import run_in_process

    run_in_process(
        server_app,
        client_app,
        2,
        default_config() | {"num-sites": 2, "epochs": 2, "model.name": "mlp"},
    )
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "model.safetensors").exists()
