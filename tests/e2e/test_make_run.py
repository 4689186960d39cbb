"""What a user types, through Flower's own processes: SuperLink, uv sync, Ray actors."""

import re
from pathlib import Path

import pandas as pd
import pytest
import torch

from simulation.laboratory import Run, simulate
from tests.e2e.conftest import Make
from tests.e2e.notebooks import execute_notebook

pytestmark = pytest.mark.e2e


def test_flwr_run_trains_the_model_that_the_laboratory_trains(make: Make, tmp_path: Path) -> None:
    done = make(
        "run", f"RESULTS={tmp_path / 'ray'}", "CONF=conf/fedavg.toml", "SET=epochs=4 seed=3"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "ray").iterdir()
    assert {file.name for file in folder.iterdir()} == {
        "config.toml",
        "events.jsonl",
        "metrics.csv",
        "report.html",  # of files that Flower's bundle carries
        "sites.csv",
        "model.safetensors",
        "curves.png",
        "schedule.png",
        "sites.png",
    }
    real = Run.load(folder)
    assert re.search(r"round +2 \| epoch 4/4 \(\+2\)", done.stdout)
    assert f"{real.summary['accuracy']:.4f}" in done.stdout
    assert f"results: {folder}" in done.stdout
    here = simulate("conf/fedavg.toml", epochs=4, seed=3, progress=False)
    for name, value in here.model.items():
        torch.testing.assert_close(real.model[name], value, rtol=0, atol=1e-6)
    assert list(real.history["accuracy"]) == list(here.history["accuracy"])
    assert list(real.history["bytes_up"]) == list(here.history["bytes_up"])
    pd.testing.assert_frame_equal(real.sites, here.sites)
    execute_notebook("read_results.ipynb", RUNS=str(tmp_path / "ray"))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "SET=training.lr=-1.0 num-sites=0",
            (
                "training.lr = -1.0: must be greater than or equal to 0\n"
                "num-sites = 0: must be greater than or equal to 1"
            ),
        ),
        ("SET=num-site=3", "num-site = 3: unknown key; did you mean 'num-sites'?"),
        ("SET=lr=0.1", "lr = 0.1: this key is now training.lr"),
        (
            "SET=gsgm.window=5",
            "gsgm.window = 5: strategy = 'co-learning' does not take it, only gsgm",
        ),
        ("SET=training.lr=high", "invalid format"),
        ("CONF=conf/nope.toml", "conf = 'conf/nope.toml': there is no such file"),
    ],
)
def test_wrong_configuration_is_named_and_nothing_is_started(
    make: Make, argument: str, message: str, tmp_path: Path
) -> None:
    failed = make("run", f"RESULTS={tmp_path / 'none'}", argument)
    assert failed.returncode != 0
    assert message in failed.stderr
    assert "flwr run" not in failed.stdout
    assert not (tmp_path / "none").exists()


def test_run_that_fails_fails_the_command(make: Make, tmp_path: Path) -> None:
    failed = make(
        "run", f"RESULTS={tmp_path / 'none'}", 'SET=data.source="csv" data.path="/nowhere"'
    )
    assert failed.returncode != 0
    reason = (
        "0 sites can take part, min-sites = 2. SourceError: data.path = '/nowhere': "
        "there is no such file or folder\n"
    )
    assert failed.stderr.partition("make: ***")[0].endswith(reason)
    assert "Error 3" in failed.stderr
    assert "Traceback" not in failed.stdout + failed.stderr
