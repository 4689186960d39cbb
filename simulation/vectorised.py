"""The networks of several sites at once, in one vectorised pass.

It computes the gradients of many models, each on its own batch.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, count
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from client_app import training
from client_app.oracle import nth_batch, order_of
from configuration.config import Config
from configuration.errors import ConfigError
from datasets.lazy import Lazy
from datasets.site import Part
from models.flat import FlatModel
from simulation import layers
from simulation.layers import channels_last, layers_of
from strategies.peer.neighbourhood import Gradients


class Batch(NamedTuple):
    """Every site's batch: inputs [n, b, ...], labels [n, b, ...] and weights [n, b].

    A weight is 0 where a smaller batch is padded.
    """

    inputs: Tensor
    labels: Tensor
    weights: Tensor


def stacked(batches: Sequence[training.Batch]) -> Batch:
    """The batches of several sites as one."""
    counts = [len(y) for _, y in batches]
    longest = max(counts)

    def together(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack(
            [F.pad(part, (0, 0) * (part.dim() - 1) + (0, longest - len(part))) for part in parts]
        )

    inputs, labels = map(together, zip(*batches, strict=True))
    return Batch(inputs, labels, _weights(counts, longest).to(inputs.device))


def check_network(config: Config, model: FlatModel) -> None:
    """Make sure that one pass can compute several networks.

    Raises:
        ConfigError: it has BatchNorm statistics.
    """
    if model.num_stats:
        raise ConfigError(
            f"model.norm = {config.model.norm!r}: engine = 'batched' takes no BatchNorm; "
            "allowed: 'group', 'evonorm'"
        )


class PeerBatches:
    """The batches of all peers.

    Args:
        config: the run.
        parts: the training parts of the peers, in the order of their numbers.
        device: where batches go.
    """

    def __init__(self, config: Config, parts: list[Part], device: torch.device) -> None:
        self._config, self._parts, self._device = config, parts, device
        self._numbers = count()
        self._pooled = config.data.augment == "none" and not isinstance(parts[0].x, Lazy)
        if self._pooled:
            self._pool = (
                torch.cat([part.x for part in parts]),
                torch.cat([part.y for part in parts]),
            )
            starts = accumulate((len(part.y) for part in parts), initial=0)
            self._rows = [
                self._rows_of(peer, start, part)
                for (peer, part), start in zip(enumerate(parts), starts, strict=False)
            ]

    def _rows_of(self, peer: int, start: int, part: Part) -> Iterator[Tensor]:
        """Where a peer's batches lie in the pool, one after the other."""
        an_epoch = training.num_batches(len(part.y), self._config.training.batch_size)
        for epoch in count():
            order = order_of(self._config, peer, epoch, len(part.y))
            yield from (start + order).tensor_split(an_epoch)

    def next(self) -> Batch:
        """The next batch of each peer."""
        if not self._pooled:
            number = next(self._numbers)
            return stacked(
                [
                    nth_batch(self._config, peer, part, number)
                    for peer, part in enumerate(self._parts)
                ]
            )
        chosen = list(map(next, self._rows))
        rows = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True).to(self._device)
        inputs = training.prepare(self._pool[0][rows])
        return Batch(
            inputs,
            self._pool[1][rows],
            _weights([len(each) for each in chosen], rows.shape[1]).to(self._device),
        )


class Networks:
    """One network with the parameters of several sites.

    Args:
        config: the run.
        model: the bound network, without BatchNorm statistics.
        shape: of an example.
    """

    def __init__(self, config: Config, model: FlatModel, shape: Sequence[int]) -> None:
        self._config, self._model = config, model
        self._device = model.x.device
        self._layers = layers_of(model.network) if len(shape) in (1, 3) else []
        widths = [
            module.out_channels
            for module in model.network.modules()
            if isinstance(module, nn.Conv2d)
        ]
        self._on_cpu = self._device.type == "cpu" and bool(widths)
        # There, the convolutions of many networks at once are slower than one after the other, but
        # for small pictures or few channels.
        few = bool(self._layers) and max(widths, default=0) <= 16
        # Attention there has no rule for many networks at once: vmap loops, slower, and warns.
        attends = self._device.type == "cpu" and config.training.task == "language"
        self.one_by_one = attends or (self._on_cpu and shape[-1] > 16 and not few)
        self._trained = {
            name: parameter
            for name, parameter in model.network.named_parameters()
            if parameter.requires_grad
        }
        if self._on_cpu:
            # The C library then no longer hands the memory of each step back to the system.
            torch.empty(31 << 20, dtype=torch.uint8)
        self._vmapped = vmap(self._of_one, randomness="different")

    def _parts(self, x: Tensor) -> Iterator[Tensor]:
        """The parameters [..., *shape] that ``x`` [..., d] holds."""
        for part, own in zip(x.split(self._model.sizes, -1), self._trained.values(), strict=True):
            yield part.view(*x.shape[:-1], *own.shape)

    def _of_one(self, x: Tensor, inputs: Tensor) -> Tensor:
        """One site's outputs [b, ...] at ``x`` [d]."""
        parts = dict(zip(self._trained, self._parts(x), strict=True))
        found: Tensor = functional_call(self._model.network, parts, (inputs,))
        return found

    def _of_all(self, x: Tensor, inputs: Tensor) -> Tensor:
        """Every site's outputs [n, b, ...] at ``x`` [n, d]."""
        if not self._layers:
            outputs: Tensor = self._vmapped(x, inputs)
            return outputs
        own = dict(zip(map(id, self._trained.values()), self._parts(x), strict=True))
        if self._on_cpu:
            inputs = channels_last(inputs)
        return layers.outputs(
            self._layers, lambda each: own.get(id(each), each.expand(len(x), *each.shape)), inputs
        )

    def outputs(self, inputs: Tensor) -> Tensor:
        """What the bound model itself makes of examples [b, ...] in a test."""
        network = self._model.network
        if self._on_cpu and not self.one_by_one:
            inputs = channels_last(inputs[None])[0]
        network.eval()
        with torch.no_grad(), self._precision():
            outputs: Tensor = network(inputs)
        return outputs

    def _precision(self) -> torch.autocast:
        enabled = self._config.computing.precision == "bfloat16"
        return torch.autocast(self._device.type, torch.bfloat16, enabled=enabled)

    def gradients(self, x: Tensor, batch: Batch) -> Gradients:
        """The gradients of models ``x`` [m, d], each on its batch."""
        with self._precision():
            if not self.one_by_one:
                x = x.detach().requires_grad_()
                outputs = self._of_all(x, batch.inputs).float().flatten(0, 1)
                each = self._config.task.losses(outputs, batch.labels.flatten(0, 1))
                losses = (each.view(batch.weights.shape) * batch.weights).sum(1)
                [gradients] = torch.autograd.grad(losses.sum(), x)
                return Gradients(losses.detach(), gradients, x.new_empty(len(x), 0))
            model = self._model
            found = []
            for row, inputs, labels, weights in zip(x, *batch, strict=True):
                model.x.copy_(row)
                loss = (
                    self._config.task.losses(model.network(inputs).float(), labels) * weights
                ).sum()
                model.backward(loss)
                found.append((loss.detach(), model.grad.clone()))
        losses, gradients = map(torch.stack, zip(*found, strict=True))
        return Gradients(losses, gradients, x.new_empty(len(x), 0))


@lru_cache(maxsize=16)
def _weights_of(counts: tuple[int, ...], longest: int) -> Tensor:
    return torch.stack(
        [
            torch.cat([torch.full((count,), 1 / count), torch.zeros(longest - count)])
            for count in counts
        ]
    )


def _weights(counts: list[int], longest: int) -> Tensor:
    """[n, longest]: each row sums to 1 over its batch."""
    return _weights_of(tuple(counts), longest)
