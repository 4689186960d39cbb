"""What a site does: describe itself, train, evaluate.

Between messages a site keeps data and network in memory while its process lives, and relies on neither: every answer follows from
the message, the run configuration and the data alone.
"""

import sys
import traceback
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor
from torch.nn import functional as F

from client_app import training
from datasets import sources
from datasets.partitions import PartitionError
from datasets.site import Moments, Part, SiteData, Split, deal, moments, own, relabel, standardise, take
from models.flat import FlatModel
from models.networks import build
from strategies.config import Config
from strategies.randomness import derive
from strategies.records import ARRAYS, CONFIG, METRICS, STATS, X, arrays_of, code_version, config_of, pack, unpack
from strategies.schedules import decay, progress

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
        if not isinstance(error, sources.SourceError | PartitionError):  # these say all there is to say
            traceback.print_exc()
        return Message(Error(RAISED, f"{type(error).__name__}: {error}"), reply_to=message)


app = ClientApp(mods=[answer_always])


class Place(NamedTuple):
    """Which site this is.

    Attributes:
        number: counts from 0.
        num_sites: all sites of a simulation; None in a deployment, where a site knows nothing but itself.
        path: a deployed site's data.
    """

    number: int
    num_sites: int | None
    path: str

    @classmethod
    def of(cls, context: Context) -> "Place":
        """From the node's configuration: Flower's in a simulation, ``site=0 data="/srv/data"`` in a deployment."""
        node = context.node_config
        if "data" not in node and "partition-id" in node:
            return cls(int(node["partition-id"]), int(node["num-partitions"]), "")
        try:
            return cls(int(node["site"]), None, str(node["data"]))
        except KeyError as error:
            raise ValueError(f"--node-config has no {error}: a deployed site needs 'site=0 data=\"/srv/data\"'") from None


class Workplace(NamedTuple):
    """A network on its device: the bound model, and what it predicts for a batch of prepared examples."""

    model: FlatModel
    predict: Callable[[Tensor], Tensor]


def config_of_site(context: Context) -> Config:
    """The run configuration, checked once."""
    return _checked(frozenset(context.run_config.items()))


@lru_cache(maxsize=4)
def _checked(run_config: frozenset[tuple[str, Any]]) -> Config:
    return Config.read(dict(run_config))


@lru_cache(maxsize=1)
def _pool(config: Config, path: str) -> sources.Examples:
    return sources.load(
        config.data,
        path,
        label=config.label,
        group=config.group,
        image_size=config.image_size,
        audio_seconds=config.audio_seconds,
        text_buckets=config.text_buckets,
    )


@lru_cache(maxsize=1)
def _splits(config: Config, num_sites: int) -> list[Split]:
    return deal(
        _pool(config, config.data_path),
        num_sites,
        np.random.default_rng(derive(config.seed, "partition")),
        kind=config.partition,
        alpha=config.dirichlet_alpha,
        classes_per_site=config.classes_per_site,
        size_ratio=config.size_ratio,
        iid_fraction=config.iid_fraction,
        test_part=config.test_part,
        test_fraction=config.test_fraction,
    )


def _raw_data(config: Config, place: Place) -> SiteData:
    if place.num_sites is not None:
        splits = _splits(config, place.num_sites)
        chosen = splits if config.strategy == "centralized" else [splits[place.number]]
        return take(_pool(config, config.data_path), chosen)
    if config.strategy == "centralized":
        raise ValueError("strategy = 'centralized' puts the data of all sites in one place: only in a simulation")
    examples = _pool(config, place.path)
    generator = np.random.default_rng(derive(config.seed, "split", place.number))
    return take(examples, [own(examples, generator, test_part=config.test_part, test_fraction=config.test_fraction)])


@lru_cache(maxsize=64)
def site_data(config: Config, place: Place, classes: tuple[str, ...], common: Moments | None) -> SiteData:
    """The examples of a site, on its device, with what all sites agreed on: their classes and, for tables, the moments.

    Raises:
        ValueError: the data cannot be read, dealt out or named.
    """
    data = relabel(_raw_data(config, place), classes)
    if common is not None:
        data = standardise(data, common)
    to = partial(torch.Tensor.to, device=device_of(config.device))
    return data._replace(train=Part(*map(to, data.train)), test=Part(*map(to, data.test)))


@lru_cache(maxsize=4)
def device_of(name: str) -> torch.device:
    """The device to compute on; ``auto`` takes an accelerator where there is one.

    Where Ray gave this process a fraction of a GPU, its memory is held to that fraction.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = found or torch.device("cpu")
    else:
        device = torch.device(name)
    ray = sys.modules.get("ray")
    if device.type == "cuda" and ray is not None and ray.is_initialized():
        share = ray.get_runtime_context().get_assigned_resources().get("GPU", 1)
        if share < 1:
            torch.cuda.set_per_process_memory_fraction(share, device)
    return device


@lru_cache(maxsize=1)
def workplace(config: Config, shape: tuple[int, ...], num_classes: int) -> Workplace:
    """The network of a run for examples of ``shape``, on this site's device."""
    device = device_of(config.device)
    model = FlatModel(build(config.model, shape, num_classes, config.norm, derive(config.seed, "model")), device)
    network = torch.compile(model.network) if config.compile else model.network
    layout = torch.channels_last if config.channels_last and len(shape) == 3 else torch.contiguous_format

    def predict(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            logits: Tensor = network(x.contiguous(memory_format=layout))
        return logits

    return Workplace(model, predict)


@app.query("site")
def describe(message: Message, context: Context) -> Message:
    """Who this site is and what it holds: all that the server needs to build the network and to find mistakes early."""
    config, place = config_of_site(context), Place.of(context)
    data = _raw_data(config, place)
    device_of(config.device)
    name = f"site {place.number}"
    if place.num_sites and config.partition == "natural":
        name = _pool(config, config.data_path).groups[place.number]
    record = ConfigRecord(
        {
            "site": place.number,
            "sites": place.num_sites or 0,
            "name": str(context.node_config.get("name", name)),
            "classes": list(data.classes),
            "columns": list(data.columns),
            "shape": list(data.train.x.shape[1:]),
            "train": len(data.train.y),
            "test": len(data.test.y),
            "notes": list(data.notes),
            "code": code_version(),
        }
    )
    if data.columns:
        own_moments = moments(data.train.x)
        record["known"], record["mean"], record["variance"] = map(list, own_moments)
    if place.num_sites:  # how many examples of each class a real site has is its own business
        record["counts"] = torch.bincount(torch.cat([data.train.y, data.test.y]), minlength=len(data.classes)).tolist()
    return Message(RecordDict({CONFIG: record}), reply_to=message)


def _open(message: Message, context: Context) -> tuple[Config, Place, SiteData, Workplace, dict[str, Tensor]]:
    config, place = config_of_site(context), Place.of(context)
    told = config_of(message)
    classes = tuple(told["classes"])  # type: ignore[arg-type]
    common = Moments(*(tuple(told[key]) for key in Moments._fields)) if "mean" in told else None  # type: ignore[arg-type]
    data = site_data(config, place, classes, common)
    desk = workplace(config, tuple(data.train.x.shape[1:]), len(classes))
    vectors = {name: unpack(array) for name, array in arrays_of(message).items()}
    vectors.setdefault(STATS, torch.empty(*vectors[X].shape[:-1], 0))
    return config, place, data, desk, vectors


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the model in the message on this site's training part, and send it back."""
    config, place, data, desk, vectors = _open(message, context)
    told = config_of(message)
    round_number = int(told["server-round"])  # type: ignore[arg-type]
    lr, start, stop = (float(told[key]) for key in ("lr", "cycle-from", "cycle-to"))  # type: ignore[arg-type]
    model = desk.model
    model.load(vectors[X], vectors[STATS])

    def loss(batch: training.Batch) -> Tensor:
        return F.cross_entropy(desk.predict(batch[0]).float(), batch[1])

    gradient = training.proximal(
        training.sharpness_aware(training.plain(model, loss), config.sam_radius),
        model.x.clone(),
        float(told.get("proximal-mu", 0.0)),  # type: ignore[arg-type]
    )
    order = torch.Generator().manual_seed(derive(config.seed, "order", place.number, round_number))
    augment = training.flip_crop if config.augment == "flip-crop" else None
    an_epoch = training.num_batches(len(data.train.y), config.batch_size)
    # So many epochs or, of an asynchronous strategy, so many batches.
    steps = int(told["local-steps"]) if "local-steps" in told else an_epoch * int(told["local-epochs"])  # type: ignore[arg-type]

    def rate(step: int) -> float:
        return lr * decay(
            config.lr_shape, config.lr_ratio, start + (stop - start) * progress(step, steps, an_epoch, config.lr_steps)
        )

    def batches() -> Iterator[training.Batch]:
        while True:
            yield from training.batches(data.train, config.batch_size, order, augment)

    device = model.x.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout draws from the global generator
        luck = derive(config.seed, "layers", place.number, round_number)
        # Not torch.manual_seed: without a GPU it would remember, with a traceback each, seeds for devices that never come.
        torch.default_generator.manual_seed(luck)
        if device.type == "cuda":
            torch.cuda.manual_seed(luck)
        step = training.optimizer(config.optimizer, model, lr, config.momentum, config.nesterov, config.weight_decay)
        mean_loss, _ = training.train(model, gradient, step, islice(batches(), steps), rate, config.clip_norm)
    metrics = MetricRecord(
        {
            "loss": mean_loss,
            "lr-first": rate(0),
            "lr-last": rate(steps - 1),
            "num-examples": len(data.train.y),
            # Gradients computed, one an example.
            "samples": round(steps / an_epoch * len(data.train.y)) * (2 if config.sam_radius else 1),
        }
    )
    x = model.x
    if told.get("reply") == "delta":  # how far the site moved, and the sum of its rates: delta / lr-sum is its mean gradient
        x = vectors[X].to(device) - model.x
        metrics["lr-sum"] = sum(map(rate, range(steps)))
    content = RecordDict({ARRAYS: pack({X: x, STATS: model.stats}), METRICS: metrics})
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test the model in the message, or the mean prediction of several, on this site's test part."""
    _, _, data, desk, vectors = _open(message, context)
    xs = vectors[X].reshape(-1, desk.model.x.numel())
    result = training.evaluate(desk.predict, desk.model, xs, vectors[STATS].reshape(len(xs), -1), data.test)
    metrics = MetricRecord({**result, "num-examples": len(data.test.y)})
    return Message(RecordDict({METRICS: metrics}), reply_to=message)
