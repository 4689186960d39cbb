"""A peer's part of an exchange: make something of what neighbours sent, train, and offer the result to them.

One message is one step. A plain step: mix, then train on ``local-steps`` batches, then offer. With neighbourhood gradients an
exchange takes two: *cross* (take gradients at the neighbours' models, offer these), and a plain one (descend along what came back,
mix, offer the model). All that a peer remembers is in ``context.state``.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from safetensors.torch import load, save, save_file
from torch import Tensor

from client_app import sealing, training
from client_app.site import dice, open_site
from configuration.config import Config
from configuration.graph import graph_of as topology_of
from strategies.averaging.mean import refusal
from strategies.codecs import Payload, codec
from strategies.method import PeerPlan
from strategies.peer.algorithm import Vectors, exchange
from strategies.peer.channel import channel
from strategies.peer.cross_gradients import perturbed
from strategies.randomness import derive
from strategies.records import (
    ARRAYS,
    CONFIG,
    FROM,
    METRICS,
    OFFER,
    STATS,
    TO,
    X,
    config_of,
    pack,
    pack_bytes,
    unpack,
    unpack_bytes,
)
from strategies.schedules import decay

PEER = "peer"  # the records in the context's state
SEALED, KEY = "sealed", "key"  # the parts of a sealed payload
SHIFT = "shift"  # in an offer: how far a model is perturbed by its owner


class Refused(ValueError):
    """What a neighbour sent cannot be used."""


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


class Peer:
    """A peer for the time of one message.

    Attributes:
        refused: what neighbours sent that cannot be used, and why.
    """

    def __init__(self, message: Message, context: Context) -> None:
        self.config, self.place, self.data, self.desk = open_site(message, context)
        self.told = config_of(message)
        self.step = int(self.told["server-round"])  # type: ignore[arg-type]
        self.number = self.place.number
        self.refused: list[str] = []
        self._message, self._context = message, context
        assert isinstance(self.config.plan, PeerPlan)
        self.plan = self.config.plan
        self._algorithm = self.plan.algorithm
        config, model = self.config, self.desk.model
        self._device = model.x.device
        self._way = channel(
            codec(config.wire.codec, model.sizes, bits=config.wire.bits, share=config.wire.share), config.wire.error_feedback
        )
        cross = codec(config.wire.cross_codec, model.sizes, bits=config.wire.bits, share=config.wire.share)
        self._cross_way = channel(cross, "none" if config.wire.cross_codec == "identity" else "deep-squeeze")
        # With these, neighbours have exactly what was offered, and nothing more needs to be remembered.
        self._plain = config.wire.codec == "identity" and config.wire.error_feedback == "none"
        self.sealed = config.wire.sealing != "off"
        self._recall()
        self._numbers["step"] = self.step
        self.broken: list[int] = []
        self.fresh = False
        self.stats = self._tensors.get(STATS, self.desk.stats)
        model.load(self.state.x, self.stats)
        self.neighbours = self._graph()

    def _graph(self) -> dict[int, float]:
        """Neighbours and their weights, which a peer knows itself; but for a file of edges, which only the server has."""
        if self.config.topology.name != "edges":
            exchange_number = (self.step - 1) // self.plan.gradient.messages
            return topology_of(self.config).neighbours(exchange_number, self.number) if self.step else {}
        told: Any = self.told
        found = dict(zip(told["neighbours"], told["weights"], strict=True))
        if not all(0 < weight <= 1 for weight in found.values()) or not sum(found.values()) <= 1 + 1e-9:
            raise ValueError(f"the server tells the weights {found}: above 0 and at most 1 in all is expected")
        return found

    def _listeners(self, name: str) -> list[int]:
        """Who may read what is offered under ``name``."""
        told: Any = [name.removeprefix(TO)] if name.startswith(TO) else self.told["listeners"]
        readers = list(map(int, told))
        if self.config.topology.name == "edges":
            return readers
        known = topology_of(self.config).readers(self.number)
        return [reader for reader in readers if reader in known]

    # What is remembered: tensors and numbers by name, in two records.

    def _recall(self) -> None:
        memory, numbers = self._context.state.get(PEER), self._context.state.get(f"{PEER}-numbers")
        known: dict[str, Tensor] = {}
        if isinstance(memory, ArrayRecord):
            known = {name: unpack(array).to(self._device) for name, array in memory.items()}
        self._tensors = known
        self._numbers: dict[str, Any] = dict(numbers) if isinstance(numbers, ConfigRecord) else {}
        fresh = self._algorithm.init(self.desk.x)
        self._anew = not known and self.step > 0
        if not known:
            self.state = fresh
            self._numbers |= {"batches": 0, "fresh": 1}
        else:
            self.state = type(fresh)(*(known.get(f"state-{k}", part.new_empty(0)) for k, part in enumerate(fresh)))
            done = int(self._numbers.get("step", 0))
            # A sealed step has one content only; in the last there is none.
            if self.step < done or (self.sealed and self.step == done and not self.told["last"]):
                raise ValueError(f"step {self.step} comes again")
            if (self.told.get("rejoin") or self.told.get("fresh")) and self.config.wire.error_feedback == "choco":
                # Neighbours may not have what was sent last: both sides start their copies anew.
                self._tensors = {name: value for name, value in known.items() if not name.startswith("memory-")}
                self._numbers["fresh"] = 1

    def _remember(self) -> ArrayRecord:
        self._tensors |= {f"state-{k}": part for k, part in enumerate(self.state)}
        self._tensors[STATS] = self.stats
        memory = self._context.state[PEER] = pack(self._tensors)
        self._context.state[f"{PEER}-numbers"] = ConfigRecord(self._numbers)
        return memory

    # What neighbours sent.

    def received(self, kind: str) -> Iterator[tuple[int, int, Payload]]:
        """Payloads that can be used: sender, its step, payload; of each sender in the order of its steps."""
        for sender in self.neighbours:
            record = self._message.content.get(f"{FROM}{sender}")
            if not isinstance(record, ArrayRecord):
                continue
            steps: dict[int, dict[str, Array]] = {}
            for name, array in record.items():
                number, _, part = name.partition("/")
                steps.setdefault(int(number), {})[part] = array
            for step in sorted(steps):
                last = int(self._numbers.get(f"last-{sender}", -1))
                if step == last and self.told.get("rejoin") and self.config.wire.error_feedback != "choco":
                    continue  # the answer to it was lost
                try:
                    if step <= last:
                        raise Refused(f"step {step} came before")
                    payload = self._opened(steps[step], sealing.Header(self._context.run_id, sender, step, kind))
                except Exception as error:
                    self._refuse(sender, error)
                else:
                    self._numbers[f"last-{sender}"] = step
                    yield sender, step, payload

    def _refuse(self, sender: int, error: Exception) -> None:
        """Whatever is wrong with numbers that a stranger may have made costs that neighbour its place in this exchange."""
        known = isinstance(error, Refused | sealing.SealError)
        self.refused.append(f"site {sender}: {error if known else f'cannot be read: {type(error).__name__}: {error}'}")
        if self.config.wire.error_feedback == "choco":
            self.broken.append(sender)

    def _opened(self, arrays: dict[str, Array], header: sealing.Header) -> Payload:
        if not self.sealed:
            return {name: unpack(array).to(self._device) for name, array in arrays.items()}
        missing = {SEALED, KEY} - set(arrays)
        if missing:
            raise Refused(f"step {header.step} is not sealed for this site")
        data = self._keys().open(unpack_bytes(arrays[SEALED]), unpack_bytes(arrays[KEY]), header)
        return {name: value.to(self._device) for name, value in load(data).items()}

    def _keys(self) -> sealing.Keyring:
        return sealing.keyring(self._context, self.config.wire.sealing, self.number, self.told)

    def models(self) -> dict[int, tuple[Vectors, Tensor, Tensor]]:
        """Of each neighbour that sent it: its vectors, its statistics, and by how much it perturbs its model."""
        found: dict[int, tuple[Vectors, Tensor, Tensor]] = {}
        like, choco = self._algorithm.outgoing(self.state), self.config.wire.error_feedback == "choco"
        for sender, step, payload in self.received("model"):
            try:
                before = [torch.zeros_like(vector) for vector in like] if choco else list(like)  # the others decode without it
                if choco and "fresh" not in payload:
                    if int(payload["after"]) != int(self._numbers.get(f"hat-{sender}", -1)):
                        raise Refused(f"step {step} goes on from a step that is missing here")
                    before = [self._tensors[f"hat-{sender}-{k}"] for k in range(len(like))]
                vectors = tuple(self._way.decode(_part(payload, f"{k}."), hat) for k, hat in enumerate(before))
                stats, shift = payload.get(STATS, self.stats), payload.get(SHIFT, like[0].new_zeros(1))
                expected = (*like, self.stats, like[0] if SHIFT in payload else shift)
                for vector, wanted in zip((*vectors, stats, shift), expected, strict=True):
                    if vector.shape != wanted.shape or vector.dtype != wanted.dtype:
                        got, asked = (f"{each.dtype} of shape {tuple(each.shape)}" for each in (vector, wanted))
                        raise Refused(f"a vector is {got}, {asked} is expected")
                    if vector.numel() and (reason := refusal(vector)):
                        raise Refused(reason)
            except Exception as error:
                self._refuse(sender, error)
                found.pop(sender, None)
                continue
            found[sender] = vectors, stats, shift
            if choco:
                self._numbers[f"hat-{sender}"] = step
                self._tensors |= {f"hat-{sender}-{k}": hat for k, hat in enumerate(vectors)}
        return found

    def weighted(self, own: Tensor, theirs: dict[int, Tensor]) -> Tensor:
        """``sum_j w_ij v_j``; the weight of a neighbour that sent nothing goes to the peer itself."""
        total = own * (1 - sum(self.neighbours[j] for j in theirs))
        for j, vector in theirs.items():
            total.add_(vector, alpha=self.neighbours[j])
        return total

    def mixed(self, found: dict[int, tuple[Vectors, Tensor, Tensor]]) -> Vectors:
        """Weighted means of every vector; the statistics' become the peer's own at once."""
        if self.stats.numel():
            self.stats = self.weighted(self.stats, {j: stats for j, (_, stats, _) in found.items()})
        return tuple(self.weighted(own, {j: theirs[0][k] for j, theirs in found.items()}) for k, own in enumerate(self.sent()))

    def sent(self) -> Vectors:
        """Own vectors as neighbours have them."""
        like = self._algorithm.outgoing(self.state)
        return like if self._plain else tuple(self._tensors.get(f"sent-{k}", vector) for k, vector in enumerate(like))

    def exchange(self, mixed: Vectors) -> None:
        """Take over what was mixed."""
        self.state = exchange(self._algorithm, self.state, self.sent(), mixed, self.config.topology.averaging_rate)

    # Training.

    def gradient(self, x: Tensor, batch: training.Batch, *, sharp: bool = True, track: bool = False) -> tuple[Tensor, Tensor]:
        """Loss and gradient (a copy) at ``x``, sharpness-aware if asked for, with weight decay towards ``x``'s zero."""
        value, g = (self.desk.sharp if sharp else self.desk.plain)(x, batch, track=track)
        if self.config.training.clip_norm:
            g = g * min(1.0, self.config.training.clip_norm / (float(torch.linalg.vector_norm(g)) + 1e-6))
        return value, torch.add(g, x, alpha=self.config.training.weight_decay)

    def next_batch(self) -> training.Batch:
        """The batch that comes next; :meth:`used` goes on to the one after it."""
        return nth_batch(self.config, self.number, self.data.train, self._numbers["batches"])

    def used(self) -> None:
        """The batch was trained on."""
        self._numbers["batches"] += 1

    def rate(self) -> float:
        """The learning rate."""
        config, done = self.config, float(self.told["cycle-from"])  # type: ignore[arg-type]
        return config.training.lr * decay(config.training.lr_shape, config.training.lr_ratio, done)

    def luck(self) -> Any:
        """What layers draw in this step."""
        return dice(self._device, derive(self.config.seed, "layers", self.number, self.step))

    def descend(self, gradient: Tensor) -> None:
        """A local step."""
        self.state = self._algorithm.descend(self.state, gradient, self.rate())

    def train(self) -> float:
        """``local-steps`` batches; the mean loss."""
        model, total = self.desk.model, torch.zeros((), device=self._device)
        model.load(self.state.x, self.stats)
        with self.luck():
            for _ in range(self.plan.steps):
                model.x.copy_(self.state.x)
                value, g = self.gradient(model.x, self.next_batch(), track=True)
                self.used()
                total += value
                self.descend(g)
        self.stats = model.stats
        return float(total) / self.plan.steps

    def test(self) -> dict[str, float | int]:
        """The own model on the own test part."""
        model = self.desk.model
        result = training.evaluate(self.desk.predict, model, self.state.x[None], self.stats[None], self.data.test)
        model.load(self.state.x, self.stats)
        return {**{f"test-{key}": value for key, value in result.items()}, "test-examples": len(self.data.test.y)}

    # What is offered.

    def offer(self, shift: Tensor | None = None) -> dict[str, Payload]:
        """The model, and what goes with it, for all neighbours."""
        payload: Payload = {}
        generator = torch.Generator().manual_seed(derive(self.config.seed, "codec", self.number, self.step))
        for k, vector in enumerate(self._algorithm.outgoing(self.state)):
            memory = self._tensors.get(f"memory-{k}")
            encoded, memory, own = self._way.encode(self._way.init(vector) if memory is None else memory, vector, generator)
            payload |= {f"{k}.{name}": value for name, value in encoded.items()}
            if not self._plain:
                self._tensors |= {f"memory-{k}": memory, f"sent-{k}": own}
        if self.stats.numel():
            payload[STATS] = self.stats
        if shift is not None:
            payload[SHIFT] = shift
        if self.config.wire.error_feedback == "choco":
            self.fresh = bool(self._numbers.pop("fresh", 0))
            after = int(self._numbers.get("offered", -1))
            payload["fresh" if self.fresh else "after"] = torch.tensor([after])  # a chain: nobody goes on from a wrong copy
            self._numbers["offered"] = self.step
        return {OFFER: payload}

    def offer_gradients(self, gradients: dict[int, Tensor]) -> dict[str, Payload]:
        """A gradient for each neighbour."""
        offered = {}
        for j, gradient in gradients.items():
            generator = torch.Generator().manual_seed(derive(self.config.seed, "cross-codec", self.number, j, self.step))
            memory = self._tensors.get(f"cross-{j}")
            payload, memory, _ = self._cross_way.encode(
                self._cross_way.init(gradient) if memory is None else memory, gradient, generator
            )
            if memory.numel():
                self._tensors[f"cross-{j}"] = memory
            offered[f"{TO}{j}"] = payload
        return offered

    def gradients(self) -> dict[int, Tensor]:
        """Of each neighbour that sent it: its gradient at this peer's model."""
        found = {}
        for sender, _, payload in self.received("gradient"):
            try:
                gradient = self._cross_way.decode(payload, self.state.x)
                if gradient.shape != self.state.x.shape or gradient.dtype != self.state.x.dtype:
                    raise Refused(f"a gradient is {gradient.dtype} of shape {tuple(gradient.shape)}")
                if reason := refusal(gradient):
                    raise Refused(reason)
            except Exception as error:
                self._refuse(sender, error)
            else:
                found[sender] = gradient
        return found

    def keep(self, **vectors: Tensor) -> None:
        """Remember until the next step."""
        self._tensors |= vectors

    def kept(self, name: str, default: Tensor | None = None) -> Tensor:
        """What :meth:`keep` kept."""
        return self._tensors.pop(name) if default is None else self._tensors.pop(name, default)

    def reply(self, offered: dict[str, Payload], metrics: dict[str, float | int], kind: str) -> Message:
        """Remember everything, seal what is offered, answer."""
        arrays: dict[str, Array] = {}
        memory = self._remember()
        packed = {id(tensor): memory[name] for name, tensor in self._tensors.items() if name in memory}
        for name, payload in offered.items():
            if not self.sealed:  # what is remembered too need not be copied twice
                known = {part: packed[id(value)] for part, value in payload.items() if id(value) in packed}
                new = pack({part: value for part, value in payload.items() if part not in known})
                arrays |= {f"{name}/{part}": array for part, array in (known | dict(new)).items()}
                continue
            header = sealing.Header(self._context.run_id, self.number, self.step, kind)
            data = save({part: value.detach().cpu().contiguous() for part, value in payload.items()})
            ring, readers = self._keys(), self._listeners(name)
            self.refused += [f"site {reader}: this site has no public key of it" for reader in readers if not ring.knows(reader)]
            sealed, keys = ring.seal(data, filter(ring.knows, readers), header)
            arrays[f"{name}/{SEALED}"] = pack_bytes(sealed)
            arrays |= {f"{TO}{reader}/{KEY}": pack_bytes(key) for reader, key in keys.items()}
        content = RecordDict(
            {
                ARRAYS: ArrayRecord(arrays),
                METRICS: MetricRecord({"num-examples": len(self.data.train.y), **metrics}),
                CONFIG: ConfigRecord({"refused": self.refused, "broken": self.broken, "fresh": self.fresh, "anew": self._anew}),
            }
        )
        if self.told.get("last"):
            self._hand_over(content)
        return Message(content, reply_to=self._message)

    def _hand_over(self, content: RecordDict) -> None:
        """The finished model: to the server if it may have it, and into the file that the site names."""
        if self.config.wire.collect_models and not self.sealed:
            content["model"] = pack({X: self.state.x, STATS: self.stats})
        if "save" in self._context.node_config:
            path = Path(str(self._context.node_config["save"]))
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(self.desk.model.state_dict(self.state.x, self.stats), path)


def _part(payload: Payload, prefix: str) -> Payload:
    return {name.removeprefix(prefix): value for name, value in payload.items() if name.startswith(prefix)}


def take_step(message: Message, context: Context) -> Message:
    """A plain step, or the second one of an exchange of neighbourhood gradients."""
    peer = Peer(message, context)
    config = peer.config
    plan = peer.plan
    crossing = plan.gradient.at != "own"
    metrics: dict[str, float | int] = {}
    samples = 0
    passes = 2 if peer.plan.gradient.rho else 1
    if peer.step and plan.gradient.messages == 2:
        found = peer.gradients()
        own = peer.kept("own-gradient")
        peer.descend(peer.weighted(own, found))
        peer.exchange((peer.kept("mixed"),))
        metrics |= {"loss": float(peer.kept("own-loss")), "lr-first": peer.rate(), "lr-last": peer.rate()}
    elif peer.step:
        models = peer.models()
        mixed = peer.mixed(models)
        if peer.told["test"]:
            metrics["disagreement"] = disagreement(peer, models)
        if crossing:
            batch, sharp = peer.next_batch(), plan.gradient.perturbed_by == "owner-of-data"
            with peer.luck():
                value, own = peer.gradient(peer.state.x, batch, track=True)
                theirs = {j: peer.gradient(v[0], batch, sharp=sharp)[1] for j, (v, _, _) in models.items()}
            peer.used()
            samples += len(batch[1]) * passes * (1 + len(theirs))
            peer.descend(peer.weighted(own, theirs))
            metrics |= {"loss": float(value), "lr-first": peer.rate(), "lr-last": peer.rate()}
        peer.exchange(mixed)
    if peer.told["test"]:
        metrics |= peer.test()
    if peer.told["last"]:
        return peer.reply({}, {**metrics, "samples": samples}, "model")
    if crossing:
        shift = None
        if plan.gradient.rho and plan.gradient.perturbed_by == "owner-of-model":
            with peer.luck():
                own = peer.desk.plain(peer.state.x, peer.next_batch(), track=False)[1]  # weight decay does not perturb
            shift = perturbed(peer.state.x, own, peer.plan.gradient.rho) - peer.state.x
            peer.keep(shift=shift)
        offered = peer.offer(shift)
    else:
        metrics |= {"loss": peer.train(), "lr-first": peer.rate(), "lr-last": peer.rate()}
        samples += passes * plan.steps * min(config.training.batch_size, len(peer.data.train.y))
        offered = peer.offer()
    return peer.reply(offered, {**metrics, "samples": samples}, "model")


def cross_step(message: Message, context: Context) -> Message:
    """The first step of an exchange of neighbourhood gradients: the own loss, differentiated at the neighbours' models."""
    peer = Peer(message, context)
    models = peer.models()
    mixed = peer.mixed(models)
    batch = peer.next_batch()
    by_model = bool(peer.plan.gradient.rho) and peer.plan.gradient.perturbed_by == "owner-of-model"
    with peer.luck():
        here = peer.state.x + peer.kept("shift", torch.zeros(1)) if by_model else peer.state.x
        value, own = peer.gradient(here, batch, sharp=not by_model, track=True)
        sharp = peer.plan.gradient.perturbed_by == "owner-of-data"
        gradients = {j: peer.gradient(v[0] + shift, batch, sharp=sharp)[1] for j, (v, _, shift) in models.items()}
    peer.used()
    peer.keep(**{"own-gradient": own, "own-loss": value.reshape(1), "mixed": mixed[0]})
    samples = len(batch[1]) * (2 if peer.plan.gradient.rho else 1) * (1 + len(gradients))
    return peer.reply(peer.offer_gradients(gradients), {"samples": samples, "disagreement": disagreement(peer, models)}, "gradient")


def disagreement(peer: Peer, models: dict[int, tuple[Vectors, Tensor, Tensor]]) -> float:
    """``sqrt(sum_j w_ij |x_j - x_i|^2)``: how far this peer is from its neighbours, which needs nobody to see all models."""
    own = peer.sent()[0]
    squares = [peer.neighbours[j] * torch.linalg.vector_norm(v[0] - own) ** 2 for j, (v, _, _) in models.items()]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0
