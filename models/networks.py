"""The networks by name.

Small ones are written here in the form that the literature on decentralized learning uses;
everything else comes from torchvision or from the user.
"""

import importlib
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from types import FunctionType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def build(
    name: str,
    shape: tuple[int, ...],
    num_outputs: int,
    seed: int,
    *,
    output: tuple[int, ...] | None = None,
    tokens: bool = False,
    **options: Any,
) -> nn.Module:
    """A freshly initialised network, the same for the same seed.

    Args:
        name: of :data:`NETWORKS`, ``torchvision:NAME`` or ``package.module:function``, the function
            being called with ``shape`` and ``num_outputs``.
        shape: of one example, (channels, height, width), (features,) or (context,).
        num_outputs: classes, or the size of the vocabulary.
        seed: of the initialisation.
        output: shape of what the network makes of one example; (num_outputs,) by default.
        tokens: whether examples are tokens, int64.
        **options: the other keys of the section Model, of which the network gets those that it
            takes.

    Raises:
        ValueError: the network cannot take examples of this shape; the message says so.
    """
    expected = output or (num_outputs,)
    # Layers draw from the global generator: fork it, so that building a network changes nobody
    # else's numbers.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _construct(name, shape, num_outputs, tokens, options)
        network.eval()
        try:
            with torch.no_grad():
                made = network(
                    torch.zeros(2, *shape, dtype=torch.int64 if tokens else torch.float32)
                )
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            raise ValueError(
                f"model.name = {name!r} cannot take examples of shape {shape}: {error}"
            ) from error
    if not isinstance(made, Tensor) or made.shape != (2, *expected):
        got = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        wanted = ", ".join(map(str, ("batch", *expected)))
        problem = (
            f"model.name = {name!r} must return [{wanted}] for {num_outputs} classes, "
            f"it returned {got}"
        )
        raise ValueError(problem + _hint(name, expected, made))
    return network.train()


def _hint(name: str, expected: tuple[int, ...], made: Any) -> str:
    """A hint for a network that does not fit the task: what it is for, or which ones fit.

    Empty for a network of one's own.
    """
    if ":" in name and not name.startswith("torchvision:"):
        return ""
    if isinstance(made, Tensor) and made.dim() == 4:
        return "; it is for training.task = 'segmentation'"
    return (
        "; a class for each pixel: allowed: 'unet', torchvision's segmentation networks, "
        "or your own"
        if len(expected) == 3
        else ""
    )


def _construct(
    name: str, shape: tuple[int, ...], num_outputs: int, tokens: bool, options: dict[str, Any]
) -> nn.Module:
    takes = NETWORKS[name].takes if name in NETWORKS else "anything"
    given = "tokens" if tokens else "pictures" if len(shape) == 3 else "numbers"
    if takes != "anything" and given not in takes:
        there = (
            f"tokens, of shape {shape}; allowed: 'gpt'"
            if tokens
            else f"of shape {shape}; allowed: 'mlp'"
        )
        raise ValueError(
            f"model.name = {name!r} needs {takes}, the examples are {there} or your own"
        )
    if (shipped := _shipped(name, shape, num_outputs, options)) is not None:
        return shipped
    make = custom_network(name)
    try:
        network = make(shape, num_outputs)
    except Exception as error:
        raise ValueError(
            f"model.name = {name!r} cannot be built: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"model.name = {name!r} must return a torch.nn.Module, "
            f"it returned {type(network).__name__}"
        )
    return network


def _shipped(
    name: str, shape: tuple[int, ...], num_outputs: int, options: dict[str, Any]
) -> nn.Module | None:
    """A network of this program or of torchvision; None where it is one's own."""
    if name in NETWORKS:
        return NETWORKS[name].build(
            shape, num_outputs, **{key: options[key] for key in NETWORKS[name].keys}
        )
    module, _, attribute = name.partition(":")
    if module != "torchvision":
        return None
    network = _of_torchvision(attribute, shape, num_outputs)
    return (
        nn.Sequential(_ThreeChannels(), network) if len(shape) == 3 and shape[0] == 1 else network
    )


def num_parameters(name: str, shape: tuple[int, ...], num_outputs: int, **options: Any) -> int:
    """How many parameters :func:`build` would make, without the memory that they need.

    0 where counting takes that memory: for a network of one's own, and for torchvision's RegNets,
    which compute with numbers while they are built.
    """
    try:
        with torch.device("meta"):
            network = _shipped(name, shape, num_outputs, options)
    except NotImplementedError:
        return 0
    return sum(parameter.numel() for parameter in network.parameters()) if network else 0


def torchvision_names() -> tuple[str, ...]:
    """Torchvision's networks for pictures, and for each of their pixels."""
    from torchvision import models  # here: it takes a second to import

    return tuple(
        f"torchvision:{name}"
        for module in (models, models.segmentation)
        for name in models.list_models(module=module)
    )


def _of_torchvision(name: str, shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    from torchvision import models

    extra: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        extra = {"aux_logits": False}
    elif name.startswith("vit_"):
        if len(shape) != 3 or shape[1] != shape[2]:
            raise ValueError(
                f"model.name = 'torchvision:{name}' needs square pictures, "
                f"the examples are of shape {shape}"
            )
        extra = {"image_size": shape[1]}
    elif name in models.list_models(module=models.segmentation):
        extra = {"weights_backbone": None}
    try:
        network: nn.Module = models.get_model(name, weights=None, num_classes=num_outputs, **extra)
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"model.name = 'torchvision:{name}' cannot take examples of shape {shape}: {error}"
        ) from error
    if "weights_backbone" in extra:
        # A hook, not a module around it: parameters keep torchvision's names, as in checkpoints.
        network.register_forward_hook(lambda _module, _x, made: made["out"])
    return network


def custom_network(name: str) -> Callable[..., nn.Module]:
    """A user's function or class, which ``package.module:NAME`` names.

    Raises:
        ValueError: there is none.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise ValueError(
            f"model.name = {name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(found, FunctionType | type):
        kind = type(found).__name__
        raise ValueError(
            f"model.name = {name!r}: a function written in Python or a class is expected, "
            f"it is a {kind}"
        )
    return found


class _ThreeChannels(nn.Module):
    """Grey pictures for a network that expects colours."""

    def forward(self, x: Tensor) -> Tensor:
        return x.expand(-1, 3, -1, -1)


def hidden_matrices(network: nn.Module) -> list[nn.Parameter]:
    """The weights of a network's hidden layers, kernels of convolutions too.

    No vectors, no embeddings, and not the head's. The head's are the last ones, in the order of
    ``network.parameters()``.
    """
    embeddings = {
        id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)
    }
    weights = [parameter for parameter in network.parameters() if parameter.dim() > 1][:-1]
    return [
        weight
        for weight in weights
        if id(weight) not in embeddings and min(weight.flatten(1).shape) > 1
    ]


def cnn(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Two convolutions, a hidden layer: 55 thousand parameters on digits, 0.5 million on CIFAR-10.

    Its normalisation (GroupNorm) holds parameters only, which average well; without one, momentum
    diverges on larger pictures.
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
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(torch.Size(shape).numel(), 64),
        nn.ReLU(),
        nn.Linear(64, num_classes),
    )


def lenet5(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """LeNet-5 (LeCun et al. 1998) with ReLU and max pooling.

    The decentralized literature runs it so on Fashion-MNIST.
    """
    channels, height, width = shape
    rows, columns = (height // 2 - 4) // 2, (width // 2 - 4) // 2
    if min(rows, columns) < 1:
        raise ValueError(
            "model.name = 'lenet5' needs pictures of at least 12 x 12 pixels, "
            f"these have {height} x {width}"
        )
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
    """Normalisation, a layer by its channels, and the non-linearity after it.

    EvoNorm holds its own.
    """
    match name:
        case "batch":
            return nn.BatchNorm2d, nn.ReLU()
        case "group":
            return partial(nn.GroupNorm, 8), nn.ReLU()
        case "evonorm":
            return EvoNormS0, nn.Identity()
    raise ValueError(f"model.norm = {name!r}; allowed: batch, group, evonorm")


def vgg11(shape: tuple[int, ...], num_classes: int, norm: str) -> nn.Module:
    """The narrow VGG-11 of the decentralized literature: 580 thousand parameters on CIFAR-10.

    Source: RelaySGD, Vogels et al. 2021.
    """
    if min(shape[1:]) < 32:
        raise ValueError(
            "model.name = 'vgg11' needs pictures of at least 32 x 32 pixels, "
            f"these have {shape[1]} x {shape[2]}"
        )
    layer, act = _norm(norm)
    layers: list[nn.Module] = []
    channels = shape[0]
    for width in (16, 0, 32, 0, 64, 64, 0, 128, 128, 0, 128, 128, 0):  # 0: pooling
        if width:
            layers += [nn.Conv2d(channels, width, 3, padding=1), layer(width), act]
            channels = width
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, num_classes)
    )


class EvoNormS0(nn.Module):
    """Normalisation and non-linearity in one, without statistics over the batch.

        y = gamma x sigmoid(v x) / std_group(x) + beta

    Source: Liu et al., "Evolving Normalization-Activation Layers", NeurIPS 2020, table 2. Differs:
    8 groups, as in the code of the decentralized literature, which has nothing to gossip but
    parameters.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.groups = min(8, channels)
        self.gamma = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.v = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise pictures [n, c, h, w], and apply the non-linearity."""
        n, channels, height, width = x.shape
        grouped = x.reshape(n, self.groups, channels // self.groups, height, width)
        variance = grouped.var((2, 3, 4), correction=0, keepdim=True)
        scale = torch.rsqrt(variance + 1e-5).expand_as(grouped).reshape(x.shape)
        return self.gamma * x * torch.sigmoid(self.v * x) * scale + self.beta


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, figure 2)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        norm: Callable[[int], nn.Module],
        act: nn.Module,
    ) -> None:
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
    """ResNet-20 for small pictures (He et al. 2016, section 4.2).

    It has 16, 32, 64 channels, three blocks each; 1x1 shortcuts. With ``norm="evonorm"`` the
    normalisation holds the non-linearity, so there is no ReLU anywhere.
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
        """Pictures [n, c, h, w] to logits [n, classes]."""
        features = self.blocks(self.stem(x))
        logits: Tensor = self.head(F.adaptive_avg_pool2d(features, 1).flatten(1))
        return logits


def resnet20(shape: tuple[int, ...], num_classes: int, norm: str) -> nn.Module:
    """See :class:`ResNet20`."""
    return ResNet20(shape[0], num_classes, norm)


class _Layer(nn.Module):
    """A layer of :class:`GPT`: causal attention, then an MLP.

    Each works on what LayerNorm makes of its input, and is added to it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        # [n, context, 3, heads, size]
        each = self.queries_keys_values(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = each.permute(2, 0, 3, 1, 4)
        # [n, heads, context, size]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        y: Tensor = x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return y


class GPT(nn.Module):
    """A decoder-only transformer: tokens [n, context] to logits of each one's successor.

    The logits are [n, context, vocabulary].

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2, 2019),
    section 2.3: LayerNorm before attention and MLP, learned positions, the embedding as head;
    weights normal with deviation 0.02, those of the projections that are added to their input
    divided by sqrt(2 layers). Differs: no dropout, the exact GELU, positions with deviation 0.02.
    """

    def __init__(self, context: int, vocabulary: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.positions = nn.Embedding(context, width)
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.tokens = nn.Embedding(vocabulary, width)  # the head, too
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(
                    parameter,
                    std=0.02 / (2 * layers) ** 0.5 if name.endswith("_out.weight") else 0.02,
                )

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [n, context] to logits [n, context, vocabulary]."""
        y = self.tokens(x) + self.positions.weight[: x.shape[1]]
        for layer in self.layers:
            y = layer(y)
        return F.linear(self.norm(y), self.tokens.weight)


def gpt(shape: tuple[int, ...], vocabulary: int, layers: int, width: int, heads: int) -> nn.Module:
    """See :class:`GPT`."""
    if width % heads:
        raise ValueError(f"model.heads = {heads}: must divide model.width, which is {width}")
    return GPT(shape[0], vocabulary, layers, width, heads)


class UNet(nn.Module):
    """A small U-Net: a class for each pixel; 0.5 million parameters.

    Pictures [n, c, h, w] of any size to logits [n, classes, h, w].

    Source: Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation",
    MICCAI 2015, figure 1. Differs: two halvings of the size instead of four, of 32 to 128 channels;
    convolutions with padding, so that nothing is cropped; GroupNorm; enlarged by repeating pixels
    instead of transposed convolutions.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(_twice(*each) for each in pairwise((channels, 32, 64, 128)))
        self.up = nn.ModuleList([_twice(128 + 64, 64), _twice(64 + 32, 32)])
        self.head = nn.Conv2d(32, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures [n, c, h, w] to logits [n, classes, h, w]."""
        features: list[Tensor] = []
        for block in self.down:
            x = block(F.max_pool2d(x, 2, ceil_mode=True) if features else x)
            features.append(x)
        for block, skipped in zip(self.up, features[-2::-1], strict=True):
            x = block(torch.cat([skipped, F.interpolate(x, skipped.shape[2:])], 1))
        logits: Tensor = self.head(x)
        return logits


def _twice(inputs: int, outputs: int) -> nn.Module:
    """Two blocks of convolution, normalisation and non-linearity."""
    return nn.Sequential(
        *(
            layer
            for before in (inputs, outputs)
            for layer in (
                nn.Conv2d(before, outputs, 3, padding=1, bias=False),
                nn.GroupNorm(8, outputs),
                nn.ReLU(),
            )
        )
    )


def unet(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """See :class:`UNet`."""
    return UNet(shape[0], num_classes)


class Network(NamedTuple):
    """A network by name.

    Attributes:
        build: takes the shape of an example, the number of outputs and, by name, ``keys``.
        takes: which examples.
        keys: of the section Model that it takes.
    """

    build: Callable[..., nn.Module]
    takes: Literal["pictures", "tokens", "pictures or numbers"] = "pictures"
    keys: tuple[str, ...] = ()


NETWORKS = {
    "cnn": Network(cnn),
    "mlp": Network(mlp, "pictures or numbers"),
    "lenet5": Network(lenet5),
    "resnet20": Network(resnet20, keys=("norm",)),
    "vgg11": Network(vgg11, keys=("norm",)),
    "unet": Network(unet),
    "gpt": Network(gpt, "tokens", ("layers", "width", "heads")),
}
