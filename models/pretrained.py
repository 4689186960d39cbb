"""Networks that start from parameters in a file, and of which only some are trained."""

from fnmatch import fnmatchcase
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

SHOWN = 6  # names in a message


def start_from(network: nn.Module, path: str) -> str:
    """Take over what a safetensors file holds under the network's own names.

    What does not fit is said. A tensor of another shape, such as the last layer's for another
    number of classes, stays as it was initialised.

    Raises:
        ValueError: it cannot be read, or nothing of it fits.
    """
    setting = f"model.initial = {path!r}"
    try:
        found = load_file(Path(path).expanduser())
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{setting}: {error}") from None
    own = network.state_dict()
    fitting = {
        name: value
        for name, value in found.items()
        if name in own and value.shape == own[name].shape
    }
    if not fitting:
        raise ValueError(
            f"{setting}: nothing of it fits; the network has {_some(list(own))}, "
            f"the file {_some(list(found))}"
        )
    network.load_state_dict(fitting, strict=False)
    other = [name for name in found if name in own and name not in fitting]
    kinds = {
        "left as initialised, not in the file": [name for name in own if name not in found],
        "of another shape, left as initialised": other,
        "in the file, but not in the network": [name for name in found if name not in own],
    }
    parts = [f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds.items() if names]
    return "; ".join([f"{setting}: {len(fitting)} of {len(own)} tensors taken", *parts])


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def freeze(network: nn.Module, trainable: str) -> None:
    """Train only parameters whose name matches one of the shell patterns ``trainable``.

    An example of these is ``"fc.* layer4.*"``. BatchNorm that is not trained keeps its running
    statistics and uses them in training, too: the network's frozen part computes the same at all
    sites.

    Raises:
        ValueError: a pattern matches no parameter.
    """
    names = [name for name, _ in network.named_parameters()]
    patterns = trainable.split()
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"model.trainable = {trainable!r}: {pattern!r} matches no parameter; "
                f"there are {_some(names)}"
            )
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in patterns))
    for module in network.modules():
        if is_frozen(module):
            module.register_forward_pre_hook(_freeze_statistics)


def is_frozen(module: nn.Module) -> bool:
    """Whether a layer has parameters of its own, none of which is trained."""
    own = list(module.parameters(recurse=False))
    return bool(own) and not any(parameter.requires_grad for parameter in own)


def _freeze_statistics(module: nn.Module, _: tuple[torch.Tensor, ...]) -> None:
    if any(True for _ in module.buffers(recurse=False)):
        module.training = False


def digest(path: str) -> str:
    """SHA-256 of a file: sites that train a part of a network must have the rest from the same one.

    Raises:
        ValueError: there is none.
    """
    try:
        file = Path(path).expanduser()
        found = file.stat()
        if not file.is_file():  # some devices never end
            raise OSError("no file")
        return _digest(file, found.st_size, found.st_mtime_ns)
    except (OSError, RuntimeError, ValueError) as error:  # also a zero byte
        raise ValueError(f"model.initial = {path!r}: {error}") from None


@lru_cache(maxsize=4)
def _digest(file: Path, size: int, changed: int) -> str:
    whole = sha256()
    with file.open("rb") as opened:
        while part := opened.read(2**24):
            whole.update(part)
    return whole.hexdigest()
