"""All peers at once: their models are the rows of one matrix [n, d], and one vectorised pass computes all their gradients.

The algorithms, codecs and topologies of the app, without messages: for experiments of the size of a paper on one machine. Equal to
the relay step for step, to rounding. There is no world: nobody is slow or away, and time is the machine's own.
"""

import time
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional as F

from client_app import training
from client_app.peer import nth_batch, order_of
from client_app.site import Place, device_of, site_data, workplace
from server_app.census import Federation, RunError, budget
from server_app.consensus import consensus_distance
from server_app.events import EVERYBODY, Progress
from server_app.results import History
from strategies.codecs import codec, num_bytes
from strategies.config import CROSS, Config, ConfigError
from strategies.peer.algorithm import Vectors, exchange
from strategies.peer.channel import Channel, channel
from strategies.peer.cross_gradients import cross_gradients, perturbed
from strategies.randomness import derive
from strategies.records import X, pack
from strategies.registry import peer_algorithm, peer_topology
from strategies.schedules import decay


class Peers:
    """All peers of a run.

    Args:
        config: the run.
        federation: the sites.
        history: is told everything.

    Raises:
        ConfigError: the network has BatchNorm statistics, which one pass for all peers cannot keep.
    """

    def __init__(self, config: Config, federation: Federation, history: History) -> None:
        self._config, self._federation, self._history = config, federation, history
        self._topology, self._algorithm = peer_topology(config), peer_algorithm(config)
        self._n = len(federation.sites)
        places = [Place(site.number, self._n, "") for site in federation.sites]
        self._data = [site_data(config, place, federation.classes, federation.moments) for place in places]
        self._desk = workplace(config, federation.shape, len(federation.classes))
        model = self._desk.model
        if model.num_stats:
            raise ConfigError(f"norm = {config.norm!r}: engine = 'batched' takes no BatchNorm; allowed: 'group', 'evonorm'")
        history.begin(federation, model)
        self.state = self._algorithm.init(self._desk.x.expand(self._n, -1).clone())
        self._device = device_of(config.device)
        self._way = self._channel(config.codec, config.error_feedback)
        self._cross_way = self._channel(config.cross_codec, "none" if config.cross_codec == "identity" else "deep-squeeze")
        self._memories: dict[tuple[object, ...], Tensor] = {}
        self._batches = 0
        self._losses: list[Tensor] = []
        self._traffic = torch.zeros(self._n, 2, dtype=torch.int64)  # bytes up to the relay and down from it
        self._pool = torch.cat([data.train.x for data in self._data]), torch.cat([data.train.y for data in self._data])
        self._starts = [0, *torch.tensor([len(data.train.y) for data in self._data]).cumsum(0).tolist()]
        # On a CPU, the convolutions of many networks at once are slower than one after the other, but for small pictures.
        convolutional = any(isinstance(module, torch.nn.Conv2d) for module in model.network.modules())
        self._one_by_one = self._device.type == "cpu" and convolutional and federation.shape[-1] > 16
        self._gradients = vmap(grad_and_value(self._loss), randomness="different")
        an_epoch = sum(-(-site.num_train // config.batch_size) for site in federation.sites) / self._n
        self.exchanges, self._every = budget(config, an_epoch)

    def _channel(self, name: str, feedback: str) -> Channel | None:
        """None where neighbours have exactly what was offered."""
        if name == "identity" and feedback == "none":
            return None
        found = codec(name, self._desk.model.sizes, bits=self._config.codec_bits, share=self._config.codec_share)
        return channel(found, feedback)

    def run(self, watch: Callable[[Progress], None]) -> None:
        """All exchanges."""
        start = time.monotonic()
        for number in range(self.exchanges):
            self.step(number)
            if (number + 1) % self._every == 0 or number + 1 == self.exchanges:
                self._test(number + 1, time.monotonic() - start, watch)

    def step(self, number: int) -> None:
        """Local steps and the exchange ``number``, counted from 0."""
        config = self._config
        lr = config.lr * decay(config.lr_shape, config.lr_ratio, number / self.exchanges)
        mixing = self._topology.mixing(number).to(self._device)
        if config.strategy in CROSS:
            sent = self._send(number)
            self.state = self._algorithm.descend(self.state, self._cross(number, sent[0], mixing), lr)
        else:
            for _ in range(config.local_steps):
                batch = self._batch()
                value, gradient = self._gradient(self.state.x, batch)
                if config.sam_radius:
                    gradient = self._gradient(perturbed(self.state.x, gradient, config.sam_radius), batch)[1]
                self._losses.append(value)
                self.state = self._algorithm.descend(self.state, self._regular(gradient, self.state.x), lr)
            sent = self._send(number)
        mixed = tuple(mixing.to(vector) @ vector for vector in sent)
        self.state = exchange(self._algorithm, self.state, sent, mixed, config.averaging_rate)

    # Gradients.

    def _loss(self, x: Tensor, inputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """One peer's mean loss [] at ``x`` [d]."""
        network, model = self._desk.model.network, self._desk.model
        names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        shapes = [parameter.shape for parameter in network.parameters() if parameter.requires_grad]
        parts = {name: part.view(shape) for name, part, shape in zip(names, x.split(model.sizes), shapes, strict=True)}
        each = F.cross_entropy(functional_call(network, parts, (inputs,)).float(), labels, reduction="none")
        return (each * weights).sum()

    def _batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Everybody's next batch: inputs [n, b, ...], labels [n, b], and weights [n, b], 0 where a smaller batch is padded."""
        config, number = self._config, self._batches
        self._batches += 1
        if config.augment != "none":
            batches = [nth_batch(config, peer, data.train, number) for peer, data in enumerate(self._data)]
            longest = max(len(y) for _, y in batches)
            inputs = torch.stack([F.pad(x, (0, 0) * (x.dim() - 1) + (0, longest - len(x))) for x, _ in batches])
            labels = torch.stack([F.pad(y, (0, longest - len(y))) for _, y in batches])
            return inputs, labels, _weights([len(y) for _, y in batches], longest).to(inputs.device)
        chosen = []
        for peer, data in enumerate(self._data):
            an_epoch = training.num_batches(len(data.train.y), config.batch_size)
            order = order_of(config, peer, number // an_epoch, len(data.train.y))
            chosen.append(self._starts[peer] + order.tensor_split(an_epoch)[number % an_epoch])
        places = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True).to(self._device)
        inputs = training.prepare(self._pool[0][places])
        return inputs, self._pool[1][places], _weights([len(each) for each in chosen], places.shape[1]).to(self._device)

    def _gradient(self, x: Tensor, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Losses [m] and gradients [m, d]."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._config.precision == "bfloat16"):
            if not self._one_by_one:
                gradient, value = self._gradients(x, *batch)
                return value, gradient
            model = self._desk.model
            values, gradients = [], []
            for row, inputs, labels, weights in zip(x, *batch, strict=True):
                model.x.copy_(row)
                loss = (F.cross_entropy(model.network(inputs).float(), labels, reduction="none") * weights).sum()
                model.backward(loss)
                values.append(loss.detach())
                gradients.append(model.grad.clone())
        return torch.stack(values), torch.stack(gradients)

    def _regular(self, gradient: Tensor, x: Tensor) -> Tensor:
        """Clipped, with weight decay."""
        if self._config.clip_norm:
            norms = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
            gradient = gradient * (self._config.clip_norm / (norms + 1e-6)).clamp(max=1)
        return torch.add(gradient, x, alpha=self._config.weight_decay)

    def _cross(self, number: int, received: Tensor, mixing: Tensor) -> Tensor:
        config, batch = self._config, self._batch()
        passes: list[Tensor] = []

        def pair(x: Tensor, owner: Tensor) -> Tensor:
            value, gradient = self._gradient(x, (batch[0][owner], batch[1][owner], batch[2][owner]))
            passes.append(value)
            return gradient

        def carry(gradients: Tensor, owner: Tensor, model: Tensor) -> Tensor:
            own = owner == model
            values = next(each for each in passes if len(each) == len(owner))
            losses = values.new_zeros(self._n).index_add_(0, owner, values) / torch.bincount(owner, minlength=self._n)
            losses[owner[own]] = values[own]  # all of them, but for a peer that gives itself no weight
            self._losses.append(losses)
            gradients = self._regular(gradients, torch.where(own[:, None], self.state.x[model], received[model]))
            if config.cross_gradients == "model":
                return gradients  # they stay where they were taken
            arrived = []
            for wanted, sender, reader in zip(gradients, owner.tolist(), model.tolist(), strict=True):
                if sender == reader:
                    arrived.append(wanted)
                    continue
                if self._cross_way is None:
                    arrived.append(wanted)
                    count = 4 * wanted.numel()
                else:
                    generator = torch.Generator().manual_seed(derive(config.seed, "cross-codec", sender, reader, 2 * number + 1))
                    key = ("cross", sender, reader)
                    memory = self._memories.get(key, torch.zeros_like(wanted))
                    payload, self._memories[key], got = self._cross_way.encode(memory, wanted, generator)
                    arrived.append(got)
                    count = num_bytes(payload)
                self._traffic[sender, 0] += count
                self._traffic[reader, 1] += count
            return torch.stack(arrived)

        return cross_gradients(
            pair,
            self.state.x,
            received,
            mixing,
            variant=config.cross_gradients,
            rho=config.sam_radius,
            perturbation=config.cross_perturbation,
            carry=carry,
        )

    # Exchanges.

    def _send(self, number: int) -> Vectors:
        """What everybody offers, as neighbours have it; its bytes are counted."""
        offered = self._algorithm.outgoing(self.state)
        sizes = torch.zeros(self._n, dtype=torch.int64)
        if self._way is None:
            sent = offered
            sizes += sum(vector.shape[1] * vector.element_size() for vector in offered)
        else:
            rows: list[list[Tensor]] = [[] for _ in offered]
            for peer in range(self._n):
                seed = derive(self._config.seed, "codec", peer, (2 if self._config.two_steps else 1) * number)
                generator = torch.Generator().manual_seed(seed)
                for k, vector in enumerate(offered):
                    memory = self._memories.get((peer, k))
                    payload, self._memories[peer, k], own = self._way.encode(
                        self._way.init(vector[peer]) if memory is None else memory, vector[peer], generator
                    )
                    rows[k].append(own)
                    sizes[peer] += num_bytes(payload)
            sent = tuple(torch.stack(each) for each in rows)
        if self._config.strategy in CROSS and self._config.cross_perturbation == "owner-of-model" and self._config.sam_radius:
            sizes *= 2  # the perturbation goes with the model
        self._traffic[:, 0] += sizes
        for peer in range(self._n):
            self._traffic[peer, 1] += sum(int(sizes[j]) for j in self._topology.neighbours(number, peer))
        return sent

    def _test(self, number: int, seconds: float, watch: Callable[[Progress], None]) -> None:
        """Every peer's model on its own test part, their mean on everybody's; written down.

        Raises:
            RunError: a model is not finite.
        """
        if wrong := (~self.state.x.isfinite().all(1)).nonzero().flatten().tolist():
            raise RunError(f"exchange {number}: the models of the sites {wrong} are not finite; a smaller lr may help")
        history, config, model = self._history, self._config, self._desk.model
        none = self.state.x.new_empty(1, 0)
        mean = self.state.x.double().mean(0).float()
        counts = torch.tensor([site.num_test for site in self._federation.sites], dtype=torch.float64)
        own, of_mean = ([] for _ in range(2))  # type: list[dict[str, float]], list[dict[str, float]]
        for x, data in zip(self.state.x, self._data, strict=True):
            own.append(training.evaluate(self._desk.predict, model, x[None], none, data.test))
            of_mean.append(training.evaluate(self._desk.predict, model, mean[None], none, data.test))
        losses = torch.stack(self._losses).mean(0)
        self._losses.clear()
        epochs = config.epochs / self.exchanges
        since = (number - 1) // self._every * self._every  # the first exchange after the last test
        first, last = (config.lr * decay(config.lr_shape, config.lr_ratio, each / self.exchanges) for each in (since, number - 1))
        train = {
            "loss": float(losses.mean()),
            "lr-first": first,
            "lr-last": last,
            "local-epochs": (number - since) * epochs,
            "consensus-distance": consensus_distance(self.state.x),
        }
        share = counts / counts.sum()
        test = {key: float(sum(w * each[key] for w, each in zip(share.tolist(), own, strict=True))) for key in ("loss", "accuracy")}
        test["accuracy-worst"] = min(each["accuracy"] for each in own)
        test["accuracy-best"] = max(each["accuracy"] for each in own)
        test["accuracy-of-mean"] = float(sum(w * each["accuracy"] for w, each in zip(share.tolist(), of_mean, strict=True)))
        for site, loss, found, (up, down) in zip(self._federation.sites, losses.tolist(), own, self._traffic.tolist(), strict=True):
            history.record(number, seconds, site.number, "train", {"loss": loss}, up, down)
            history.record(number, seconds, site.number, "test", found, up, down)
        up, down = self._traffic.sum(0).tolist()
        history.record(number, seconds, EVERYBODY, "train", train, up, down)
        history.record(number, seconds, EVERYBODY, "test", test, up, down)
        history.keep(pack({X: self.state.x}))
        watch(Progress("exchange", number, None, number * epochs, config.epochs, seconds, (up + down) / 1e6, train, test))


@lru_cache(maxsize=16)
def _weights_of(counts: tuple[int, ...], longest: int) -> Tensor:
    return torch.stack([torch.cat([torch.full((count,), 1 / count), torch.zeros(longest - count)]) for count in counts])


def _weights(counts: list[int], longest: int) -> Tensor:
    """[n, longest]: each row sums to 1 over its batch."""
    return _weights_of(tuple(counts), longest)
