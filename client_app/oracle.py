"""A peer's network on its data: what the functions of its step ask for.

Its protocol is :class:`strategies.peer.state.Oracle`.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import count

import torch
from torch import Tensor

from client_app import training
from client_app.privacy import Noise
from client_app.site import Network
from configuration.config import Config
from datasets.lazy import Lazy, read, stream
from datasets.site import Part, SiteData
from strategies.peer.state import Metrics
from strategies.randomness import derive


def order_of(config: Config, site: int, epoch: int, num_examples: int) -> Tensor:
    """The order [n] of a peer's examples in an epoch, counted from 0."""
    return torch.randperm(
        num_examples,
        generator=torch.Generator().manual_seed(derive(config.seed, "order", site, epoch)),
    )


@lru_cache(maxsize=256)
def _orders(config: Config, site: int) -> Callable[[int, int], Tensor]:
    """:func:`order_of` of a peer, which keeps two: of a large site's examples they are large."""
    return lru_cache(maxsize=2)(partial(order_of, config, site))


def nth_batch(config: Config, site: int, part: Part, number: int) -> training.Batch:
    """Batch ``number`` of a peer's training, counted from 0 over the whole run."""
    an_epoch = training.num_batches(len(part.y), config.training.batch_size)

    def chosen(number: int) -> Tensor:
        order = _orders(config, site)(number // an_epoch, len(part.y))
        return training.nth_part(order, an_epoch, number % an_epoch)

    generator = (
        torch.Generator().manual_seed(derive(config.seed, "augment", site, number))
        if config.data.augment != "none"
        else None
    )
    x, y = _ahead.batch((config, site), part, number, chosen)
    return training.prepare(training.flip_crop(x, generator) if generator is not None else x), y


class _ReadAhead:
    """Reads ahead for a peer that asks for one batch after the other.

    It does so where data are lazy and workers read them.
    """

    def __init__(self) -> None:
        self._expected: tuple[object, ...] = ()
        self._batches: Iterator[training.Batch] | None = None

    def batch(
        self, peer: object, part: Part, number: int, chosen: Callable[[int], Tensor]
    ) -> training.Batch:
        """The examples of batch ``number``: those that :func:`chosen` names."""
        if not isinstance(part.x, Lazy):
            return read(*part, chosen(number))
        # Another peer's of this process, or the first batch.
        if (peer, part.x.reader, number) != self._expected:
            self._batches, found = None, read(*part, chosen(number))
        else:
            self._batches = self._batches or stream(*part, map(chosen, count(number)))
            found = next(self._batches)
        self._expected = peer, part.x.reader, number + 1
        return found


_ahead = _ReadAhead()


class Oracle:
    """A peer's network on its data (:class:`strategies.peer.state.Oracle`).

    Attributes:
        samples: gradients computed, one an example.
    """

    def __init__(
        self,
        config: Config,
        number: int,
        data: SiteData,
        network: Network,
        noise: Noise | None = None,
    ) -> None:
        self._data, self._network, self._noise, self.samples = data, network, noise, 0
        self._a_batch = min(config.training.batch_size, len(data.train.y))
        self._batch = lru_cache(maxsize=1)(partial(nth_batch, config, number, data.train))

    def gradient(self, x: Tensor, stats: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient by backpropagation; with noise where the site adds it."""
        model, examples = self._network.model, self._batch(batch)
        self.samples += self._a_batch
        model.load(x, stats)
        loss, gradient = self._network.plain(model.x, examples)
        if self._noise:
            [gradient] = self._noise([gradient])
            # The loss does not leave; one that is not finite would end the step for all to see.
            loss = torch.zeros_like(loss)
        return loss, gradient, model.stats

    def test(self, x: Tensor, stats: Tensor) -> Metrics:
        """Metrics of the model on this site's test part."""
        test = self._data.test
        found = self._network.test(x[None], stats[None], test)
        return {
            **{f"test-{name}": value for name, value in found.items()},
            "test-examples": len(test.y),
        }
