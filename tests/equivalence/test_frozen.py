"""What every file of ``conf/`` computed and sent before a rearrangement of the code.

It was that of the code around the formulas. ``frozen.json`` holds, for a short run in the
laboratory of each file, a hash of the final models, three projections of them and the bytes sent. A
hash holds on one kind of processor and release of torch only; elsewhere the projections are
compared. A change that is meant is written down by ``python -m tests.equivalence.test_frozen``, and
its commit says why.
"""

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from configuration.config import configuration
from datasets.sources import Examples
from simulation.laboratory import Run, simulate
from tests.data import write_audio, write_texts

ROOT = Path(__file__).parent.parent.parent
FROZEN = Path(__file__).parent / "frozen.json"
CONF = sorted(path.stem for path in (ROOT / "conf").glob("*.toml"))
SHORT: dict[str, Any] = {"epochs": 1, "progress": False}
PICTURES = "tests.equivalence.test_frozen:pictures"


def pictures(path: str) -> Examples:
    """80 pictures in place of data sets that are read from a path.

    The last 20 are the official test part.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (80, 1, 28, 28), dtype=torch.uint8, generator=generator)
    return Examples(x, torch.arange(80) % 10, tuple("0123456789"), test=torch.arange(80) >= 60)


def write_data(folder: Path) -> dict[str, dict[str, Any]]:
    """Small files for the configurations that read files; what to change in each configuration."""
    generator = np.random.default_rng(1)
    (folder / "heart").mkdir(parents=True)
    for hospital in "abcd":
        rows = generator.normal(size=(24, 4)).round(3)
        lines = [",".join(map(str, row)) + f",{int(row[0] + row[1] > 0)}" for row in rows]
        (folder / "heart" / f"{hospital}.csv").write_text(
            "age,bp,chol,rate,target\n" + "\n".join(lines)
        )
    write_audio(folder / "audio")
    write_texts(folder / "text.csv")
    return {
        "heart": {"data.path": str(folder / "heart")},
        "audio": {"data.path": str(folder / "audio")},
        "text": {"data.path": str(folder / "text.csv")},
        "language": {"data.path": str(folder / "text.csv"), "num-sites": 2, "data.context": 16},
        "cifar10": {"data.source": PICTURES},
        "fashion-mnist": {"data.source": PICTURES},
    }


def fingerprint(run: Run) -> dict[str, Any]:
    """Hashes of the final models and of what was sent."""
    vectors = [
        value.double().reshape(-1) for model in run.models.values() for value in model.values()
    ]
    whole = torch.cat(vectors) if vectors else torch.zeros(1, dtype=torch.float64)
    places = torch.arange(1, len(whole) + 1, dtype=torch.float64)
    projections = [
        float(whole.norm()),
        float(whole @ places.sin()),
        float(whole @ places.sqrt().cos()),
    ]
    digest = hashlib.sha256(
        b"".join(_bytes(value) for model in run.models.values() for value in model.values())
    )
    last = run.metrics[run.metrics["site"] == "all"].iloc[-1]
    return {
        "sha256": digest.hexdigest(),  # of nothing where peers keep their models to themselves
        "projections": projections,
        "accuracy": run.summary.get(run.headline),
        "bytes": int(last["bytes_up"] + last["bytes_down"]),
    }


def _bytes(value: Tensor) -> bytes:
    return value.contiguous().numpy().tobytes()


def machine() -> str:
    """The machine and library versions for which hashes hold."""
    return (
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} torch {torch.__version__}"
    )


def short_run(name: str, changes: dict[str, Any]) -> Run:
    """A run of a file of ``conf/``, as short as it can be."""
    conf = f"conf/{name}.toml"
    config = configuration(conf)
    one = {f"{config.method.table}.local-epochs": 1} if hasattr(config.keys, "local_epochs") else {}
    return simulate(conf, **(SHORT | one | changes))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", CONF)
def test_file_of_conf_computes_and_sends_what_it_did(
    name: str, data: dict[str, dict[str, Any]]
) -> None:
    frozen = json.loads(FROZEN.read_text())
    wanted, found = frozen["runs"][name], fingerprint(short_run(name, data.get(name, {})))
    assert found["bytes"] == wanted["bytes"]
    assert found["accuracy"] == pytest.approx(wanted["accuracy"], abs=1e-3)
    if machine() == frozen["machine"]:
        assert found["sha256"] == wanted["sha256"]
    np.testing.assert_allclose(found["projections"], wanted["projections"], rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        changes = write_data(Path(folder))
        runs = {name: fingerprint(short_run(name, changes.get(name, {}))) for name in CONF}
    before = json.loads(FROZEN.read_text())["runs"]
    for name, found in runs.items():  # the last digits of projections depend on threads
        if (old := before.get(name)) and all(
            old[key] == found[key] for key in ("sha256", "bytes", "accuracy")
        ):
            runs[name] = old
    FROZEN.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n")
