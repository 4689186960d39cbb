"""A run's model, ready to be used: ``load(folder)``, predictions of files, and an export.

    python -m simulation.trained RUN INPUT            CSV: each example's name, class, probabilities
    python -m simulation.trained RUN --export FILE    a program of torch.export, or ONNX (FILE.onnx)

The exported program takes examples as they are read, and needs none of this program.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from client_app.training import EVALUATION_BATCH, prepare
from configuration.config import task as find_task
from configuration.description import Description
from configuration.network import initialised
from datasets.errors import SourceError
from datasets.files import existing
from datasets.folders import PICTURES, pictures, spectrograms
from datasets.tables import unlabelled, unlabelled_text
from models.tasks import Task


class Trained(nn.Module):
    """A trained network that takes examples as a source reads them.

    Pictures are bytes, [n, channels, height, width]; tables [n, columns], NaN where a value is
    missing, are standardised here.

    Attributes:
        network: what was trained.
        description: what it was trained for.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, network: nn.Module, description: Description) -> None:
        super().__init__()
        self.network, self.description = network, description
        variance = torch.tensor(description.variance, dtype=torch.float64)
        self.register_buffer("mean", torch.tensor(description.mean, dtype=torch.float64))
        self.register_buffer(
            "deviation", torch.where(variance > 0, variance.sqrt(), torch.ones_like(variance))
        )

    @property
    def task(self) -> Task:
        """The task that the model was trained for."""
        return find_task(self.description.task)

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the outputs."""
        return self.description.classes

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of examples [n, ...]: logits, or numbers [n, numbers] in their own units."""
        if size := len(self.description.columns):
            x = torch.cat(
                [((x - self.mean[:size]) / self.deviation[:size]).nan_to_num(), x.isnan()], 1
            )
        outputs: Tensor = self.network(prepare(x))
        if self.task.target == "numbers":
            outputs = (outputs * self.deviation[size:] + self.mean[size:]).float()
        return outputs

    @torch.no_grad()
    def predict(self, source: str | Path) -> pd.DataFrame:
        """The class of each example of a file or of a folder's files, and each class's probability.

        For several labels, each one's probability; for numbers, these.

        Raises:
            SourceError: a file cannot be read as what this network was trained on; or its outputs
                fit in no table.
        """
        target = self.task.target
        if target in ("tokens", "map"):
            raise SourceError(
                f"training.task = {self.description.task!r}: no table holds its outputs; "
                "call the network itself"
            )
        names, x = self._read(existing(source))
        outputs = torch.cat([self(chunk) for chunk in x.split(EVALUATION_BATCH)])
        if target != "numbers":
            outputs = outputs.softmax(1) if target == "class" else outputs.sigmoid()
        table = pd.DataFrame(outputs.cpu().numpy(), columns=list(self.classes))
        if target == "class":
            table.insert(0, "class", table.idxmax(axis=1), allow_duplicates=True)
        table.insert(0, "example", names, allow_duplicates=True)
        return table

    def _read(self, path: Path) -> tuple[Sequence[str], Tensor]:
        known = self.description
        match known.data.source:
            case "csv" | "parquet" as source:
                x = unlabelled(
                    path,
                    known.columns,
                    path.suffix if path.suffix in (".csv", ".parquet") else f".{source}",
                )
            case "text-csv":
                x = unlabelled_text(path, known.data.text_buckets)
            case "audio-folder":
                files = _files(path, (".wav",))
                return list(map(str, files)), spectrograms(files, known.data.audio_seconds)
            case source if ":" in source:
                raise SourceError(
                    f"data.source = {source!r}: "
                    f"give examples [n, {known.shape}] of this function to "
                    "the network itself"
                )
            case _:
                files = _files(path, tuple(PICTURES))
                return list(map(str, files)), pictures(files, known.shape)
        return [str(row) for row in range(len(x))], x

    def export(self, file: str | Path) -> None:
        """Write a program that needs none of this code, see :func:`write_program`."""
        raw = (
            [len(self.description.columns)]
            if self.description.columns
            else list(self.description.shape)
        )
        kind = (
            torch.uint8
            if len(raw) == 3 and self.description.data.source != "audio-folder"
            else torch.float32
        )
        kind = torch.int64 if self.task.target == "tokens" else kind
        write_program(self, torch.zeros(2, *raw, dtype=kind), file)


def write_program(network: nn.Module, examples: Tensor, file: str | Path) -> None:
    """Write a network as a program for any number of examples.

    Args:
        network: what to write.
        examples: two or more like those that it will take.
        file: ONNX where it ends in .onnx, its input ``examples``, its output ``logits``; else for
            ``torch.export.load``.

    Raises:
        ValueError: what writes ONNX is not installed.
    """
    onnx = Path(file).suffix == ".onnx"
    if onnx and (missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]):
        raise ValueError(
            f"--export {file}: {' and '.join(missing)} not installed: "
            "pip install onnx onnxscript; or FILE.pt2"
        )
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(network.eval(), (examples,), dynamic_shapes=({0: batch},))
    if not onnx:
        torch.export.save(program, file)
        return
    torch.onnx.export(
        program,
        (),
        file,
        input_names=["examples"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )


def _files(path: Path, endings: tuple[str, ...]) -> list[Path]:
    files = (
        sorted(file for file in path.rglob("*") if file.suffix.lower() in endings)
        if path.is_dir()
        else [path]
    )
    if not files:
        raise SourceError(f"{path}: no file ends in {', '.join(endings)}")
    return files


def load(path: str | Path, name: str = "model") -> Trained:
    """The network of a run's folder, or of a file with a model.

    The file names the code of its network, which is imported: somebody else's file may name any
    module that is installed.

    Args:
        path: what ``flwr run``, :meth:`Run.save` or a peer's ``save`` wrote.
        name: of the model; ``model-0``, ... where sites learn alone.

    Raises:
        ValueError: there is no such model, or its network cannot be built.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        there = sorted(each.stem for each in file.glob("model*.safetensors"))
        if name not in there:
            raise ValueError(
                f"{file} has no model {name!r}: allowed: {', '.join(there) or 'it has none'}"
            )
        file /= f"{name}.safetensors"
    described = Description.read(file)
    task, classes = find_task(described.task), len(described.classes)
    network = initialised(described.model, described.data, task, described.shape, classes, 0)
    network.load_state_dict(load_file(file))
    return Trained(network, described).eval()


def main() -> None:
    """Print predictions as CSV, or export."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run's folder, or a file with a model")
    parser.add_argument(
        "input",
        nargs="?",
        help="a file or folder like those that it was trained on; labels are not needed",
    )
    parser.add_argument("--model", default="model", help="model-0, ... where sites learn alone")
    parser.add_argument(
        "--export",
        metavar="FILE",
        help="write a program of torch.export, or ONNX where it ends in .onnx",
    )
    arguments = parser.parse_args()
    if not (arguments.input or arguments.export):
        parser.error("INPUT or --export FILE is needed")
    try:
        trained = load(arguments.run, arguments.model)
        if arguments.export:
            trained.export(arguments.export)
        if arguments.input:
            # Numbers have units of their own.
            digits = "%.6g" if trained.task.target == "numbers" else "%.4f"
            trained.predict(arguments.input).to_csv(sys.stdout, index=False, float_format=digits)
    except ValueError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None


if __name__ == "__main__":
    main()
