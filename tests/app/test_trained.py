"""What a run leaves is used without the run: loaded, asked for predictions, exported."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from configuration.description import Description
from datasets.sources import SourceError, digits
from simulation.laboratory import Run, simulate
from simulation.trained import Trained, load, write_program
from tests.conftest import ROOT
from tests.data import write_audio, write_texts
from tests.networks import language

SHORT: dict[str, Any] = {"num_sites": 2, "epochs": 2, "model": {"name": "mlp"}, "progress": False}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(**SHORT).save(tmp_path_factory.mktemp("run"))


def write_table(folder: Path) -> Path:
    """Who is older is ill; a tenth of the heights is missing."""
    generator = np.random.default_rng(1)
    frame = pd.DataFrame(
        {"age": generator.uniform(20, 90, 200), "height": generator.normal(170, 9, 200)}
    )
    frame["ill"] = np.where(frame["age"] > 55, "yes", "no")
    frame.loc[::10, "height"] = np.nan
    frame.to_csv(folder / "table.csv", index=False)
    return folder / "table.csv"


def test_network_is_that_of_the_run(pictures: Path) -> None:
    trained, examples = load(pictures), digits()
    assert trained.classes == examples.classes
    with torch.no_grad():
        right = (trained(examples.x).argmax(1) == examples.y).float().mean()
    assert abs(float(right) - Run.load(pictures).summary["accuracy"]) < 0.05
    assert right > 0.8


def test_predictions_of_pictures_have_their_files_names(pictures: Path, tmp_path: Path) -> None:
    examples = digits()
    for number in range(12):
        Image.fromarray(examples.x[number, 0].numpy()).save(tmp_path / f"{number:02}.png")
    table = load(pictures).predict(tmp_path)
    assert list(table.columns) == ["example", "class", *examples.classes]
    assert table["example"].tolist() == [str(tmp_path / f"{number:02}.png") for number in range(12)]
    assert (table["class"] == [str(int(y)) for y in examples.y[:12]]).mean() > 0.7
    np.testing.assert_allclose(table[list(examples.classes)].sum(axis=1), 1, atol=1e-5)
    one = load(pictures).predict(tmp_path / "03.png")
    assert one["class"].tolist() == table["class"].tolist()[3:4]


def test_tables_are_standardised_as_in_the_run_and_need_no_label(tmp_path: Path) -> None:
    file = write_table(tmp_path)
    run = simulate(
        **SHORT | {"epochs": 16}, data={"source": "csv", "path": str(file), "label": "ill"}
    )
    trained, frame = load(run.save(tmp_path / "run")), pd.read_csv(file)
    frame[["height", "age"]].to_csv(tmp_path / "new.csv", index=False)  # in another order
    table = trained.predict(tmp_path / "new.csv")
    assert (table["class"] == frame["ill"]).mean() > 0.9
    frame.to_parquet(tmp_path / "new.parquet")  # another kind of table
    assert trained.predict(tmp_path / "new.parquet").equals(table)
    with pytest.raises(SourceError, match="there are no columns height"):
        trained.predict(_written(tmp_path / "less.csv", frame[["age"]]))


def _written(file: Path, frame: pd.DataFrame) -> Path:
    frame.to_csv(file, index=False)
    return file


def test_sounds_and_texts(tmp_path: Path) -> None:
    write_audio(tmp_path / "audio")
    write_texts(tmp_path / "text.csv")
    sounds = simulate(**SHORT, data={"source": "audio-folder", "path": str(tmp_path / "audio")})
    texts = simulate(
        **SHORT, data={"source": "text-csv", "path": str(tmp_path / "text.csv"), "text_buckets": 64}
    )
    predicted = load(sounds.save(tmp_path / "sounds")).predict(tmp_path / "audio")
    assert len(predicted) == len(list((tmp_path / "audio").rglob("*.wav")))
    read = load(texts.save(tmp_path / "texts")).predict(tmp_path / "text.csv")
    assert len(read) == len(pd.read_csv(tmp_path / "text.csv"))


@pytest.mark.slow
def test_export_needs_nothing_of_this_program(tmp_path: Path) -> None:
    file = write_table(tmp_path)
    run = simulate(**SHORT, data={"source": "csv", "path": str(file), "label": "ill"})
    folder = run.save(tmp_path / "run")
    command = [
        sys.executable,
        "-m",
        "simulation.trained",
        str(folder),
        str(file),
        "--export",
        str(tmp_path / "net.pt2"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    printed = pd.read_csv(StringIO(done.stdout))
    code = (
        "import sys, torch; x = torch.tensor([[30.0, float('nan')], [80.0, 170.0], [60.0, 180.0]]);"
    )
    code += "print(torch.export.load(sys.argv[1]).module()(x).softmax(1).tolist())"
    alone = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "net.pt2")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    trained = load(folder)
    with torch.no_grad():
        wanted = trained(
            torch.tensor([[30.0, float("nan")], [80.0, 170.0], [60.0, 180.0]])
        ).softmax(1)
    np.testing.assert_allclose(np.array(eval(alone.stdout)), wanted.numpy(), atol=1e-6)
    assert printed.equals(
        pd.read_csv(StringIO(trained.predict(file).to_csv(index=False, float_format="%.4f")))
    )


def agrees(network: nn.Module, examples: torch.Tensor, file: Path) -> None:
    """ONNX Runtime, with the file alone, agrees with the network on one example and on several."""
    session = pytest.importorskip("onnxruntime").InferenceSession(file)
    with torch.no_grad():
        for x in (examples[:1], examples):
            (logits,) = session.run(None, {"examples": x.numpy()})
            np.testing.assert_allclose(logits, network(x).numpy(), atol=1e-5)


def test_export_of_language_takes_tokens(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("the cat sat on the mat. " * 40)
    data = {"source": "text-bytes", "path": str(tmp_path / "texts.txt"), "context": 16}
    keys = SHORT | {
        "data": data,
        "model": {"name": "gpt", "layers": 1, "width": 16},
        "training": {"task": "language"},
    }
    trained, tokens = load(simulate(**keys).save(tmp_path / "run")), torch.randint(256, (3, 16))
    trained.export(tmp_path / "network.pt2")
    program = torch.export.load(tmp_path / "network.pt2").module()
    torch.testing.assert_close(program(tokens), trained(tokens))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporter
def test_onnx_of_pictures_tables_and_tokens(pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    file = tmp_path / "network.onnx"
    load(pictures).export(file)
    agrees(load(pictures), digits().x[:7], file)
    convolutional = load(simulate(**SHORT | {"model": {"name": "cnn"}}).save(tmp_path / "cnn"))
    convolutional.export(file)
    agrees(convolutional, digits().x[:7], file)
    table = {"source": "csv", "path": str(write_table(tmp_path)), "label": "ill"}
    ill = load(simulate(**SHORT, data=table).save(tmp_path / "table"))
    ill.export(file)
    agrees(ill, torch.tensor([[30.0, float("nan")], [80.0, 170.0], [60.0, 180.0]]), file)
    gpt, texts = language(), torch.randint(31, (3, 16))
    write_program(gpt, texts, file)
    agrees(gpt, texts, file)


@pytest.mark.skipif(find_spec("onnxscript") is not None, reason="it is installed")
def test_onnx_says_what_to_install(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"--export .*n\.onnx: .*onnxscript not installed: pip install onnx onnxscript; "
        r"or FILE.pt2",
    ):
        load(pictures).export(tmp_path / "n.onnx")


def test_what_is_no_model_is_named(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no model 'model-0': allowed: model"):
        load(pictures, "model-0")
    with pytest.raises(ValueError, match="allowed: it has none"):
        load(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=r"x.safetensors is no model of Archipelago"):
        load(tmp_path / "x.safetensors")


def test_models_of_sites_that_learn_alone_and_of_peers_are_loaded_by_their_names(
    tmp_path: Path,
) -> None:
    folder = simulate(**SHORT | {"strategy": "d-psgd"}).save(tmp_path)
    trained = load(folder, "model-1")
    assert isinstance(trained, Trained)
    assert trained.description == Description.read(folder / "model-0.safetensors")


def test_folders_of_before_models_said_what_they_are_are_still_read_and_written(
    pictures: Path, tmp_path: Path
) -> None:
    older = Path(shutil.copytree(pictures, tmp_path / "older"))
    save_file(load_file(older / "model.safetensors"), older / "model.safetensors")
    run = Run.load(older)
    assert run.description is None
    assert run.models.keys() == {"model"}
    assert Run.load(run.save(tmp_path / "again")).models.keys() == {"model"}
    with pytest.raises(ValueError, match="is no model of Archipelago: KeyError"):
        load(older)
