"""A peer's part of an exchange: what happens between a message and its answer.

A peer reads the message, opens what neighbours sealed, takes the step, and seals and writes the
answer. The step itself is a function that knows no Flower (:mod:`strategies.peer.step`); all that a
peer remembers is in ``context.state`` (:mod:`client_app.memory`).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from client_app import sealing
from client_app.memory import (
    SAVED,
    check_run,
    load_peer_state,
    run_of,
    state_records,
    store_peer_state,
)
from client_app.oracle import Oracle
from client_app.site import Network, open_site, private, seeded
from client_app.training import num_batches
from configuration.config import Config
from configuration.description import Description, write_model
from configuration.graph import graph_of
from configuration.network import codec_of
from datasets.site import SiteData
from strategies.gradients import regularised
from strategies.method import PeerPlan
from strategies.peer.channel import channel
from strategies.peer.state import Metrics, Order, Peer, PeerState, Received, RefusedPayload, Result
from strategies.peer.step import begin, cross_step, models_step, reason_of
from strategies.protocol import PeerOrder, read_peer_order
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
    unpack,
)
from strategies.schedules import decay, warm


def peer_of(config: Config, number: int, sizes: tuple[int, ...], loss_batches: int = 1) -> Peer:
    """Peer ``number`` of a run, whose network has layers of ``sizes``.

    The losses that it reports are means over at least ``loss_batches`` batches.
    """
    offered, gradients = (
        codec_of(config.wire, sizes, name) for name in (config.wire.codec, config.wire.cross_codec)
    )
    assert isinstance(config.plan, PeerPlan)
    return Peer(
        config.plan,
        channel(offered, config.wire.error_feedback),
        channel(gradients, "none" if gradients.exact else "deep-squeeze"),
        partial(
            regularised,
            clip_norm=config.training.clip_norm,
            weight_decay=config.training.weight_decay,
        ),
        config.topology.averaging_rate,
        number,
        config.seed,
        loss_batches,
        config.robust.rule,
        config.max_change,
    )


def learning_rate(config: Config, done: float, after: float) -> float:
    """The rate of an exchange from a fraction ``done`` of the run to a fraction ``after``."""
    keys = config.training
    return (
        keys.rate
        * warm(keys.lr_warmup, done, after)
        * decay(keys.lr_shape, keys.lr_ratio, done, keys.lr_warmup)
    )


class _Call(NamedTuple):
    """A message to a peer, and what the answer follows from."""

    message: Message
    asked: PeerOrder
    context: Context
    config: Config
    peer: Peer
    data: SiteData
    network: Network
    ring: sealing.Keyring | None

    @property
    def crossing(self) -> bool:
        """Whether gradients at the neighbours' models are asked for."""
        return self.message.metadata.message_type == "train.cross"


def take_step(message: Message, context: Context) -> Message:
    """A step of a peer.

    Raises:
        ValueError: it cannot be taken; then the peer remembers what it remembered before.
    """
    config, site, data, network = open_site(message, context)
    asked, ring, loss_batches = read_peer_order(config_of(message)), None, 1
    check_run(context, run := run_of(context, asked.agreed))
    if config.wire.sealing != "off":
        ring = sealing.keyring(context, config.wire.sealing, site.number, asked.keys, asked.nonces)
        # Half an epoch.
        loss_batches = -(-num_batches(len(data.train.y), config.training.batch_size) // 2)
    peer = peer_of(config, site.number, network.model.sizes, loss_batches)
    call = _Call(message, asked, context, config, peer, data, network, ring)
    first = begin(peer, network.x, network.stats)
    known = load_peer_state(context, type(first.algorithm), network.x.device)
    order = _order(call)
    _check_turn(call, order, known)
    noise = private(context, network)
    oracle = Oracle(config, site.number, data, network, noise)
    with seeded(network.x.device, derive(config.seed, "layers", site.number, order.step)):
        step = cross_step if call.crossing else models_step
        result = step(peer, known or first, _received(call, order), order, oracle)
    metrics = {"num-examples": len(data.train.y), **result.metrics, "samples": oracle.samples}
    records, arrays = state_records(result.state)
    reply = _reply(call, order, result, metrics, arrays, forgotten=known is None and order.step > 0)
    store_peer_state(context, run, records)
    if noise:
        noise.charge()
    return reply


# What is read.


def _order(call: _Call) -> Order:
    asked, plan = call.asked, call.peer.plan
    if not 0 <= asked.done <= 1:
        raise ValueError(f"cycle-from = {asked.done:g}: 0 to 1 is expected")
    # How many exchanges a run has follows from the batches of all sites, which no site knows. But
    # what is told to be the last one must be the end of what is told to be over; that never falls,
    # so that whoever ends a run early has ended it.
    ends = (
        asked.step
        and not call.crossing
        and asked.done == plan.done(asked.step, plan.exchange(asked.step) + 1)
    )
    if asked.last and not ends:
        raise ValueError(
            f"step {asked.step} cannot be the last one: {asked.done:g} of the run is over"
        )
    batches = call.config.epochs * num_batches(
        len(call.data.train.y), call.config.training.batch_size
    )
    return Order(
        asked.step,
        _neighbours(call),
        learning_rate(call.config, asked.done, plan.after(asked.step, asked.done, batches)),
        asked.done,
        _readers(call, asked.listeners),
        test=asked.test,
        last=asked.last,
        rejoin=asked.rejoin,
        reset=asked.reset,
    )


def _neighbours(call: _Call) -> Mapping[int, float]:
    """The neighbours and their weights.

    A peer knows them itself, but for a file of edges, which only the server has.
    """
    step, found = call.asked.step, call.asked.neighbours
    if call.config.topology.name != "edges":
        return (
            graph_of(call.config).neighbours(call.peer.plan.exchange(step), call.peer.number)
            if step
            else {}
        )
    if not all(0 < weight <= 1 for weight in found.values()) or not sum(found.values()) <= 1 + 1e-9:
        raise ValueError(
            f"the server names the weights {dict(found)}: above 0 and at most 1 in all is expected"
        )
    return found


def _readers(call: _Call, named: Iterable[int] | None) -> tuple[int, ...]:
    """Those who may read an offer: the neighbours among those whom the server names.

    Where the server names none, all neighbours may.
    """
    if call.config.topology.name == "edges":
        return tuple(call.asked.neighbours if named is None else named)
    known = graph_of(call.config).readers(call.peer.number)
    return tuple(sorted(known) if named is None else (each for each in named if each in known))


def _check_turn(call: _Call, order: Order, known: PeerState | None) -> None:
    """A sealed step has one content only; in the last there is none."""
    done = -1 if known is None else known.step
    if order.step < done or (call.ring and order.step == done and not order.last):
        raise ValueError(f"step {order.step} comes again")
    if call.crossing != (call.peer.plan.gradient.messages == 2 and order.step % 2 == 1):
        raise ValueError(
            f"step {order.step} of {call.config.strategy} "
            f"is no {call.message.metadata.message_type}"
        )


def _received(call: _Call, order: Order) -> Iterator[Received]:
    """The payloads of the neighbours, of each in the order of its steps."""
    for sender in order.neighbours:
        record = call.message.content.get(f"{FROM}{sender}")
        steps: dict[int, dict[str, Array]] = {}
        for name, array in record.items() if isinstance(record, ArrayRecord) else ():
            number, _, part = name.partition("/")
            if re.fullmatch("[0-9]{1,9}", number):
                steps.setdefault(int(number), {})[part] = array
            else:
                yield Received(sender, -1, {}, f"{name!r} is no part of a step")
        for step in sorted(steps):
            yield _opened(call, sender, step, steps[step])


def _opened(call: _Call, sender: int, step: int, arrays: dict[str, Array]) -> Received:
    kind = "gradient" if call.peer.plan.gradient.messages == 2 and not call.crossing else "model"
    header = sealing.Header(call.context.run_id, sender, step, kind)
    try:
        payload = (
            sealing.unseal(call.ring, arrays, header)
            if call.ring
            else {k: unpack(v) for k, v in arrays.items()}
        )
        return Received(
            sender, step, {name: value.to(call.network.x.device) for name, value in payload.items()}
        )
    except Exception as error:  # whatever is wrong with it costs its sender the exchange
        return Received(
            sender,
            step,
            {},
            str(error) if isinstance(error, sealing.SealError) else reason_of(error),
        )


# What is written.


def _reply(
    call: _Call,
    order: Order,
    result: Result,
    metrics: Metrics,
    packed: dict[int, Array],
    *,
    forgotten: bool,
) -> Message:
    """Seal what is offered, answer; what is ``packed`` need not be copied twice."""
    refused, arrays = list(result.refused), dict[str, Array]()
    header = sealing.Header(
        call.context.run_id, call.peer.number, order.step, "gradient" if call.crossing else "model"
    )
    for reader, payload in result.offers.items():
        name = OFFER if reader is None else f"{TO}{reader}"
        if call.ring:
            readers = order.readers if reader is None else _readers(call, [reader])
            found, problems = sealing.seal(call.ring, name, payload, readers, header)
            refused += [RefusedPayload(*problem) for problem in problems.items()]
        else:
            new = pack({part: value for part, value in payload.items() if id(value) not in packed})
            found = {
                f"{name}/{part}": new[part] if part in new else packed[id(value)]
                for part, value in payload.items()
            }
        arrays |= found
    broken = sorted({each.sender for each in result.refused}) if call.peer.channel.chained else []
    reasons = [f"site {site}: {reason}" for site, reason in refused]
    answer: dict[str, Any] = {"refused": reasons, "broken": broken}
    answer |= {"reset": result.reset, "lost": forgotten}
    if call.ring:
        answer["nonce"] = sealing.nonce_of(call.context)
    content = RecordDict({ARRAYS: ArrayRecord(arrays), METRICS: MetricRecord({**metrics})})
    content[CONFIG] = ConfigRecord(answer)
    if order.last:
        _hand_over(call, result.state, content)
    return Message(content, reply_to=call.message)


def _hand_over(call: _Call, state: PeerState, content: RecordDict) -> None:
    """Save the finished model in the file that the site names; send it to the server if allowed."""
    if call.config.wire.collect_models and call.ring is None:
        content["model"] = pack({X: state.x, STATS: state.stats})
    # A model that was not trained replaces none.
    if "save" in call.context.node_config and state.batches:
        path = Path(str(call.context.node_config["save"]))
        path.parent.mkdir(parents=True, exist_ok=True)
        # The model of another run stays: whoever starts runs must not overwrite it.
        if path.exists() and SAVED not in call.context.state:
            names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(1))
            path.rename(next(name for name in names if not name.exists()))
        call.context.state[SAVED] = ConfigRecord()
        agreed, data = call.asked.agreed, call.data
        described = Description.of(
            call.config, data.train.x.shape[1:], agreed.classes, data.columns, agreed.moments
        )
        write_model(path, call.network.model.state_dict(state.x, state.stats), described)
