"""The handlers of a site: describe itself, train, evaluate; as a peer, exchange."""

import math
import traceback
from collections.abc import Generator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from client_app import training
from client_app.framing import RAISED
from client_app.memory import (
    LOST,
    RULE,
    load,
    load_moments,
    restore_run_id,
    save_to_disk,
    store,
    store_moments,
)
from client_app.peer import take_step
from client_app.privacy import BudgetError
from client_app.sealing import SealError, keyring, nonce_of, public_key
from client_app.site import (
    Network,
    SiteId,
    config_of_site,
    device_of,
    name_of,
    open_site,
    private,
    raw_data,
)
from client_app.work import Steps, Test, Training, Work, alone
from configuration.config import Config
from configuration.errors import ConfigError
from configuration.flower import ClientAppCallable, Mod
from configuration.graph import graph_of
from configuration.network import codec_of, down_codec_of, sends_updates
from datasets.partitions import PartitionError
from datasets.site import Moments, SiteData, moments
from datasets.sources import SourceError
from models.flat import FlatModel
from models.pretrained import digest
from strategies.gradients import Diverged
from strategies.method import PeerPlan, RoundPlan
from strategies.peer.channel import channel
from strategies.protocol import (
    CODED,
    SiteCard,
    TestMetrics,
    TrainMetrics,
    read_model,
    read_order,
    write_card,
    write_tested,
    write_trained,
)
from strategies.randomness import derive
from strategies.records import STATS, X, arrays_of, code_version, config_of

# Their own words say all there is to say: no traceback is printed.
KNOWN = SourceError | PartitionError | ConfigError | Diverged | BudgetError


def answer_always(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Reply, whatever goes wrong.

    A handler that ends the process would take other sites of a simulation with it. The reply holds
    the error's own words, so that the server can name the cause; the traceback stays in the site's
    log.
    """
    try:
        return call_next(message, context)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if not isinstance(error, KNOWN):
            traceback.print_exc()
        return Message(Error(RAISED, f"{type(error).__name__}: {error}"), reply_to=message)


MODS: list[Mod] = [answer_always, restore_run_id, save_to_disk]
app = ClientApp(mods=MODS)


@app.query("site")
def describe(message: Message, context: Context) -> Message:
    """Say who this site is and what it holds.

    That is all that the server needs to build the network and to find mistakes early.
    """
    config, site = config_of_site(context), SiteId.of(context)
    data = raw_data(config, site)
    device_of(config.computing.device)
    found: dict[str, Any] = {}
    tables = []
    if data.columns:
        tables.append(moments(data.train.x, data.columns))
    if config.task.target == "numbers":
        tables.append(moments(data.train.y, data.classes))
    if tables:
        found |= {
            key: [number for each in tables for number in each._asdict()[key]]
            for key in Moments._fields
        }
    labels = config.task.target == "class" and isinstance(data.train.y, Tensor)
    # How many examples of each class a deployed site has is its own business.
    if site.num_sites and labels:
        found["counts"] = torch.bincount(
            torch.cat([data.train.y, data.test.y]), minlength=len(data.classes)
        ).tolist()
    if config.model.initial:
        found["initial"] = digest(config.model.initial)
    if config.wire.sealing == "trust-on-first-use":
        found["public_key"] = public_key(context)
    elif config.wire.sealing == "keys":
        keys = keyring(context, config.wire.sealing, site.number, {}, {})
        # The file of edges is on the server only.
        linked = graph_of(config).linked(site.number) if config.topology.name != "edges" else []
        if missing := [other for other in linked if not keys.has_key(other)]:
            raise SealError(
                f"peer-keys = {context.node_config['peer-keys']!r}: "
                f"no keys of the neighbours {missing}"
            )
    if config.wire.sealing != "off":
        found["nonce"] = nonce_of(context)
    card = SiteCard.model_construct(
        site=site.number,
        sites=site.num_sites or 0,
        name=name_of(config, site, context),
        classes=list(data.classes),
        columns=list(data.columns),
        shape=list(data.train.x.shape[1:]),
        train=len(data.train.y),
        test=len(data.test.y),
        notes=list(data.notes),
        code=code_version(),
        **found,
    )
    return Message(write_card(card), reply_to=message)


def _vectors(message: Message, config: Config) -> dict[str, Tensor]:
    vectors = read_model(arrays_of(message), down_codec_of(config.wire))
    vectors.setdefault(STATS, torch.empty(*vectors[X].shape[:-1], 0))
    return vectors


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the model in the message on this site's training part, and send it back.

    The model is tested before, if the message asks for it.
    """
    return alone(training_of(message, context))


def training_of(message: Message, context: Context) -> Steps:
    """The steps of :func:`train`."""
    config, site, data, network = open_site(message, context)
    if isinstance(config.plan, PeerPlan):
        raise ValueError(
            f"strategy = {config.strategy!r}: a peer trains its own model, not one that is sent"
        )
    order, scatter, gather = (
        read_order(config_of(message)),
        network.model.scatter,
        network.model.gather,
    )
    if (local := order.local) is None:
        raise ValueError("the message holds no order to train")
    keys, model, noise = config.training, network.model, private(context, network)
    vectors = scatter(partial(_vectors, message, config))
    sent = {name: vector.to(model.x.device) for name, vector in vectors.items()}
    tested = (yield from _tested(config, vectors, data, network)) if order.test else None
    rule = config.plan.site if isinstance(config.plan, RoundPlan) else None
    memory = load(context, RULE, rule.init(sent[X]), scatter) if rule else None

    def correct(gradient: training.Gradient) -> training.Gradient:
        gradient = training.proximal(gradient, sent[X], local.proximal)
        if rule:
            gradient = training.corrected(gradient, lambda g: rule.correct(memory, sent, g))
        return gradient

    work = Training(
        config,
        site.number,
        data.train,
        network,
        vectors[X],
        vectors[STATS],
        order.number,
        local,
        correct if rule or local.proximal else None,
        partial(load_moments, context, scatter=scatter) if local.keep_moments else None,
    )
    x, stats, mean_loss, optimizers = yield work
    # With noise nobody may learn this: it depends on each example.
    if not math.isfinite(mean_loss) and noise is None:
        raise Diverged(f"in round {order.number} this site's loss is {mean_loss}")
    steps, rate = work.steps, work.rates()
    metrics = TrainMetrics.model_construct(
        loss=mean_loss,
        lr_first=rate(0),
        lr_last=rate(steps - 1),
        num_examples=len(data.train.y),
        # Gradients computed, one an example.
        samples=round(steps / work.an_epoch * len(data.train.y)) * (2 if keys.sam_radius else 1),
    )
    made = {X: sent[X] - x if local.delta else x, STATS: stats}
    if rule:
        memory, beside = rule.finish(memory, sent, x, sum(map(rate, range(steps))))
        store(context, RULE, memory, gather)
        made |= beside
    if local.keep_moments:
        store_moments(context, optimizers, gather)
    del optimizers  # its moments: before the answer is written
    made = gather(made)
    if noise or sends_updates(config.wire):
        sent = gather(sent)
    if not made:  # the process that has it all answers
        return Message(RecordDict(), reply_to=message)
    if noise:
        moved = {
            name: vector if local.delta or name != X else vector - sent[X]
            for name, vector in made.items()
        }
        made = dict(zip(moved, noise(list(moved.values())), strict=True))
        made[X] = made[X] if local.delta else sent[X] + made[X]
        noise.charge()
    if sends_updates(config.wire):
        made |= _coded(
            config, context, order.number, model, made[X] if local.delta else made[X] - sent[X]
        )
        del made[X]
    return Message(write_trained(made, metrics, tested), reply_to=message)


class _Lost(NamedTuple):
    """What the codec has lost of this site's updates so far, [d]."""

    update: Tensor


def _coded(
    config: Config, context: Context, number: int, model: FlatModel, update: Tensor
) -> dict[str, Tensor]:
    """An update in the codec of the run.

    With error feedback, what was lost of the updates before is made up for.
    """
    codec = codec_of(config.wire, model.sizes)
    generator = torch.Generator().manual_seed(
        derive(config.seed, "codec", SiteId.of(context).number, number)
    )
    if config.wire.error_feedback == "none":
        payload = codec.encode(update, generator)
    else:
        way = channel(codec, config.wire.error_feedback)
        lost = load(context, LOST, _Lost(way.init(update)))
        payload, memory, _ = way.encode(lost.update, update, generator)
        store(context, LOST, _Lost(memory))
    return {f"{CODED}{part}": value for part, value in payload.items()}


@app.train("peer")
def peer(message: Message, context: Context) -> Message:
    """A step of a peer: mix what neighbours sent, train, offer the result to them."""
    return take_step(message, context)


@app.train("cross")
def cross(message: Message, context: Context) -> Message:
    """A peer's gradients at its neighbours' models."""
    return take_step(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test the message's model, or the mean prediction of several, on this site's test part.

    With an order to train, what this site makes of the model is tested, and stays here.
    """
    return alone(test_of(message, context))


def test_of(message: Message, context: Context) -> Steps:
    """The steps of :func:`evaluate`."""
    config, site, data, network = open_site(message, context)
    if isinstance(config.plan, PeerPlan) and config.wire.sealing != "off":
        raise ValueError(
            f"sealing = {config.wire.sealing!r}: a sealed peer tests no model but its own"
        )
    vectors = network.model.scatter(partial(_vectors, message, config))
    order = read_order(config_of(message))
    if order.local:
        if private(context, network):
            raise ConfigError(
                f"results.personalise-epochs = {order.local.epochs}: what a test of a model says "
                "that was trained without noise has none, either; allowed at this site: 0"
            )
        x, stats = vectors[X], vectors[STATS]
        trained = yield Training(
            config, site.number, data.train, network, x, stats, order.number + 1, order.local
        )
        vectors = {X: trained.x.clone(), STATS: trained.stats.clone()}
    tested = yield from _tested(config, vectors, data, network)
    return Message(write_tested(tested), reply_to=message)


def _tested(
    config: Config, vectors: Mapping[str, Tensor], data: SiteData, network: Network
) -> Generator[Work, Any, TestMetrics]:
    xs = vectors[X].reshape(-1, network.model.x.numel())
    result = yield Test(config, network, xs, vectors[STATS].reshape(len(xs), -1), data.test)
    found: dict[str, Any] = {key.replace("-", "_"): value for key, value in result.items()}
    return TestMetrics.model_construct(**found, num_examples=len(data.test.y))
