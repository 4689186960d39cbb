"""A peer's network on its data: what the functions of its step ask for (:class:`strategies.peer.state.Oracle`)."""

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from client_app import training
from client_app.privacy import Noise
from client_app.site import Network
from configuration.config import Config
from datasets.site import SiteData
from strategies.peer.state import Metrics
from strategies.randomness import derive


@lru_cache(maxsize=64)
def order_of(config: Config, site: int, epoch: int, num_examples: int) -> Tensor:
    """The order [n] of a peer's examples in an epoch, counted from 0."""
    return torch.randperm(num_examples, generator=torch.Generator().manual_seed(derive(config.seed, "order", site, epoch)))


def nth_batch(config: Config, site: int, part: Any, number: int) -> training.Batch:
    """Batch ``number`` of a peer's training, counted from 0 over the whole run."""
    an_epoch = training.num_batches(len(part.y), config.training.batch_size)
    order = order_of(config, site, number // an_epoch, len(part.y))
    generator = (
        torch.Generator().manual_seed(derive(config.seed, "augment", site, number)) if config.data.augment != "none" else None
    )
    augment = training.flip_crop if generator is not None else None
    chosen = order.tensor_split(an_epoch)[number % an_epoch]
    return training.batch(part, chosen, generator or torch.Generator(), augment)


class Oracle:
    """A peer's network on its data (:class:`strategies.peer.state.Oracle`).

    Attributes:
        samples: gradients computed, one an example.
    """

    def __init__(self, config: Config, number: int, data: SiteData, network: Network, noise: Noise | None = None) -> None:
        self._config, self._data, self._network, self._noise, self.samples = config, data, network, noise, 0
        self._a_batch = min(config.training.batch_size, len(data.train.y))
        self._batch = lru_cache(maxsize=1)(partial(nth_batch, config, number, data.train))

    def gradient(self, x: Tensor, stats: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """By backpropagation; with noise where the site has it so."""
        model, examples = self._network.model, self._batch(batch)
        self.samples += self._a_batch
        model.load(x, stats)
        loss, gradient = self._network.plain(model.x, examples)
        if self._noise:
            [gradient] = self._noise([gradient])
            loss = torch.zeros_like(loss)  # it does not leave; one that is not finite would end the step for all to see
        return loss, gradient, model.stats

    def test(self, x: Tensor, stats: Tensor) -> Metrics:
        """The model on this site's test part."""
        network, test = self._network, self._data.test
        found = training.evaluate(
            network.task, network.predict, network.model, x[None], stats[None], test, details=self._config.results.details
        )
        return {**{f"test-{name}": value for name, value in found.items()}, "test-examples": len(test.y)}
