"""A peer's part of an exchange: read a message, open what neighbours sealed, take the step, seal and write the answer.

The step itself is a function that knows no Flower (:mod:`strategies.peer.step`); all that a peer remembers is in
``context.state`` (:mod:`client_app.memory`).
"""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from safetensors.torch import load, save, save_file

from client_app import sealing
from client_app.memory import recall, remember
from client_app.oracle import Oracle
from client_app.site import Workplace, dice, open_site
from configuration.config import Config
from configuration.graph import graph_of
from datasets.site import SiteData
from strategies.codecs import Payload, codec
from strategies.gradients import regularised
from strategies.method import PeerPlan
from strategies.peer.channel import channel
from strategies.peer.state import Metrics, Order, Peer, PeerState, Received, Result
from strategies.peer.step import Refused, begin, cross_step, models_step, why
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

SEALED, KEY = "sealed", "key"  # the parts of a sealed payload


def peer_of(config: Config, number: int, sizes: tuple[int, ...]) -> Peer:
    """Peer ``number`` of a run, whose network has layers of ``sizes``."""
    offered, gradients = (
        codec(name, sizes, bits=config.wire.bits, share=config.wire.share) for name in (config.wire.codec, config.wire.cross_codec)
    )
    assert isinstance(config.plan, PeerPlan)
    return Peer(
        config.plan,
        channel(offered, config.wire.error_feedback),
        channel(gradients, "none" if gradients.exact else "deep-squeeze"),
        partial(regularised, clip_norm=config.training.clip_norm, weight_decay=config.training.weight_decay),
        config.topology.averaging_rate,
        number,
        config.seed,
    )


def learning_rate(config: Config, done: float) -> float:
    """The rate when a fraction ``done`` of the run is over."""
    return config.training.rate * decay(config.training.lr_shape, config.training.lr_ratio, done)


class _Call(NamedTuple):
    """A message to a peer, and what the answer follows from."""

    message: Message
    context: Context
    config: Config
    peer: Peer
    data: SiteData
    network: Workplace
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
    peer = peer_of(config, site.number, network.model.sizes)
    ring = None
    if config.wire.sealing != "off":
        ring = sealing.keyring(context, config.wire.sealing, site.number, config_of(message))
    call = _Call(message, context, config, peer, data, network, ring)
    first = begin(peer, network.x, network.stats)
    known = recall(context, type(first.algorithm), network.x.device)
    order = _order(call)
    _check_turn(call, order, known)
    oracle = Oracle(config, site.number, data, network)
    with dice(network.x.device, derive(config.seed, "layers", site.number, order.step)):
        step = cross_step if call.crossing else models_step
        result = step(peer, known or first, _received(call, order), order, oracle)
    metrics = {"num-examples": len(data.train.y), **result.metrics, "samples": oracle.samples}
    return _reply(call, order, result, metrics, forgotten=known is None and order.step > 0)


# What is read.


def _order(call: _Call) -> Order:
    fields: Any = config_of(call.message)
    step, config = int(fields["server-round"]), call.config
    return Order(
        step,
        _neighbours(call, step),
        learning_rate(config, float(fields["cycle-from"])),
        test=bool(fields["test"]),
        last=bool(fields["last"]),
        again=bool(fields["rejoin"]),
        restart=bool(fields["fresh"]),
    )


def _neighbours(call: _Call, step: int) -> dict[int, float]:
    """Neighbours and their weights, which a peer knows itself; but for a file of edges, which only the server has."""
    if call.config.topology.name != "edges":
        exchange = (step - 1) // call.peer.plan.gradient.messages
        return graph_of(call.config).neighbours(exchange, call.peer.number) if step else {}
    fields: Any = config_of(call.message)
    found = dict(zip(fields["neighbours"], fields["weights"], strict=True))
    if not all(0 < weight <= 1 for weight in found.values()) or not sum(found.values()) <= 1 + 1e-9:
        raise ValueError(f"the server tells the weights {found}: above 0 and at most 1 in all is expected")
    return found


def _check_turn(call: _Call, order: Order, known: PeerState | None) -> None:
    """A sealed step has one content only; in the last there is none."""
    done = -1 if known is None else known.step
    if order.step < done or (call.ring and order.step == done and not order.last):
        raise ValueError(f"step {order.step} comes again")
    if call.crossing != (call.peer.plan.gradient.messages == 2 and order.step % 2 == 1):
        raise ValueError(f"step {order.step} of {call.config.strategy} is no {call.message.metadata.message_type}")


def _received(call: _Call, order: Order) -> Iterator[Received]:
    """What neighbours sent, of each in the order of its steps."""
    for sender in order.neighbours:
        record = call.message.content.get(f"{FROM}{sender}")
        if not isinstance(record, ArrayRecord):
            continue
        steps: dict[int, dict[str, Array]] = {}
        for name, array in record.items():
            number, _, part = name.partition("/")
            steps.setdefault(int(number), {})[part] = array
        for step in sorted(steps):
            try:
                yield Received(sender, step, _opened(call, sender, step, steps[step]))
            except Exception as error:
                problem = str(error) if isinstance(error, sealing.SealError) else why(error)
                yield Received(sender, step, {}, problem)


def _opened(call: _Call, sender: int, step: int, arrays: dict[str, Array]) -> Payload:
    device = call.network.x.device
    if call.ring is None:
        return {name: unpack(array).to(device) for name, array in arrays.items()}
    if {SEALED, KEY} - set(arrays):
        raise Refused(f"step {step} is not sealed for this site")
    kind = "gradient" if call.peer.plan.gradient.messages == 2 and not call.crossing else "model"
    header = sealing.Header(call.context.run_id, sender, step, kind)
    data = call.ring.open(unpack_bytes(arrays[SEALED]), unpack_bytes(arrays[KEY]), header)
    return {name: value.to(device) for name, value in load(data).items()}


# What is written.


def _reply(call: _Call, order: Order, result: Result, metrics: Metrics, *, forgotten: bool) -> Message:
    """Remember everything, seal what is offered, answer."""
    remembered = remember(call.context, result.state)
    refused = [f"site {sender}: {reason}" for sender, reason in result.refused]
    arrays: dict[str, Array] = {}
    for reader, payload in result.offers.items():
        name = OFFER if reader is None else f"{TO}{reader}"
        if call.ring is None:  # what is remembered too need not be copied twice
            new = pack({part: value for part, value in payload.items() if id(value) not in remembered})
            known = {part: remembered[id(value)] for part, value in payload.items() if id(value) in remembered}
            arrays |= {f"{name}/{part}": array for part, array in (known | dict(new)).items()}
        else:
            sealed, problems = _sealed(call, call.ring, order, name, reader, payload)
            arrays |= sealed
            refused += problems
    broken = sorted({each.sender for each in result.refused}) if call.peer.channel.chained else []
    answer: dict[str, Any] = {"refused": refused, "broken": broken, "fresh": result.restarted, "anew": forgotten}
    content = RecordDict({ARRAYS: ArrayRecord(arrays), METRICS: MetricRecord({**metrics}), CONFIG: ConfigRecord(answer)})
    if order.last:
        _hand_over(call, result.state, content)
    return Message(content, reply_to=call.message)


def _sealed(
    call: _Call, ring: sealing.Keyring, order: Order, name: str, reader: int | None, payload: Payload
) -> tuple[dict[str, Array], list[str]]:
    header = sealing.Header(call.context.run_id, call.peer.number, order.step, "gradient" if call.crossing else "model")
    data = save({part: value.detach().cpu().contiguous() for part, value in payload.items()})
    readers = _readers(call, reader)
    sealed, keys = ring.seal(data, filter(ring.knows, readers), header)
    arrays = {f"{name}/{SEALED}": pack_bytes(sealed)} | {f"{TO}{k}/{KEY}": pack_bytes(key) for k, key in keys.items()}
    return arrays, [f"site {k}: this site has no public key of it" for k in readers if not ring.knows(k)]


def _readers(call: _Call, reader: int | None) -> list[int]:
    """Who may read an offer."""
    fields: Any = config_of(call.message)
    readers: Iterable[int] = fields["listeners"] if reader is None else [reader]
    if call.config.topology.name == "edges":
        return list(readers)
    known = graph_of(call.config).readers(call.peer.number)
    return [each for each in readers if each in known]


def _hand_over(call: _Call, state: PeerState, content: RecordDict) -> None:
    """The finished model: to the server if it may have it, and into the file that the site names."""
    if call.config.wire.collect_models and call.ring is None:
        content["model"] = pack({X: state.x, STATS: state.stats})
    if "save" in call.context.node_config:
        path = Path(str(call.context.node_config["save"]))
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(call.network.model.state_dict(state.x, state.stats), path)
