"""Peers in Flower's own simulation.

A real ``flwr run`` of DMSGD and of compressed, sealed Q-SADDLe.
"""

from pathlib import Path

import pytest
import torch

from simulation.laboratory import Run, simulate
from tests.e2e.conftest import Make

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("name", ["dmsgd", "q-saddle-compressed"])
def test_flwr_run_of_peers_is_what_the_laboratory_runs(
    name: str,
    make: Make,
    tmp_path: Path,
) -> None:
    done = make("run", f"RESULTS={tmp_path}", f"CONF=conf/{name}.toml", "SET=epochs=1 num-sites=4")
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = tmp_path.iterdir()
    real, here = (
        Run.load(folder),
        simulate(f"conf/{name}.toml", epochs=1, num_sites=4, progress=False),
    )
    assert f"test accuracy {real.summary['accuracy']:.4f}" in done.stdout
    assert (folder / "topology.png").stat().st_size > 10_000
    assert list(real.history["accuracy"]) == list(here.history["accuracy"])
    assert list(real.history["round"]) == list(here.history["round"])
    assert (
        set(real.models)
        == set(here.models)
        == (set() if "saddle" in name else {f"model-{site}" for site in range(4)})
    )
    for peer, model in here.models.items():
        for key, value in model.items():
            torch.testing.assert_close(real.models[peer][key], value, rtol=0, atol=1e-6)
