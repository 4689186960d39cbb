"""What a site does: describe itself, train, evaluate; as a peer, exchange with its neighbours."""

import traceback
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor

from client_app import training
from client_app.memory import keep_on_disk
from client_app.peer import cross_step, take_step, topology_of
from client_app.sealing import SealError, keyring, public_key
from client_app.site import Place, config_of_site, device_of, dice, name_of, open_site, raw_data
from datasets.partitions import PartitionError
from datasets.site import moments
from datasets.sources import SourceError
from strategies.config import PEERS, ConfigError
from strategies.protocol import SiteCard, TestMetrics, TrainMetrics, read_order, write_card, write_tested, write_trained
from strategies.randomness import derive
from strategies.records import STATS, X, arrays_of, code_version, config_of, unpack
from strategies.schedules import rates

RAISED = 2  # Flower's code for a ClientApp that raised an exception


def answer_always(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Whatever goes wrong, reply: a handler that ends the process would take other sites of a simulation with it.

    The reply holds the error's own words, so that the server can name the cause; the traceback stays in the site's log.
    """
    try:
        return call_next(message, context)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if not isinstance(error, SourceError | PartitionError | ConfigError):  # these say all there is to say
            traceback.print_exc()
        return Message(Error(RAISED, f"{type(error).__name__}: {error}"), reply_to=message)


app = ClientApp(mods=[answer_always, keep_on_disk])


@app.query("site")
def describe(message: Message, context: Context) -> Message:
    """Who this site is and what it holds: all that the server needs to build the network and to find mistakes early."""
    config, place = config_of_site(context), Place.of(context)
    data = raw_data(config, place)
    device_of(config.device)
    found: dict[str, Any] = {}
    if data.columns:
        found |= {key: list(value) for key, value in moments(data.train.x)._asdict().items()}
    if place.num_sites:  # how many examples of each class a real site has is its own business
        found["counts"] = torch.bincount(torch.cat([data.train.y, data.test.y]), minlength=len(data.classes)).tolist()
    if config.sealing == "trust-on-first-use":
        found["public_key"] = public_key(context)
    elif config.sealing == "keys":
        keys = keyring(context, config.sealing, place.number, {})
        linked = topology_of(config).linked(place.number) if config.topology != "edges" else []  # the file is the server's
        if missing := [other for other in linked if not keys.knows(other)]:
            raise SealError(f"peer-keys = {context.node_config['peer-keys']!r}: no keys of the neighbours {missing}")
    card = SiteCard.model_construct(
        site=place.number,
        sites=place.num_sites or 0,
        name=name_of(config, place, context),
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


def _vectors(message: Message) -> dict[str, Tensor]:
    vectors = {name: unpack(array) for name, array in arrays_of(message).items()}
    vectors.setdefault(STATS, torch.empty(*vectors[X].shape[:-1], 0))
    return vectors


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the model in the message on this site's training part, and send it back."""
    config, place, data, desk = open_site(message, context)
    if config.strategy in PEERS:
        raise ValueError(f"strategy = {config.strategy!r}: a peer trains its own model, not one that is sent")
    vectors = _vectors(message)
    told = read_order(config_of(message))
    local = told.local
    if local is None:
        raise ValueError("this order says nothing about training")
    model = desk.model
    model.load(vectors[X], vectors[STATS])

    gradient = training.proximal(desk.sharp, model.x.clone(), local.proximal)
    order = torch.Generator().manual_seed(derive(config.seed, "order", place.number, told.number))
    augment = training.flip_crop if config.augment == "flip-crop" else None
    an_epoch = training.num_batches(len(data.train.y), config.batch_size)
    steps = local.steps or an_epoch * local.epochs
    rate = rates(local.lr, config.lr_shape, config.lr_ratio, config.lr_steps, local.cycle, steps=steps, epoch=an_epoch)

    def batches() -> Iterator[training.Batch]:
        while True:
            yield from training.batches(data.train, config.batch_size, order, augment)

    device = model.x.device
    with dice(device, derive(config.seed, "layers", place.number, told.number)):
        step = training.optimizer(config.optimizer, model, local.lr, config.momentum, config.nesterov, config.weight_decay)
        mean_loss, _ = training.train(model, gradient, step, islice(batches(), steps), rate, config.clip_norm)
    metrics = TrainMetrics.model_construct(
        loss=mean_loss,
        lr_first=rate(0),
        lr_last=rate(steps - 1),
        num_examples=len(data.train.y),
        # Gradients computed, one an example.
        samples=round(steps / an_epoch * len(data.train.y)) * (2 if config.sam_radius else 1),
    )
    x = vectors[X].to(device) - model.x if local.delta else model.x  # how far the site moved, or where it is
    return Message(write_trained({X: x, STATS: model.stats}, metrics), reply_to=message)


@app.train("peer")
def peer(message: Message, context: Context) -> Message:
    """A step of a peer: mix what neighbours sent, train, offer the result to them."""
    return take_step(message, context)


@app.train("cross")
def cross(message: Message, context: Context) -> Message:
    """A peer's gradients at its neighbours' models."""
    return cross_step(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test the model in the message, or the mean prediction of several, on this site's test part."""
    config, _, data, desk = open_site(message, context)
    if config.strategy in PEERS and config.sealing != "off":
        raise ValueError(f"sealing = {config.sealing!r}: a sealed peer tests no model but its own")
    vectors = _vectors(message)
    xs = vectors[X].reshape(-1, desk.model.x.numel())
    result = training.evaluate(desk.predict, desk.model, xs, vectors[STATS].reshape(len(xs), -1), data.test)
    found: dict[str, Any] = {key.replace("-", "_"): value for key, value in result.items()}
    metrics = TestMetrics.model_construct(**found, num_examples=len(data.test.y))
    return Message(write_tested(metrics), reply_to=message)
