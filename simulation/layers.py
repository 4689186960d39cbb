"""Layers of several networks at once, without vmap, which is slower at them.

Pictures are [b, n c, h, w], the channels of n networks side by side: so convolution, normalisation
and pooling are one call each, and nothing is moved between them. Vectors are [n, b, f].
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Of a layer, the number n of networks, x, and the parameters [n, ...] of all.
Rule = Callable[[Any, int, Tensor, Tensor | None, Tensor | None], Tensor]


def _side_by_side(x: Tensor) -> Tensor:
    """Of every network [n, b, c, ...] to [b, n c, ...]."""
    return x.transpose(0, 1).flatten(1, 2)


def _apart(n: int, x: Tensor) -> Any:
    """Of every network [b, n c, ...] to [n, b, c, ...]."""
    return x.unflatten(1, (n, -1)).transpose(0, 1)


def _whole(parameter: Tensor | None) -> Any:
    return None if parameter is None else parameter.flatten(0, 1)


def _convolution(
    layer: Any, n: int, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    moves = layer.stride, layer.padding, layer.dilation
    return F.conv2d(x, _whole(weight), _whole(bias), *moves, n * layer.groups)


def _normalisation(
    layer: Any, n: int, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    given = n * layer.num_groups, _whole(weight), _whole(bias), layer.eps
    return (
        F.group_norm(x, *given)
        if x.dim() == 4
        else _apart(n, F.group_norm(_side_by_side(x), *given))
    )


def _linear(layer: Any, n: int, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    # Not x @ weight.mT: weights' gradients would be transposed, and copied.
    found = weight @ x.mT if bias is None else torch.baddbmm(bias[:, :, None], weight, x.mT)
    return found.mT


def _flat(layer: nn.Flatten, n: int, x: Tensor, *_: Tensor | None) -> Tensor:
    return _apart(n, x).flatten(2) if x.dim() == 4 else x


def _itself(layer: nn.Module, n: int, x: Tensor, *_: Tensor | None) -> Tensor:
    made: Tensor = layer(x)
    return made


RULES: dict[type[nn.Module], Rule] = {
    nn.Conv2d: _convolution,
    nn.GroupNorm: _normalisation,
    nn.Linear: _linear,
    nn.Flatten: _flat,
    **dict.fromkeys((nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.ReLU, nn.Tanh, nn.Identity), _itself),
}
# Their gradients do not need what they made.
FORGETFUL = nn.Conv2d, nn.GroupNorm, nn.Linear


def layers_of(network: nn.Module) -> list[nn.Module]:
    """The layers of a network, one after the other; none where some have no rule."""
    found = list(_in_turn(network))
    return found if all(map(_is_known, found)) else []


def _in_turn(network: nn.Module) -> Iterator[nn.Module]:
    if type(network) is nn.Sequential and not _hooks(network):
        for layer in network:
            yield from _in_turn(layer)
    else:
        yield network


def _is_known(layer: nn.Module) -> bool:
    usual = getattr(layer, "padding_mode", "zeros") == "zeros"
    if isinstance(layer, nn.Flatten):
        usual = (layer.start_dim, layer.end_dim) == (1, -1)
    return type(layer) in RULES and usual and not _hooks(layer)


def _hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def outputs(
    layers: list[nn.Module], parameters: Callable[[Tensor], Tensor], inputs: Tensor
) -> Tensor:
    """What the networks make of examples.

    Args:
        layers: of one of them.
        parameters: those [n, ...] of all networks that stand for one of a layer's.
        inputs: [n, b, ...], pictures or vectors.

    Returns:
        [n, b, ...].
    """
    n = len(inputs)
    x = _side_by_side(inputs) if inputs.dim() == 5 else inputs
    for before, layer in zip([None, *layers], layers, strict=False):
        if isinstance(layer, nn.ReLU) and isinstance(before, FORGETFUL):
            x = F.relu_(x)  # saves a twentieth of the time: memory of a new tensor is slow
            continue
        own = (getattr(layer, name, None) for name in ("weight", "bias"))
        x = RULES[type(layer)](
            layer, n, x, *(None if each is None else parameters(each) for each in own)
        )
    return _apart(n, x) if x.dim() == 4 else x


def channels_last(inputs: Tensor) -> Tensor:
    """Pictures [n, b, c, h, w], in memory as [b, h, w, n, c].

    On a CPU pooling then takes a tenth of the time.
    """
    return inputs.permute(1, 3, 4, 0, 2).contiguous().permute(3, 0, 4, 1, 2)
