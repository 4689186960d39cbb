"""A site: which one it is, its data, its network on its device.

Between messages a site keeps data and network in memory while its process lives, and relies on neither: every answer follows from
the message, the run configuration, the data and the context's state alone.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import Context, Message
from torch import Tensor
from torch.nn import functional as F

from client_app import training
from configuration.config import Config
from configuration.errors import ConfigError
from datasets import sources
from datasets.names import fault
from datasets.site import Moments, Part, SiteData, Split, deal, own, relabel, standardise, take
from models.flat import FlatModel
from models.networks import build
from strategies.method import PeerPlan, RoundPlan
from strategies.protocol import Agreed
from strategies.randomness import derive
from strategies.records import config_of

FEWEST = 16  # examples: the loss of a known network on few of them tells what they are


class SiteId(NamedTuple):
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
    def of(cls, context: Context) -> "SiteId":
        """From the node's configuration: Flower's in a simulation, ``site=0 data="/srv/data"`` in a deployment."""
        node = context.node_config
        if "data" not in node and "partition-id" in node:
            return cls(int(node["partition-id"]), int(node["num-partitions"]), "")
        try:
            return cls(int(node["site"]), None, str(node["data"]))
        except KeyError as error:
            raise ValueError(f"--node-config has no {error}: a deployed site needs 'site=0 data=\"/srv/data\"'") from None


class Network(NamedTuple):
    """A network on its device.

    Attributes:
        model: the bound model.
        predict: what it predicts for a batch of prepared examples.
        x, stats: the initial model.
        plain: the gradient of the mean loss over a batch.
        sharp: the same, sharpness-aware where the run is.
    """

    model: FlatModel
    predict: Callable[[Tensor], Tensor]
    x: Tensor
    stats: Tensor
    plain: training.Gradient
    sharp: training.Gradient


def config_of_site(context: Context) -> Config:
    """The run configuration, checked once.

    Raises:
        ConfigError: it is wrong, or would have a site that holds keys for sealing show its models.
    """
    config = _checked(frozenset(context.run_config.items()))
    if "peer-keys" in context.node_config and config.wire.sealing != "keys":
        raise ConfigError(
            f"wire.sealing = {config.wire.sealing!r}: this site has peer-keys and takes part in sealed runs only; allowed: 'keys'"
        )
    return config


@lru_cache(maxsize=4)
def _checked(run_config: frozenset[tuple[str, Any]]) -> Config:
    return Config.read(dict(run_config))


@lru_cache(maxsize=1)
def _pool(config: Config, path: str) -> sources.Examples:
    return sources.load(
        config.data.source,
        path,
        label=config.data.label,
        group=config.data.group,
        image_size=config.data.image_size,
        audio_seconds=config.data.audio_seconds,
        text_buckets=config.data.text_buckets,
    )


@lru_cache(maxsize=1)
def _splits(config: Config, num_sites: int) -> list[Split]:
    return deal(
        _pool(config, config.data.path),
        num_sites,
        np.random.default_rng(derive(config.seed, "partition")),
        kind=config.partition.kind,
        alpha=config.partition.alpha,
        classes_per_site=config.partition.classes_per_site,
        size_ratio=config.partition.size_ratio,
        iid_fraction=config.partition.iid_fraction,
        test_part=config.data.test_part,
        test_fraction=config.data.test_fraction,
    )


def _pooled(config: Config) -> bool:
    return isinstance(config.plan, RoundPlan) and config.plan.pooled


def _radius(config: Config) -> float:
    return config.plan.gradient.rho if isinstance(config.plan, PeerPlan) else config.training.sam_radius


def raw_data(config: Config, site: SiteId) -> SiteData:
    """The examples of a site as they were read: classes and columns are its own.

    Raises:
        ConfigError: the run is sealed, and the site would tell losses on a few examples.
    """
    data = _raw(config, site)
    parts = f"{len(data.train.y)} training and {len(data.test.y)} test examples"
    if config.wire.sealing != "off" and min(len(data.train.y), len(data.test.y)) < FEWEST:
        raise ConfigError(
            f"data.test-fraction = {config.data.test_fraction:g}: {parts} at this site; allowed, sealed: {FEWEST} or more"
        )
    return data


def _raw(config: Config, site: SiteId) -> SiteData:
    if site.num_sites is not None:
        splits = _splits(config, site.num_sites)
        chosen = splits if _pooled(config) else [splits[site.number]]
        return take(_pool(config, config.data.path), chosen)
    if _pooled(config):
        raise ValueError(f"strategy = {config.strategy!r} puts the data of all sites in one place: only in a simulation")
    examples = _pool(config, site.path)
    generator = np.random.default_rng(derive(config.seed, "split", site.number))
    return take(examples, [own(examples, generator, test_part=config.data.test_part, test_fraction=config.data.test_fraction)])


@lru_cache(maxsize=64)
def site_data(config: Config, site: SiteId, classes: tuple[str, ...], common: Moments | None) -> SiteData:
    """The examples of a site, on its device, with what all sites agreed on: their classes and, for tables, the moments.

    Raises:
        ValueError: the data cannot be read, dealt out or named.
    """
    data = relabel(raw_data(config, site), classes)
    if common is not None:
        data = standardise(data, common)
    to = partial(torch.Tensor.to, device=device_of(config.computing.device))
    return data._replace(train=Part(*map(to, data.train)), test=Part(*map(to, data.test)))


@lru_cache(maxsize=4)
def device_of(name: str) -> torch.device:
    """The device to compute on; ``auto`` takes an accelerator where there is one.

    Where Ray gave this process a fraction of a GPU, its memory is held to that fraction.

    Raises:
        ConfigError: this site does not have it.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = found or torch.device("cpu")
    else:
        device = torch.device(name)
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # as torch's parts say it
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"computing.device = {name!r}: {reason}; allowed here: 'auto', or one that this site has") from error
    ray = sys.modules.get("ray")
    if device.type == "cuda" and ray is not None and ray.is_initialized():
        share = ray.get_runtime_context().get_assigned_resources().get("GPU", 1)
        if share < 1:
            torch.cuda.set_per_process_memory_fraction(share, device)
    return device


@lru_cache(maxsize=1)
def network_of(config: Config, shape: tuple[int, ...], num_classes: int) -> Network:
    """The network of a run for examples of ``shape``, on this site's device."""
    device = device_of(config.computing.device)
    model = FlatModel(build(config.model.name, shape, num_classes, config.model.norm, derive(config.seed, "model")), device)
    compiled = torch.compile(model.network) if config.computing.compile else model.network
    layout = torch.channels_last if config.computing.channels_last and len(shape) == 3 else torch.contiguous_format

    def predict(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.computing.precision == "bfloat16"):
            logits: Tensor = compiled(x.contiguous(memory_format=layout))
        return logits

    plain = training.plain(model, lambda batch: F.cross_entropy(predict(batch[0]).float(), batch[1]))
    return Network(model, predict, model.x.clone(), model.stats, plain, training.sharpness_aware(plain, _radius(config)))


def name_of(config: Config, site: SiteId, context: Context) -> str:
    """A site's name for people."""
    name = f"site {site.number}"
    if site.num_sites and config.partition.kind == "natural":
        name = _pool(config, config.data.path).groups[site.number]
    name = str(context.node_config.get("name", name))
    if wrong := fault([name]):
        raise ConfigError(f"name of --node-config: {wrong}")
    return name


def open_site(message: Message, context: Context) -> tuple[Config, SiteId, SiteData, Network]:
    """Everything that a message is answered with, besides what it holds itself."""
    config, site = config_of_site(context), SiteId.of(context)
    classes, moments = Agreed.of(config_of(message))
    common = Moments(*moments) if moments else None
    data = site_data(config, site, classes, common)
    return config, site, data, network_of(config, tuple(data.train.x.shape[1:]), len(classes))


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Inside, dropout draws from a seed of this site and round: it knows no generator but torch's global one."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # Not torch.manual_seed: without a GPU it would remember, with a traceback each, seeds for devices that never come.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield
