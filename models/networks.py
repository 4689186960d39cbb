"""The networks by name.

Small ones are written here in the form that the literature on decentralized learning uses; everything else comes from
torchvision or from the user.
"""

import importlib
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def build(name: str, shape: tuple[int, ...], num_classes: int, norm: str, seed: int) -> nn.Module:
    """A freshly initialised network, the same for the same seed.

    Args:
        name: cnn, mlp, lenet5, resnet20, vgg11, ``torchvision:NAME`` or ``package.module:function``, the function being called
            with ``shape`` and ``num_classes``.
        shape: of one example, (channels, height, width) or (features,).
        num_classes: length of the network's output.
        norm: batch, group or evonorm; of resnet20 and vgg11.
        seed: of the initialisation.

    Raises:
        ValueError: the network cannot take examples of this shape; the message says so.
    """
    # Layers draw from the global generator: fork it, so that building a network changes nobody else's numbers.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _construct(name, shape, num_classes, norm)
        network.eval()
        try:
            with torch.no_grad():
                output = network(torch.zeros(2, *shape))
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise ValueError(f"model.name = {name!r} cannot take examples of shape {shape}: {error}") from error
    if not isinstance(output, Tensor) or output.shape != (2, num_classes):
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"model.name = {name!r} must return [batch, {num_classes}] for {num_classes} classes, it returned {got}")
    return network.train()


def _construct(name: str, shape: tuple[int, ...], num_classes: int, norm: str) -> nn.Module:
    picture = len(shape) == 3
    if name in NETWORKS:
        if NETWORKS[name].pictures and not picture:
            raise ValueError(f"model.name = {name!r} needs pictures, the examples are of shape {shape}; allowed: 'mlp' or your own")
        chosen = (norm,) if NETWORKS[name].normalised else ()
        return NETWORKS[name].build(shape, num_classes, *chosen)
    module, _, attribute = name.partition(":")
    if module == "torchvision":
        from torchvision.models import get_model  # here: it takes a second to import

        extra = {"aux_logits": False} if attribute in ("googlenet", "inception_v3") else {}
        network = get_model(attribute, weights=None, num_classes=num_classes, **extra)
        return nn.Sequential(_ThreeChannels(), network) if picture and shape[0] == 1 else network
    make = own(name)
    try:
        network = make(shape, num_classes)
    except Exception as error:
        raise ValueError(f"model.name = {name!r} cannot be built: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"model.name = {name!r} must return a torch.nn.Module, it returned {type(network).__name__}")
    return network


def own(name: str) -> Callable[..., nn.Module]:
    """The function or class of one's own that ``package.module:NAME`` names.

    Raises:
        ValueError: there is none.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise ValueError(f"model.name = {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(found, FunctionType | type):
        kind = type(found).__name__
        raise ValueError(f"model.name = {name!r}: a function written in Python or a class is expected, it is a {kind}")
    return found


class _ThreeChannels(nn.Module):
    """Grey pictures for a network that expects colours."""

    def forward(self, x: Tensor) -> Tensor:
        return x.expand(-1, 3, -1, -1)


def cnn(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Two convolutions, a hidden layer: 55 thousand parameters on digits, 0.5 million on CIFAR-10.

    Its normalisation (GroupNorm) holds parameters only, which average well; without one, momentum diverges on larger pictures.
    """
    channels, height, width = shape
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.GroupNorm(8, 32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.GroupNorm(8, 64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), 128),
        nn.ReLU(),
        nn.Linear(128, num_classes),
    )


def mlp(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """One hidden layer of 64 on the flattened example, for tables and text."""
    return nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 64), nn.ReLU(), nn.Linear(64, num_classes))


def lenet5(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """LeNet-5 (LeCun et al. 1998) with ReLU and max pooling, as the decentralized literature runs it on Fashion-MNIST."""
    channels, height, width = shape
    rows, columns = (height // 2 - 4) // 2, (width // 2 - 4) // 2
    if min(rows, columns) < 1:
        raise ValueError(f"model.name = 'lenet5' needs pictures of at least 12 x 12 pixels, these have {height} x {width}")
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * rows * columns, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, num_classes),
    )


def _norm(name: str) -> tuple[Callable[[int], nn.Module], nn.Module]:
    """A layer of normalisation by its channels, and the non-linearity after it; EvoNorm holds its own."""
    match name:
        case "batch":
            return nn.BatchNorm2d, nn.ReLU()
        case "group":
            return partial(nn.GroupNorm, 8), nn.ReLU()
        case "evonorm":
            return EvoNormS0, nn.Identity()
    raise ValueError(f"model.norm = {name!r}; allowed: batch, group, evonorm")


def vgg11(shape: tuple[int, ...], num_classes: int, norm: str) -> nn.Module:
    """The narrow VGG-11 of the decentralized literature (RelaySGD, Vogels et al. 2021): 580 thousand parameters on CIFAR-10."""
    if min(shape[1:]) < 32:
        raise ValueError(f"model.name = 'vgg11' needs pictures of at least 32 x 32 pixels, these have {shape[1]} x {shape[2]}")
    layer, act = _norm(norm)
    layers: list[nn.Module] = []
    channels = shape[0]
    for width in (16, 0, 32, 0, 64, 64, 0, 128, 128, 0, 128, 128, 0):  # 0: pooling
        if width:
            layers += [nn.Conv2d(channels, width, 3, padding=1), layer(width), act]
            channels = width
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, num_classes))


class EvoNormS0(nn.Module):
    """Normalisation and non-linearity in one, without statistics over the batch.

        y = gamma x sigmoid(v x) / std_group(x) + beta

    Source: Liu et al., "Evolving Normalization-Activation Layers", NeurIPS 2020, table 2. Differs: 8 groups, as
    in the code of the decentralized literature, which has nothing to gossip but parameters.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.groups = min(8, channels)
        self.gamma = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.v = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        grouped = x.reshape(n, self.groups, channels // self.groups, height, width)
        variance = grouped.var((2, 3, 4), correction=0, keepdim=True)
        scale = torch.rsqrt(variance + 1e-5).expand_as(grouped).reshape(x.shape)
        return self.gamma * x * torch.sigmoid(self.v * x) * scale + self.beta


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, figure 2)."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module], act: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            norm(outputs),
            act,
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            norm(outputs),
        )
        self.shortcut = (
            nn.Sequential()
            if stride == 1 and inputs == outputs
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))
        )
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.body(x) + self.shortcut(x))
        return y


class ResNet20(nn.Module):
    """ResNet-20 for small pictures (He et al. 2016, section 4.2): 16, 32, 64 channels, three blocks each; 1x1 shortcuts.

    With ``norm="evonorm"`` the normalisation holds the non-linearity, so there is no ReLU anywhere.
    """

    def __init__(self, channels: int, num_classes: int, norm: str) -> None:
        super().__init__()
        layer, act = _norm(norm)
        blocks: list[nn.Module] = []
        inputs = 16
        for outputs in (16, 32, 64):
            for index in range(3):
                stride = 2 if index == 0 and outputs > 16 else 1
                blocks.append(_Block(inputs, outputs, stride, layer, act))
                inputs = outputs
        self.stem = nn.Sequential(nn.Conv2d(channels, 16, 3, 1, 1, bias=False), layer(16), act)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        features = self.blocks(self.stem(x))
        logits: Tensor = self.head(F.adaptive_avg_pool2d(features, 1).flatten(1))
        return logits


def resnet20(shape: tuple[int, ...], num_classes: int, norm: str) -> nn.Module:
    """:class:`ResNet20`."""
    return ResNet20(shape[0], num_classes, norm)


class Network(NamedTuple):
    """A network by name.

    Attributes:
        build: takes the shape of an example, the number of classes and, where it is ``normalised``, ``norm``.
        pictures: whether it needs pictures.
        normalised: whether its normalisation can be chosen.
    """

    build: Callable[..., nn.Module]
    pictures: bool = True
    normalised: bool = False


NETWORKS = {
    "cnn": Network(cnn),
    "mlp": Network(mlp, pictures=False),
    "lenet5": Network(lenet5),
    "resnet20": Network(resnet20, normalised=True),
    "vgg11": Network(vgg11, normalised=True),
}
