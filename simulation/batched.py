"""All peers at once, in one vectorised pass: their models are the rows of one matrix [n, d].

The algorithms, codecs and topologies of the app, without messages: for experiments of the size of a
paper on one machine. Equal to the relay step for step, to rounding; but there, with ``lr-warmup``,
sites of other sizes begin with other rates. There is no world: no site is slow or away, and time is
the machine's own.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from client_app.peer import learning_rate, peer_of
from client_app.site import SiteId, device_of, network_of, site_data
from configuration.config import Config
from configuration.errors import ConfigError
from configuration.graph import graph_of
from datasets.site import SiteData
from server_app.consensus import consensus_distance
from server_app.discovery import Federation, RunError, an_epoch, budget
from server_app.events import EVERYBODY, Progress
from server_app.report import Measure
from server_app.results import History
from simulation.vectorised import Batch, Networks, PeerBatches, check_network
from strategies.averaging.average import NUM_EXAMPLES
from strategies.codecs import num_bytes
from strategies.gradients import MEND
from strategies.peer.algorithm import PeerAlgorithm, Vectors, exchange
from strategies.peer.neighbourhood import Gradients, neighbourhood_gradients, owners_shift, weighted
from strategies.peer.step import encode, encode_gradient
from strategies.records import X, pack


class Peers:
    """All peers of a run.

    Args:
        config: the run.
        federation: the sites.
        history: gets everything that is measured.

    Raises:
        ConfigError: the network has BatchNorm statistics, which one pass for all peers cannot
            compute; or neighbours are not all offered the same.
    """

    def __init__(self, config: Config, federation: Federation, history: History) -> None:
        self._config, self._federation, self._history = config, federation, history
        self._topology, self._n = graph_of(config), len(federation.sites)
        sites = [SiteId(site.number, self._n, "") for site in federation.sites]
        self._data = [
            site_data(config, site, federation.classes, federation.moments) for site in sites
        ]
        self._network = network_of(config, federation.shape, len(federation.classes))
        self._measure = Measure.of(config, federation)
        model = self._network.model
        check_network(config, model)
        history.begin(federation, model)
        self._peer = peer_of(config, 0, model.sizes)
        if not isinstance(algorithm := self._peer.plan.algorithm, PeerAlgorithm):
            raise ConfigError(
                "engine = 'batched': "
                f"strategy = {config.strategy!r} offers each neighbour something "
                "else; allowed: 'app'"
            )
        self._algorithm = algorithm
        self.state = self._algorithm.init(self._network.x.expand(self._n, -1).clone())
        self._device = device_of(config.computing.device)
        self._memories: list[Vectors] = [()] * self._n
        self._gradient_memories: dict[tuple[int, int], Tensor] = {}
        self._networks = Networks(config, model, federation.shape)
        self._batches = PeerBatches(config, [data.train for data in self._data], self._device)
        self._losses: list[Tensor] = []
        # Bytes up to the relay and down from it.
        self._traffic = torch.zeros(self._n, 2, dtype=torch.int64)
        batches = an_epoch(federation, config.training.batch_size)
        self.exchanges, self._every = budget(config, self._peer.plan, batches)

    def run(self, watch: Callable[[Progress], None]) -> None:
        """Run all exchanges."""
        start = time.monotonic()
        for number in range(self.exchanges):
            self.step(number)
            if (number + 1) % self._every == 0 or number + 1 == self.exchanges:
                self._test(number + 1, time.monotonic() - start, watch)

    def step(self, number: int) -> None:
        """Run the local steps and the exchange ``number``, counted from 0."""
        plan, lr = (
            self._peer.plan,
            learning_rate(self._config, number / self.exchanges, (number + 1) / self.exchanges),
        )
        if plan.gradient.at == "own":
            for _ in range(plan.steps):
                self.state = self._algorithm.descend(self.state, self._own_gradients(), lr)
            sent = self._send(number)
        else:
            sent = self._send(number)
            gradients = self._neighbourhood_gradients(number, sent[0])
            self.state = self._algorithm.descend(self.state, gradients, lr)
        mixing = self._topology.mixing(number).to(self._device)
        mixed = tuple(mixing.to(vector) @ vector for vector in sent)
        self.state = exchange(self._algorithm, self.state, sent, mixed, self._peer.averaging_rate)

    # Gradients.

    def _own_gradients(self) -> Tensor:
        """The gradients of all peers at their own models, [n, d]."""
        batch, peer = self._batches.next(), self._peer
        own = torch.ones(self._n, dtype=torch.bool, device=self._device)

        def pair(x: Tensor, _: Tensor | None) -> Gradients:
            return self._networks.gradients(x, batch)

        taken = neighbourhood_gradients(pair, self.state.x, own, peer.plan.gradient, peer.regular)
        self._losses.append(taken.losses)
        return taken.gradients

    def _neighbourhood_gradients(self, number: int, received: Tensor) -> Tensor:
        """The weighted mean of every peer's neighbourhood, [n, d].

        ``received`` [n, d] are the models as neighbours have them.
        """
        gradient, batch = self._peer.plan.gradient, self._batches.next()
        weights = [self._topology.neighbours(number, peer) for peer in range(self._n)]
        links = [(i, j) for i in range(self._n) for j in (i, *weights[i])]
        readers, others = torch.tensor(links, device=self._device).T
        model, owner = (readers, others) if gradient.at == "data" else (others, readers)
        own = readers == others
        shift = owners_shift(
            lambda x, _: self._networks.gradients(x, batch), self.state.x, gradient
        )

        def pair(x: Tensor, rows: Tensor | None) -> Gradients:
            chosen = owner if rows is None else owner[rows]
            return self._networks.gradients(x, Batch(*(part[chosen] for part in batch)))

        points = torch.where(own[:, None], self.state.x[model], received[model])
        taken = neighbourhood_gradients(
            pair, points, own, gradient, self._peer.regular, None if shift is None else shift[model]
        )
        self._losses.append(taken.losses[own])
        found: list[dict[int, Tensor]] = [{} for _ in range(self._n)]
        for (i, j), row in zip(links, taken.gradients, strict=True):
            found[i][j] = (
                self._carried(row, j, i, number) if gradient.at == "data" and i != j else row
            )
        return torch.stack(
            [weighted(each.pop(i), each, weights[i]) for i, each in enumerate(found)]
        )

    # Exchanges.

    def _carried(self, gradient: Tensor, sender: int, reader: int, number: int) -> Tensor:
        """A gradient [d] as it reaches its reader; its bytes are counted."""
        memory = self._gradient_memories.get((sender, reader))
        memory = self._peer.cross.init(gradient) if memory is None else memory
        payload, memory, arrived = encode_gradient(
            self._peer._replace(number=sender), memory, gradient, reader, 2 * number + 1
        )
        self._gradient_memories[sender, reader] = memory
        self._traffic[sender, 0] += num_bytes(payload)
        self._traffic[reader, 1] += num_bytes(payload)
        return arrived

    def _send(self, number: int) -> Vectors:
        """What everybody offers, as neighbours have it; its bytes are counted."""
        peer, offered = self._peer, self._algorithm.outgoing(self.state)
        gradient = peer.plan.gradient
        if peer.channel.exact:
            sent, sizes = (
                offered,
                [sum(vector.shape[1] * vector.element_size() for vector in offered)] * self._n,
            )
        else:
            rows, sizes = [], []
            for k, own in enumerate(zip(*offered, strict=True)):
                step = gradient.messages * number
                payload, self._memories[k], decoded = encode(
                    peer._replace(number=k), self._memories[k], own, step
                )
                rows.append(decoded)
                sizes.append(num_bytes(payload))
            sent = tuple(map(torch.stack, zip(*rows, strict=True)))
        if gradient.at == "data" and gradient.rho and gradient.perturbed_by == "owner-of-model":
            sizes = [2 * size for size in sizes]  # the perturbation goes with the model
        for k, size in enumerate(sizes):
            self._traffic[k, 0] += size
            self._traffic[k, 1] += sum(sizes[j] for j in self._topology.neighbours(number, k))
        return sent

    def _test(self, number: int, seconds: float, watch: Callable[[Progress], None]) -> None:
        """Every peer's model on its own test part, their mean on everybody's; written down.

        Raises:
            RunError: a model is not finite.
        """
        if wrong := (~self.state.x.isfinite().all(1)).nonzero().flatten().tolist():
            raise RunError(
                f"exchange {number}: training diverged: "
                f"the models of the sites {wrong} are not finite; {MEND}"
            )
        mean = self.state.x.double().mean(0).float()
        own = [self._tested(x, data) for x, data in zip(self.state.x, self._data, strict=True)]
        of_mean = [self._tested(mean, data) for data in self._data]
        losses = torch.stack(self._losses).mean(0)
        self._losses.clear()
        # The first exchange after the last test; all of them.
        since, n = (number - 1) // self._every * self._every, self.exchanges
        first, last = (
            learning_rate(self._config, each / n, (each + 1) / n) for each in (since, number - 1)
        )
        train = {
            "loss": float(losses.mean()),
            "lr-first": first,
            "lr-last": last,
            "local-epochs": (number - since) * self._config.epochs / self.exchanges,
            "consensus-distance": consensus_distance(self.state.x),
        }
        measure, headline = self._measure, self._config.task.headline
        test = measure.combined(own) | measure.extremes([measure.of_site(each) for each in own])
        test |= {
            f"{headline}-of-mean": value
            for name, value in measure.combined(of_mean).items()
            if name == headline
        }
        self._write(number, seconds, train, test, losses.tolist(), own)
        epochs, sent = self._config.epochs, float(self._traffic.sum()) / 1e6
        done = number / self.exchanges * epochs
        counts = number, None, done, epochs, seconds, sent
        watch(Progress("exchange", *counts, train, test, headline=headline))

    def _tested(self, x: Tensor, data: SiteData) -> dict[str, float | list[float]]:
        found = self._network.test(x[None], x.new_empty(1, 0), data.test)
        return {**found, NUM_EXAMPLES: float(len(data.test.y))}

    def _write(
        self,
        number: int,
        seconds: float,
        train: dict[str, float],
        test: dict[str, float],
        losses: list[float],
        own: list[dict[str, float | list[float]]],
    ) -> None:
        history = self._history
        for site, loss, found, traffic in zip(
            self._federation.sites, losses, own, self._traffic.tolist(), strict=True
        ):
            history.record(number, seconds, site.number, "train", {"loss": loss}, *traffic)
            history.record(
                number, seconds, site.number, "test", self._measure.of_site(found), *traffic
            )
        for split, means in (("train", train), ("test", test)):
            history.record(number, seconds, EVERYBODY, split, means, *self._traffic.sum(0).tolist())
        history.update_model(pack({X: self.state.x}))
