"""What a file with a model says of itself, so that it can be used without the run that made it."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configuration.config import Config
from configuration.files import full_disk_is_os_error
from configuration.sections import Data, Model

KEY = "archipelago"  # in a safetensors file's metadata, which knows texts only


class Description(BaseModel):
    """A trained network, all but its parameters.

    Attributes:
        model, data: the run's sections: which network, and how its examples are read.
        shape: of an example, as the network takes it.
        classes: the names that its outputs count.
        columns: of a table.
        mean, variance: of these columns over all sites, and of the numbers to predict.
        task: what it was trained to do.
    """

    model_config = ConfigDict(frozen=True)

    model: Model
    data: Data
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    columns: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    variance: tuple[float, ...] = ()
    task: str = "classification"

    @classmethod
    def of(
        cls,
        config: Config,
        shape: Sequence[int],
        classes: Sequence[str],
        columns: Sequence[str],
        moments: Sequence[Sequence[float]],
    ) -> "Description":
        """The description of a run's models; ``moments`` are (known, mean, variance) or nothing."""
        _, mean, variance = moments or ((), (), ())
        return cls(
            model=config.model,
            data=config.data.model_copy(update={"path": ""}),
            shape=tuple(shape),
            classes=tuple(classes),
            columns=tuple(columns),
            mean=tuple(mean),
            variance=tuple(variance),
            task=config.training.task,
        )

    def metadata(self) -> dict[str, str]:
        """The description as metadata of a safetensors file."""
        return {KEY: json.dumps(self.model_dump(by_alias=True))}

    @classmethod
    def read(cls, file: Path) -> "Description":
        """What a file says of itself.

        Raises:
            ValueError: it is no file with a model of this program.
        """
        try:
            return cls.model_validate_json(_metadata(file)[KEY])
        except (OSError, SafetensorError, KeyError, ValidationError) as error:
            raise ValueError(
                f"{file} is no model of Archipelago: {type(error).__name__}: {error}"
            ) from None


def write_model(file: Path, state: Mapping[str, Tensor], description: Description | None) -> None:
    """Write a state dict, with its description in the file: all of it, or the file stays as it was.

    Raises:
        OSError: it cannot be written.
    """
    partial = file.with_suffix(".partial")
    # Safetensors makes a file that only its owner can read: keep the mode of this one.
    partial.touch()
    metadata = description.metadata() if description else None
    with full_disk_is_os_error():
        save_file({key: value.contiguous() for key, value in state.items()}, partial, metadata)
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    os.replace(partial, file)


def write_models(
    folder: Path, models: Mapping[str, Mapping[str, Tensor]], description: Description | None
) -> None:
    """Write each of the models, by its name, as :func:`write_model` does."""
    for name, state in models.items():
        write_model(folder / f"{name}.safetensors", state, description)


def is_described(file: Path) -> bool:
    """Whether a file with a model says what it is: those of older runs do not."""
    return KEY in _metadata(file)


def _metadata(file: Path) -> Mapping[str, str]:
    with safe_open(file, "pt") as opened:
        found: Mapping[str, str] = opened.metadata() or {}
    return found
