"""What a handler has computed for it: tests, and local training.

A handler is a generator: it yields each piece of work and goes on with what came of it. A site
computes it at once (:func:`alone`); a laboratory may compute that of several sites together
(:mod:`simulation.together`).
"""

from collections.abc import Callable, Generator, Iterator
from itertools import chain, count, islice
from typing import Any, NamedTuple, Protocol

import torch
from flwr.app import Message
from torch import Tensor

from client_app import training
from client_app.site import Network, seeded
from configuration.config import Config
from datasets.site import Part
from strategies.method import LocalTraining
from strategies.randomness import derive
from strategies.schedules import rates

Optimizers = list[torch.optim.Optimizer]


class Work(Protocol):
    """A piece of work."""

    def compute(self) -> Any:
        """What comes of it."""


Steps = Generator[Work, Any, Message]


def alone(steps: Steps) -> Message:
    """What a handler answers, its work computed piece by piece."""
    found: Any = None
    while True:
        try:
            work = steps.send(found)
        except StopIteration as end:
            reply: Message = end.value
            return reply
        found = work.compute()


class Test(NamedTuple):
    """The test of models [k, d] with their statistics [k, b] on a part of the examples."""

    config: Config
    network: Network
    xs: Tensor
    stats: Tensor
    part: Part

    def compute(self) -> dict[str, float | list[float]]:
        """Metrics, as in :meth:`Network.test`."""
        return self.network.test(self.xs, self.stats, self.part)


class Trained(NamedTuple):
    """What came of local training.

    Attributes:
        x: the model [d]; like ``stats`` it may be the network's own memory.
        stats: its BatchNorm statistics [b].
        loss: the mean over all batches.
        optimizers: with their moments.
    """

    x: Tensor
    stats: Tensor
    loss: float
    optimizers: Optimizers


class Training(NamedTuple):
    """Local training of a model, as an order asks for it.

    Attributes:
        config: the run.
        site: its number.
        part: the examples.
        network: that is trained.
        x: the model [d] at the beginning.
        stats: its BatchNorm statistics [b].
        number: of the order in which batches and dropout are drawn.
        local: what to do.
        correct: the gradient to follow instead of a batch's; None for that itself.
        remember: gives the optimizers their moments.
    """

    config: Config
    site: int
    part: Part
    network: Network
    x: Tensor
    stats: Tensor
    number: int
    local: LocalTraining
    correct: Callable[[training.Gradient], training.Gradient] | None = None
    remember: Callable[[Optimizers], None] | None = None

    @property
    def an_epoch(self) -> int:
        """Batches an epoch."""
        return training.num_batches(len(self.part.y), self.config.training.batch_size)

    @property
    def steps(self) -> int:
        """Batches in all."""
        return self.local.steps or self.local.epochs * self.an_epoch

    def rates(self) -> Callable[[int], float]:
        """The learning rate of each batch."""
        keys, local = self.config.training, self.local
        cycle = (keys.lr_shape, keys.lr_ratio, keys.lr_steps, local.cycle)
        return rates(local.lr, *cycle, steps=self.steps, epoch=self.an_epoch, warmup=keys.lr_warmup)

    def optimizers(self, model: training.Model) -> Optimizers:
        """The optimizers of a model."""
        keys, plain = self.config.training, self.local.plain
        return training.optimizers(
            "sgd" if plain else keys.optimizer,
            model,
            self.local.lr,
            0.0 if plain else keys.momentum,
            keys.nesterov and not plain,
            keys.weight_decay,
        )

    def batches(self) -> Iterator[training.Batch]:
        """The batches, in an order of their own."""
        shuffle = torch.Generator().manual_seed(
            derive(self.config.seed, "order", self.site, self.number)
        )
        augment = training.flip_crop if self.config.data.augment == "flip-crop" else None
        size = self.config.training.batch_size
        epochs = (training.batches(self.part, size, shuffle, augment) for _ in count())
        return islice(chain.from_iterable(epochs), self.steps)

    def layers(self) -> int:
        """The seed of dropout."""
        return derive(self.config.seed, "layers", self.site, self.number)

    def compute(self) -> Trained:
        """Train."""
        model, gradient = self.network.model, self.network.sharp
        model.load(self.x, self.stats)
        optimizers = self.optimizers(model)
        if self.remember:
            self.remember(optimizers)
        with seeded(model.x.device, self.layers()):
            loss, _ = training.train(
                model,
                self.correct(gradient) if self.correct else gradient,
                optimizers,
                self.batches(),
                self.rates(),
                self.config.training.clip_norm,
            )
        return Trained(model.x, model.stats, loss, optimizers)
