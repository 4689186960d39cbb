"""The network of a run, and the codec for vectors of its size, as its configuration describes them."""

from collections.abc import Sequence

from torch import nn

from configuration.sections import Computing, Model, Wire
from models.checkpointing import checkpoint_blocks
from models.networks import build
from models.pretrained import freeze, start_from
from strategies.codecs import Codec, codec


def network_of(
    model: Model,
    shape: tuple[int, ...],
    num_classes: int,
    seed: int,
    *,
    computing: Computing | None = None,
    output: tuple[int, ...] | None = None,
    tokens: bool = False,
) -> tuple[nn.Module, str]:
    """The network at its initial parameters, and what there is to say of them.

    Args:
        model: the section of the configuration.
        shape, num_classes, seed, output, tokens: of :func:`models.networks.build`.
        computing: the section, where the network is trained.

    Raises:
        ValueError: it cannot be built; the message names the key.
    """
    network, said = build(model.name, shape, num_classes, seed, output=output, tokens=tokens, **model.options), ""
    if computing and computing.checkpointing:
        checkpoint_blocks(network, computing.compile)
    if model.initial:
        said = start_from(network, model.initial)
    if model.trainable:
        freeze(network, model.trainable)
    return network, said


def codec_of(wire: Wire, sizes: Sequence[int], name: str = "") -> Codec:
    """The codec of models whose layers have so many parameters; another than ``wire.codec`` by its ``name``."""
    return codec(name or wire.codec, sizes, bits=wire.bits, share=wire.share)


def down_codec_of(wire: Wire) -> Codec | None:
    """The codec of models that a server sends; None where it sends them as they are."""
    return None if wire.down_codec == "identity" else codec(wire.down_codec, ())


def sends_updates(wire: Wire) -> bool:
    """Whether sites send a server how far they moved a model, in a codec, instead of the model."""
    return wire.codec != "identity" or wire.down_codec != "identity"
