"""A peer's step as a function.

From what a peer remembered and what its neighbours sent, it makes what the peer remembers next and
offers its neighbours.

A plain exchange is one step (:func:`models_step`): mix the neighbours' vectors, train, offer. An
exchange of neighbourhood gradients in the data variant is two: :func:`cross_step` takes gradients
at the neighbours' models and offers these, then :func:`models_step` descends along what came back,
mixes, and offers the model.

Nothing here knows Flower, files or clocks. What is drawn follows from the seed, the peer's number
and the step's.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from strategies.averaging.mean import fault
from strategies.codecs import Payload
from strategies.gradients import Diverged
from strategies.peer.algorithm import LinkAlgorithm, PeerAlgorithm, Vectors, exchange
from strategies.peer.neighbourhood import (
    Gradients,
    disagreement,
    neighbourhood_gradients,
    owners_shift,
    weighted,
)
from strategies.peer.state import (
    Hat,
    Metrics,
    Oracle,
    Order,
    Peer,
    PeerState,
    Pending,
    Received,
    RefusedPayload,
    Result,
)
from strategies.randomness import derive
from strategies.robust import neighbourhood_mean
from strategies.saving import flatten

# Parts of a payload, beside those of the codec.
STATS, SHIFT, RESET, AFTER = "stats", "shift", "reset", "after"
OLDEST = 16  # steps: what is older is of no use, and may be delivered by somebody who held it back
T = TypeVar("T")


class InvalidPayload(ValueError):
    """A neighbour's payload cannot be used; the message says why."""


def reason_of(error: Exception) -> str:
    """Why a neighbour's payload cannot be used, from the ``error`` that it raised."""
    return (
        str(error)
        if isinstance(error, InvalidPayload)
        else f"cannot be read: {type(error).__name__}: {error}"
    )


class Model(NamedTuple):
    """A neighbour's vectors, decoded.

    Attributes:
        vectors: its vectors.
        stats: its BatchNorm statistics.
        shift: how far it perturbed its model; empty: not at all.
    """

    vectors: Vectors
    stats: Tensor
    shift: Tensor


def begin(peer: Peer, x: Tensor, stats: Tensor) -> PeerState:
    """The state at a model ``x`` [d] and BatchNorm statistics ``stats`` [b], before any step."""
    return PeerState(peer.plan.algorithm.init(x), stats, shift=x.new_empty(0))


def models_step(
    peer: Peer, state: PeerState, received: Iterable[Received], order: Order, oracle: Oracle
) -> Result:
    """Mix what neighbours sent, train, offer the result.

    Of neighbourhood gradients in the data variant, it ends the exchange that :func:`cross_step`
    began.

    Raises:
        ValueError: the step is none of this run, the exchange that it ends has not begun, or the
            model is not finite any more.
    """
    state, metrics, refused = _start(peer, state, order), Metrics(), tuple[RefusedPayload, ...]()
    if order.step and peer.plan.gradient.messages == 2:
        state, metrics, refused = _finish(peer, state, received, order)
    elif order.step:
        state, metrics, refused = _mix_and_train(peer, state, received, order, oracle)
    if order.test:
        metrics |= oracle.test(state.x, state.stats)
    if order.last:
        return Result(_finite(state), {}, metrics, refused)
    if peer.plan.gradient.at == "own":
        state, trained = _train(peer, state, order, oracle)
        metrics |= trained
    else:
        pair = _pair(state, oracle)
        shift = owners_shift(pair, state.x[None], peer.plan.gradient)
        state = state._replace(shift=state.x.new_empty(0) if shift is None else shift[0])
    reset = peer.channel.chained and state.reset
    state, offers = _offer(peer, _finite(state), order)
    return Result(state if peer.channel.exact else _finite(state), offers, metrics, refused, reset)


def cross_step(
    peer: Peer, state: PeerState, received: Iterable[Received], order: Order, oracle: Oracle
) -> Result:
    """The first step of an exchange of neighbourhood gradients.

    The own loss is differentiated at the neighbours' models.
    """
    state, found, refused = _models(peer, _start(peer, state, order), received, order)
    state, mixed = _mix_stats(peer, state, found, order), _mixed(peer, state, found, order)
    metrics: Metrics = {"disagreement": _disagreement(peer, state, found, order)}
    state, taken = _gradients(peer, state, found, oracle)
    pending = Pending(taken.gradients[0], taken.losses[0], mixed)
    cross, offers = dict(state.cross), dict[int | None, Payload]()
    for j, gradient in zip(found, taken.gradients[1:], strict=True):
        memory = cross[j] if j in cross else peer.cross.init(gradient)
        offers[j], memory, _ = encode_gradient(peer, memory, gradient, j, order.step)
        cross |= {j: memory} if memory.numel() else {}
    state = state._replace(cross=cross, pending=pending, shift=state.x.new_empty(0))
    return Result(_finite(state), offers, metrics, refused)


def _start(peer: Peer, state: PeerState, order: Order) -> PeerState:
    # Neighbours may lack what was offered last.
    if peer.channel.chained and (order.rejoin or order.reset):
        state = state._replace(memories=(), reset=True)
    if order.done < state.done:
        raise ValueError(
            f"step {order.step}: {order.done:g} of the run is over, and {state.done:g} was before"
        )
    return state._replace(step=order.step, done=order.done)


def encode(
    peer: Peer, memories: Vectors, vectors: Vectors, step: int
) -> tuple[Payload, Vectors, Vectors]:
    """The payload of what a peer offers, the channel's new memories, the vectors as received.

    Args:
        peer: whose vectors they are.
        memories: the channel's, one a vector; none before the first offer.
        vectors: each [d].
        step: in which they are offered.
    """
    generator = torch.Generator().manual_seed(derive(peer.seed, "codec", peer.number, step))
    payload: Payload = {}
    new_memories, sent = list[Tensor](), list[Tensor]()
    for k, (vector, memory) in enumerate(
        zip(vectors, memories or map(peer.channel.init, vectors), strict=True)
    ):
        encoded, memory, own = peer.channel.encode(memory, vector, generator)
        payload |= {f"{k}.{name}": value for name, value in encoded.items()}
        new_memories.append(memory)
        sent.append(own)
    return payload, tuple(new_memories), tuple(sent)


def encode_gradient(
    peer: Peer, memory: Tensor, gradient: Tensor, reader: int, step: int
) -> tuple[Payload, Tensor, Tensor]:
    """The payload of a gradient [d] for a neighbour, the new memory, the gradient as received."""
    seed = derive(peer.seed, "cross-codec", peer.number, reader, step)
    return peer.cross.encode(memory, gradient, torch.Generator().manual_seed(seed))


# What neighbours sent.


def _models(
    peer: Peer, state: PeerState, received: Iterable[Received], order: Order
) -> tuple[PeerState, dict[int, Model], tuple[RefusedPayload, ...]]:
    return _usable(peer, state, received, order, _decode_model)


def _usable(
    peer: Peer,
    state: PeerState,
    received: Iterable[Received],
    order: Order,
    decode: Callable[[Peer, PeerState, Received], tuple[PeerState, T]],
) -> tuple[PeerState, dict[int, T], tuple[RefusedPayload, ...]]:
    """The newest usable payload of each neighbour, decoded; and those that are refused.

    Whatever is wrong with what a neighbour sent, which anybody may have made, costs that neighbour
    its part in this exchange, and no other.
    """
    found, refused = dict[int, T](), list[RefusedPayload]()
    for each in received:
        seen = state.seen.get(each.sender, -1)
        if each.step == seen and order.rejoin and not peer.channel.chained:
            continue  # it was mixed, and the answer to that was lost
        try:
            if each.problem:
                raise InvalidPayload(each.problem)
            if each.step <= seen:
                raise InvalidPayload(f"step {each.step} came before")
            _check_age(peer, each, order)
            state = state._replace(seen={**state.seen, each.sender: each.step})
            state, found[each.sender] = decode(peer, state, each)
        except Exception as error:
            refused.append(RefusedPayload(each.sender, reason_of(error)))
            found.pop(each.sender, None)
    return state, found, tuple(refused)


def _check_age(peer: Peer, each: Received, order: Order) -> None:
    if each.step >= order.step:
        raise InvalidPayload(f"step {each.step} is not before this peer's step {order.step}")
    # Chained payloads must all come.
    if order.step - each.step > OLDEST and not peer.channel.chained:
        raise InvalidPayload(
            f"step {each.step} is {order.step - each.step} steps old, at most {OLDEST} are of use"
        )


def _decode_model(peer: Peer, state: PeerState, each: Received) -> tuple[PeerState, Model]:
    payload, like = each.payload, _outgoing(peer, state, each.sender)
    before = like  # channels that are not chained decode without it
    if peer.channel.chained:
        before = tuple(map(torch.zeros_like, like))
        if RESET not in payload:
            hat = state.hats.get(each.sender)
            if hat is None or int(payload[AFTER]) != hat.step:
                raise InvalidPayload(f"step {each.step} goes on from a step that is missing here")
            before = hat.vectors
    vectors = tuple(
        peer.channel.decode(_part(payload, f"{k}."), last) for k, last in enumerate(before)
    )
    for vector, wanted in zip(vectors, like, strict=True):
        _check(vector, wanted)
        _check_distance(peer, vector, wanted, state.x)
    model = Model(
        vectors, payload.get(STATS, state.stats), payload.get(SHIFT, state.x.new_empty(0))
    )
    _check(model.stats, state.stats)
    _check_distance(peer, model.stats, state.stats, state.stats)
    if model.shift.numel():
        _check(model.shift, state.x)
        _check_distance(peer, model.shift, torch.zeros_like(state.x), state.x)
    if peer.channel.chained:
        state = state._replace(hats={**state.hats, each.sender: Hat(each.step, vectors)})
    return state, model


def _decode_gradient(peer: Peer, state: PeerState, each: Received) -> tuple[PeerState, Tensor]:
    gradient = peer.cross.decode(each.payload, state.x)
    _check(gradient, state.x)
    if state.pending is not None:
        _check_distance(peer, gradient, state.pending.gradient, state.x, state.pending.gradient)
    return state, gradient


def _check(vector: Tensor, wanted: Tensor) -> None:
    if vector.shape != wanted.shape or vector.dtype != wanted.dtype:
        got, asked = (f"{each.dtype} of shape {tuple(each.shape)}" for each in (vector, wanted))
        raise InvalidPayload(f"a vector is {got}, {asked} is expected")
    if reason := fault(vector):
        raise InvalidPayload(reason)


def _check_distance(peer: Peer, vector: Tensor, own: Tensor, *measures: Tensor) -> None:
    """Refuse a vector that is too far from the own one.

    Own vectors are the measure: with so few neighbours none can tell which of the others is wrong.
    """
    if isinstance(peer.plan.algorithm, LinkAlgorithm) or not peer.max_change:
        return
    size = max(float(torch.linalg.vector_norm(each)) for each in measures)
    if size and (distance := float(torch.dist(vector, own))) > peer.max_change * size:
        allowed = f"{peer.max_change:g} times the norm of the own, {peer.max_change * size:.3g}"
        raise InvalidPayload(f"it is {distance:.3g} from the own; at most {allowed} (max-change)")


def _part(payload: Payload, prefix: str) -> Payload:
    return {
        name.removeprefix(prefix): value
        for name, value in payload.items()
        if name.startswith(prefix)
    }


# What becomes of it.


def _outgoing(peer: Peer, state: PeerState, reader: int = -1) -> Vectors:
    """The vectors that this peer offers, to all neighbours or to one."""
    algorithm = peer.plan.algorithm
    if isinstance(algorithm, LinkAlgorithm):
        return algorithm.outgoing(state.algorithm, reader)
    return algorithm.outgoing(state.algorithm)


def _sent(peer: Peer, state: PeerState) -> Vectors:
    """This peer's vectors as its neighbours have them."""
    return state.sent or _outgoing(peer, state)


def _mixed(peer: Peer, state: PeerState, found: Mapping[int, Model], order: Order) -> Vectors:
    """Weighted means of every vector."""
    theirs = [
        {j: model.vectors[k] for j, model in found.items()} for k in range(len(_sent(peer, state)))
    ]
    pairs = zip(_sent(peer, state), theirs, strict=True)
    return tuple(_mean_over(peer, own, other, order) for own, other in pairs)


def _mean_over(peer: Peer, own: Tensor, theirs: Mapping[int, Tensor], order: Order) -> Tensor:
    """The mean of one vector over the neighbourhood."""
    if peer.robust.on:
        return neighbourhood_mean(own, theirs, order.neighbours, peer.robust)
    return weighted(own, theirs, order.neighbours)


def _mix_stats(peer: Peer, state: PeerState, found: Mapping[int, Model], order: Order) -> PeerState:
    if not state.stats.numel():
        return state
    return state._replace(
        stats=_mean_over(peer, state.stats, {j: model.stats for j, model in found.items()}, order)
    )


def _disagreement(peer: Peer, state: PeerState, found: Mapping[int, Model], order: Order) -> float:
    models = {j: model.vectors[0] for j, model in found.items()}
    return disagreement(_sent(peer, state)[0], models, order.neighbours)


def _exchange(peer: Peer, state: PeerState, sent: Vectors, mixed: Vectors) -> PeerState:
    algorithm = peer.plan.algorithm
    assert isinstance(algorithm, PeerAlgorithm)
    return state._replace(
        algorithm=exchange(algorithm, state.algorithm, sent, mixed, peer.averaging_rate)
    )


def _descend(peer: Peer, state: PeerState, gradient: Tensor, order: Order) -> PeerState:
    return state._replace(
        algorithm=peer.plan.algorithm.descend(state.algorithm, gradient, order.lr)
    )


def _mix_and_train(
    peer: Peer, state: PeerState, received: Iterable[Received], order: Order, oracle: Oracle
) -> tuple[PeerState, Metrics, tuple[RefusedPayload, ...]]:
    """Mix the neighbours' models; in the model variant, descend along the own gradients there."""
    state, found, refused = _models(peer, state, received, order)
    state, algorithm, metrics = (
        _mix_stats(peer, state, found, order),
        peer.plan.algorithm,
        Metrics(),
    )
    if isinstance(algorithm, LinkAlgorithm):
        vectors = {j: model.vectors for j, model in found.items()}
        return state._replace(algorithm=algorithm.mix(state.algorithm, vectors)), metrics, refused
    sent, mixed = _sent(peer, state), _mixed(peer, state, found, order)
    if order.test:
        metrics["disagreement"] = _disagreement(peer, state, found, order)
    if peer.plan.gradient.at == "model":
        state, taken = _gradients(peer, state, found, oracle)
        theirs = dict(zip(found, taken.gradients[1:], strict=True))
        state = _descend(peer, state, weighted(taken.gradients[0], theirs, order.neighbours), order)
        state, trained = _trained(peer, state, float(taken.losses[0]), order)
        metrics |= trained
    return _exchange(peer, state, sent, mixed), metrics, refused


def _finish(
    peer: Peer, state: PeerState, received: Iterable[Received], order: Order
) -> tuple[PeerState, Metrics, tuple[RefusedPayload, ...]]:
    """The neighbours' gradients: descend along them, mix the models that came before them."""
    pending, sent = state.pending, _sent(peer, state)
    if pending is None:
        raise ValueError(
            f"step {order.step} ends an exchange that this site does not remember to have begun"
        )
    state, found, refused = _usable(peer, state, received, order, _decode_gradient)
    state = _descend(peer, state, _mean_over(peer, pending.gradient, found, order), order)
    state = _exchange(peer, state, sent, pending.mixed)._replace(pending=None)
    return *_trained(peer, state, float(pending.loss), order), refused


# Training.


def _pair(state: PeerState, oracle: Oracle) -> Callable[[Tensor, Tensor | None], Gradients]:
    """A function of gradients on the next batch, at any models."""

    def pair(x: Tensor, _: Tensor | None) -> Gradients:
        values, rows, stats = [], [], []
        for point in x:
            value, gradient, after = oracle.gradient(point, state.stats, state.batches)
            values.append(value)
            rows.append(gradient if len(x) == 1 else gradient.clone())
            stats.append(after)
        return Gradients(
            torch.stack(values),
            rows[0][None] if len(x) == 1 else torch.stack(rows),
            torch.stack(stats),
        )

    return pair


def _gradients(
    peer: Peer, state: PeerState, found: Mapping[int, Model], oracle: Oracle
) -> tuple[PeerState, Gradients]:
    """The own gradients at the own model (row 0) and at the neighbours', on the next batch.

    BatchNorm statistics follow row 0.
    """
    x = (
        torch.stack([state.x, *(model.vectors[0] for model in found.values())])
        if found
        else state.x[None]
    )
    own = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    own[0] = True
    shift = None
    if state.shift.numel():
        shifts = [
            model.shift if model.shift.numel() else torch.zeros_like(state.x)
            for model in found.values()
        ]
        shift = torch.stack([state.shift, *shifts])
    pair = _pair(state, oracle)
    taken = neighbourhood_gradients(pair, x, own, peer.plan.gradient, peer.regular, shift)
    return state._replace(stats=taken.stats[0], batches=state.batches + 1), taken


def _train(peer: Peer, state: PeerState, order: Order, oracle: Oracle) -> tuple[PeerState, Metrics]:
    """The local steps between two exchanges."""
    total = state.x.new_zeros(())
    for _ in range(peer.plan.steps):
        state, taken = _gradients(peer, state, {}, oracle)
        total += taken.losses[0]
        state = _descend(peer, state, taken.gradients[0], order)
    return _trained(peer, state, float(total) / peer.plan.steps, order)


def _trained(peer: Peer, state: PeerState, loss: float, order: Order) -> tuple[PeerState, Metrics]:
    """Report the mean ``loss`` of a step's batches, or keep it until it is one of many.

    A mean of few losses would reveal the examples.
    """
    losses, unreported = state.losses + peer.plan.steps * loss, state.unreported + peer.plan.steps
    if unreported < peer.loss_batches:
        return state._replace(losses=losses, unreported=unreported), {}
    metrics: Metrics = {"loss": losses / unreported, "lr-first": order.lr, "lr-last": order.lr}
    return state._replace(losses=0.0, unreported=0), metrics


# What is offered and kept.


def _offer(
    peer: Peer, state: PeerState, order: Order
) -> tuple[PeerState, dict[int | None, Payload]]:
    """The vectors, and what goes with them, for all neighbours or for each."""
    beside = {STATS: state.stats} if state.stats.numel() else {}
    if isinstance(peer.plan.algorithm, LinkAlgorithm):
        offers = {
            j: encode(peer, (), _outgoing(peer, state, j), order.step)[0] for j in order.readers
        }
        return state, {j: payload | beside for j, payload in offers.items()}
    payload, memories, sent = encode(peer, state.memories, _outgoing(peer, state), order.step)
    if not peer.channel.exact:
        state = state._replace(memories=memories if memories[0].numel() else (), sent=sent)
    payload |= beside
    if state.shift.numel():
        payload[SHIFT] = state.shift
    if peer.channel.chained:
        payload[RESET if state.reset else AFTER] = torch.tensor([state.offered])
        state = state._replace(offered=order.step, reset=False)
    return state, {None: payload}


def _finite(state: PeerState) -> PeerState:
    """The state, if all of it is finite: no other one is ever remembered.

    Raises:
        Diverged: part of the state is not finite.
    """
    tensors, numbers = flatten(state)
    wrong = [
        name
        for name, part in tensors.items()
        if not bool(torch.stack(torch.aminmax(part)).isfinite().all())
    ]
    if wrong := wrong + [name for name, number in numbers.items() if not math.isfinite(number)]:
        raise Diverged(
            f"in step {state.step} this site's {wrong[0].removeprefix('algorithm.')} is not finite"
        )
    return state
