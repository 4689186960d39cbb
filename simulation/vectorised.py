"""The networks of all peers at once, in one vectorised pass.

It computes the gradients of many models, each on its own batch.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional as F

from client_app import training
from client_app.oracle import nth_batch, order_of
from configuration.config import Config
from datasets.lazy import Lazy
from datasets.site import Part
from models.flat import FlatModel
from strategies.peer.neighbourhood import Gradients


class Batch(NamedTuple):
    """Every peer's batch: inputs [n, b, ...], labels [n, b] and weights [n, b].

    A weight is 0 where a smaller batch is padded.
    """

    inputs: Tensor
    labels: Tensor
    weights: Tensor


class Networks:
    """One network for all peers, and the batches of each.

    Args:
        config: the run.
        model: the bound network, without BatchNorm statistics.
        parts: the training parts of the peers, in the order of their numbers.
    """

    def __init__(self, config: Config, model: FlatModel, parts: list[Part]) -> None:
        self._config, self._model, self._parts = config, model, parts
        self._device = model.x.device
        self._batches = 0
        self._stacked = config.data.augment == "none" and not isinstance(parts[0].x, Lazy)
        if self._stacked:
            self._pool = (
                torch.cat([part.x for part in parts]),
                torch.cat([part.y for part in parts]),
            )
        self._starts = [0, *torch.tensor([len(part.y) for part in parts]).cumsum(0).tolist()]
        # On a CPU, the convolutions of many networks at once are slower than one after the other,
        # but for small pictures.
        convolutional = any(
            isinstance(module, torch.nn.Conv2d) for module in model.network.modules()
        )
        self._one_by_one = (
            self._device.type == "cpu" and convolutional and parts[0].x.shape[-1] > 16
        )
        self._all_at_once = vmap(grad_and_value(self._loss), randomness="different")

    def _loss(self, x: Tensor, inputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """One peer's mean loss [] at ``x`` [d]."""
        network, model = self._model.network, self._model
        names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        shapes = [parameter.shape for parameter in network.parameters() if parameter.requires_grad]
        parts = {
            name: part.view(shape)
            for name, part, shape in zip(names, x.split(model.sizes), shapes, strict=True)
        }
        each = self._config.task.losses(functional_call(network, parts, (inputs,)).float(), labels)
        return (each * weights).sum()

    def next_batch(self) -> Batch:
        """The next batch of each peer."""
        config, number = self._config, self._batches
        self._batches += 1
        if not self._stacked:
            batches = [
                nth_batch(config, peer, part, number) for peer, part in enumerate(self._parts)
            ]
            longest = max(len(y) for _, y in batches)
            inputs = torch.stack(
                [F.pad(x, (0, 0) * (x.dim() - 1) + (0, longest - len(x))) for x, _ in batches]
            )
            labels = torch.stack(
                [F.pad(y, (0, 0) * (y.dim() - 1) + (0, longest - len(y))) for _, y in batches]
            )
            return Batch(
                inputs, labels, _weights([len(y) for _, y in batches], longest).to(inputs.device)
            )
        chosen = []
        for peer, part in enumerate(self._parts):
            an_epoch = training.num_batches(len(part.y), config.training.batch_size)
            order = order_of(config, peer, number // an_epoch, len(part.y))
            chosen.append(self._starts[peer] + order.tensor_split(an_epoch)[number % an_epoch])
        rows = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True).to(self._device)
        inputs = training.prepare(self._pool[0][rows])
        return Batch(
            inputs,
            self._pool[1][rows],
            _weights([len(each) for each in chosen], rows.shape[1]).to(self._device),
        )

    def gradients(self, x: Tensor, batch: Batch) -> Gradients:
        """The gradients of models ``x`` [m, d], each on its batch."""
        with torch.autocast(
            self._device.type,
            torch.bfloat16,
            enabled=self._config.computing.precision == "bfloat16",
        ):
            if not self._one_by_one:
                gradients, losses = self._all_at_once(x, *batch)
                return Gradients(losses, gradients, x.new_empty(len(x), 0))
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
