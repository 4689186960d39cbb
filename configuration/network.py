"""The network of a run, and the codec for vectors of its size, as configured."""

from collections.abc import Sequence
from functools import lru_cache

from torch import nn

from configuration.config import Config
from configuration.sections import Data, Model, Wire
from models.checkpointing import checkpoint_blocks
from models.networks import build, hidden_matrices, num_parameters
from models.pretrained import freeze, start_from
from models.tasks import Task
from strategies.codecs import Codec, codec
from strategies.randomness import derive


def num_outputs(task: Task, data: Data, num_classes: int) -> int:
    """Classes, labels or numbers to predict; of language, the tokens that there are."""
    return data.vocabulary if task.target == "tokens" else num_classes


def initialised(
    model: Model, data: Data, task: Task, shape: tuple[int, ...], num_classes: int, seed: int
) -> nn.Module:
    """The network for examples of ``shape`` with random parameters.

    Raises:
        ValueError: it cannot be built; the message names the key.
    """
    outputs, tokens = num_outputs(task, data, num_classes), task.target == "tokens"
    return build(
        model.name,
        shape,
        outputs,
        seed,
        output=task.output(shape, outputs),
        tokens=tokens,
        **model.options,
    )


@lru_cache(maxsize=4)  # a site's service asks with each message
def parameters_of(config: Config, shape: tuple[int, ...], num_classes: int) -> int:
    """How many parameters :func:`network_of` would make; they are not allocated.

    It is 0 for a network of one's own.
    """
    model = config.model
    return num_parameters(
        model.name, shape, num_outputs(config.task, config.data, num_classes), **model.options
    )


def network_of(config: Config, shape: tuple[int, ...], num_classes: int) -> tuple[nn.Module, str]:
    """The network for examples of ``shape`` at its initial parameters, and a note on these.

    Raises:
        ValueError: it cannot be built; the message names the key.
    """
    model, note = config.model, ""
    network = initialised(
        model, config.data, config.task, shape, num_classes, derive(config.seed, "model")
    )
    if config.computing.checkpointing:
        checkpoint_blocks(network, config.computing.compile)
    if model.initial:
        note = start_from(network, model.initial)
    if model.trainable:
        freeze(network, model.trainable)
    if config.training.optimizer == "muon" and not any(
        weight.requires_grad for weight in hidden_matrices(network)
    ):
        raise ValueError(
            "training.optimizer = 'muon': no hidden matrix of this network is trained; "
            "allowed: 'sgd', 'adamw'"
        )
    return network, note


def codec_of(wire: Wire, sizes: Sequence[int], name: str = "") -> Codec:
    """The codec of models whose layers have ``sizes`` parameters: ``name``, else ``wire.codec``."""
    return codec(name or wire.codec, sizes, bits=wire.bits, share=wire.share)


def down_codec_of(wire: Wire) -> Codec | None:
    """The codec of models that a server sends; None where it sends them as they are."""
    return None if wire.down_codec == "identity" else codec(wire.down_codec, ())


def sends_updates(wire: Wire) -> bool:
    """Whether sites send a server how far they moved a model, in a codec, instead of the model."""
    return wire.codec != "identity" or wire.down_codec != "identity"
