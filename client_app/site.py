"""A site: which one it is, its data, its network on its device.

Between messages a site keeps data and network in memory while its process lives, and relies on
neither: every answer follows from the message, the run configuration, the data and the context's
state alone.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from flwr.app import Context, Message
from torch import Tensor

from client_app import training
from client_app.privacy import Noise
from client_app.ranks import SHARDING, all_or_none
from configuration.config import Config
from configuration.errors import ConfigError
from configuration.network import network_of as build
from datasets import sources
from datasets.lazy import Lazy, Values
from datasets.names import fault
from datasets.site import (
    Moments,
    Part,
    SiteData,
    Split,
    deal,
    own,
    relabel,
    standardise,
    standardise_numbers,
    take,
)
from models.flat import FlatModel
from models.tasks import Task
from strategies.method import ArrivalPlan, PeerPlan, RoundPlan
from strategies.protocol import Agreed
from strategies.randomness import derive
from strategies.records import config_of

SPLIT_SEED = 1  # of a deployed site's test part, in all runs
FEWEST = 16  # examples: the loss of a known network on few of them tells what they are


class SiteId(NamedTuple):
    """Which site this is.

    Attributes:
        number: counts from 0.
        num_sites: all sites of a simulation; None in a deployment, where a site knows nothing but
            itself.
        path: a deployed site's data.
    """

    number: int
    num_sites: int | None
    path: str

    @classmethod
    def of(cls, context: Context) -> "SiteId":
        """Read from the node's configuration.

        It is Flower's in a simulation, ``site=0 data="/srv/data"`` in a deployment.
        """
        node = context.node_config
        if "data" not in node and "partition-id" in node:
            return cls(int(node["partition-id"]), int(node["num-partitions"]), "")
        try:
            return cls(int(node["site"]), None, str(node["data"]))
        except KeyError as error:
            raise ValueError(
                f"--node-config has no {error}: a deployed site needs 'site=0 data=\"/srv/data\"'"
            ) from None


class Network(NamedTuple):
    """A network on its device.

    Attributes:
        task: what it is trained to do.
        details: whether tests tell what the metrics of each class are made of.
        model: the bound model.
        predict: what it predicts for a batch of prepared examples.
        x, stats: the initial model; of peers, which start from it. Others train what they are sent,
            and ``x`` is as it comes.
        plain: the gradient of the mean loss over a batch.
        sharp: the same, sharpness-aware where the run is.
        at_once: examples that are tested together.
    """

    task: Task
    details: bool
    model: FlatModel
    predict: Callable[[Tensor], Tensor]
    x: Tensor
    stats: Tensor
    plain: training.Gradient
    sharp: training.Gradient
    at_once: int = training.EVALUATION_BATCH

    def test(self, xs: Tensor, statistics: Tensor, part: Part) -> dict[str, float | list[float]]:
        """Metrics of the mean prediction of models [k, d] with their statistics [k, b].

        As in :func:`training.evaluate`.
        """
        return training.evaluate(
            self.task,
            self.predict,
            self.model,
            xs,
            statistics,
            part,
            details=self.details,
            at_once=self.at_once,
        )


def config_of_site(context: Context) -> Config:
    """The run configuration, checked once.

    Raises:
        ConfigError: it is wrong, or would have a site that holds keys for sealing show its models.
    """
    config = _checked(frozenset(context.run_config.items()))
    if "peer-keys" in context.node_config and config.wire.sealing != "keys":
        raise ConfigError(
            f"wire.sealing = {config.wire.sealing!r}: this site has peer-keys and takes part in "
            "sealed runs only; allowed: 'keys'"
        )
    return config


@lru_cache(maxsize=4)
def _checked(run_config: frozenset[tuple[str, Any]]) -> Config:
    return Config.read(dict(run_config))


class Origin(NamedTuple):
    """Where a site's examples come from, and all that decoding them depends on.

    Attributes:
        source, path: as in :func:`datasets.sources.load`.
        options: its other arguments.
        fingerprint: of the files.
    """

    source: str
    path: str
    options: tuple[tuple[str, Any], ...]
    fingerprint: str


def origin_of(config: Config, site: SiteId) -> Origin:
    """The origin of a site's examples; it changes with the files.

    Raises:
        SourceError: there are none.
    """
    data, path = config.data, config.data.path if site.num_sites is not None else site.path
    keys = (
        "label",
        "group",
        "image_size",
        "channels",
        "audio_seconds",
        "text_buckets",
        "context",
        "vocabulary",
        "memory_gb",
    )
    options = (*((key, getattr(data, key)) for key in keys), ("target", config.task.target))
    return Origin(data.source, path, options, _fingerprint(data.source, path))


# Of a source and path: when to look again, and what was found.
_looks: dict[tuple[str, str], tuple[float, str]] = {}


def _fingerprint(source: str, path: str) -> str:
    """The fingerprint of the files, as of a moment ago.

    A look at a million of them takes seconds, and looking takes a twentieth of the time at most.
    """
    due, before = _looks.get((source, path), (0.0, ""))
    if (start := time.monotonic()) < due:
        return before
    found = sources.fingerprint(source, path)
    end = time.monotonic()
    _looks[source, path] = end + 19 * (end - start), found
    if found != before:
        _site_data.cache_clear()  # the copies of what was there before
    return found


@lru_cache(maxsize=1)
def _pool(origin: Origin) -> sources.Examples:
    return sources.load(origin.source, origin.path, **dict(origin.options))


@lru_cache(maxsize=4)
def _splits(config: Config, num_sites: int, origin: Origin) -> list[Split]:
    return deal(
        _pool(origin),
        num_sites,
        np.random.default_rng(derive(config.seed, "partition")),
        kind=config.partition.kind,
        alpha=config.partition.alpha,
        classes_per_site=config.partition.classes_per_site,
        size_ratio=config.partition.size_ratio,
        iid_fraction=config.partition.iid_fraction,
        test_part=config.data.test_part,
        test_fraction=config.data.test_fraction,
        validation=config.data.validation,
    )


def _pooled(config: Config) -> bool:
    return isinstance(config.plan, RoundPlan) and config.plan.pooled


def _radius(config: Config) -> float:
    return (
        config.plan.gradient.rho
        if isinstance(config.plan, PeerPlan)
        else config.training.sam_radius
    )


def _epochs(config: Config) -> bool:
    """Whether sites train for whole epochs."""
    return not isinstance(config.plan, PeerPlan | ArrivalPlan) and not hasattr(
        config.keys, "local_steps"
    )


def raw_data(config: Config, site: SiteId) -> SiteData:
    """The examples of a site as they were read: classes and columns are its own.

    Raises:
        ConfigError: the run is sealed, and the site would tell losses on a few examples.
    """
    return _raw_data(config, site, origin_of(config, site))


def _raw_data(config: Config, site: SiteId, origin: Origin) -> SiteData:
    data = take(_pool(origin), _chosen(config, site, origin))
    parts = f"{len(data.train.y)} training and {len(data.test.y)} test examples"
    if isinstance(data.train.x, Lazy) and data.train.x.in_order and not _epochs(config):
        said = (
            "an IterableDataset is read from its beginning each time; "
            "allowed: methods with local-epochs"
        )
        raise ConfigError(f"strategy = {config.strategy!r}: {said}")
    if config.wire.sealing != "off" and min(len(data.train.y), len(data.test.y)) < FEWEST:
        key, share = (
            ("validation", config.data.validation)
            if config.data.validation
            else ("test-fraction", config.data.test_fraction)
        )
        raise ConfigError(
            f"data.{key} = {share:g}: {parts} at this site; allowed, sealed: {FEWEST} or more"
        )
    return data


def _chosen(config: Config, site: SiteId, origin: Origin) -> list[Split]:
    if site.num_sites is not None:
        splits = _splits(config, site.num_sites, origin)
        return splits if _pooled(config) else [splits[site.number]]
    if _pooled(config):
        raise ValueError(
            f"strategy = {config.strategy!r} puts the data of all sites in one place: "
            "only in a simulation"
        )
    # Not the run's seed: from what two halves have in common, and what not, follows each example;
    # and a test stays one.
    generator = np.random.default_rng(derive(SPLIT_SEED, "split", site.number))
    return [
        own(
            _pool(origin),
            generator,
            test_part=config.data.test_part,
            test_fraction=config.data.test_fraction,
            validation=config.data.validation,
        )
    ]


def site_data(
    config: Config, site: SiteId, classes: tuple[str, ...], common: Moments | None
) -> SiteData:
    """The examples of a site, on its device, with what all sites agreed on.

    That is their classes and, for tables, the moments.

    Raises:
        ValueError: the data cannot be read, split or named.
    """
    return _site_data(config, site, origin_of(config, site), classes, common)


@lru_cache(maxsize=64)
def _site_data(
    config: Config, site: SiteId, origin: Origin, classes: tuple[str, ...], common: Moments | None
) -> SiteData:
    data = relabel(_raw_data(config, site, origin), classes)
    if common is not None:
        columns, numbers = common.split(len(data.columns))
        data = standardise(data, columns) if data.columns else data
        data = standardise_numbers(data, numbers) if config.task.target == "numbers" else data
    device = device_of(config.computing.device)

    def there(values: Values) -> Values:
        if isinstance(values, Lazy):
            return replace(
                values, device=device, workers=min(config.computing.workers, os.cpu_count() or 1)
            )
        return values.to(device)

    return data._replace(train=Part(*map(there, data.train)), test=Part(*map(there, data.test)))


@lru_cache(maxsize=4)
def device_of(name: str) -> torch.device:
    """The device to compute on; ``auto`` takes an accelerator where there is one.

    Where Ray gave this process a fraction of a GPU, its memory is held to that fraction.

    Raises:
        ConfigError: this site does not have it.
    """
    if name == "auto":
        found = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        device = found or torch.device("cpu")
    else:
        device = torch.device(name)
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # as torch's parts say it
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"computing.device = {name!r}: {reason}; "
                "allowed here: 'auto', or one that this site has"
            ) from error
    ray = sys.modules.get("ray")
    if device.type == "cuda" and ray is not None and ray.is_initialized():
        share = ray.get_runtime_context().get_assigned_resources().get("GPU", 1)
        if share < 1:
            torch.cuda.set_per_process_memory_fraction(share, device)
    return device


@lru_cache(maxsize=1)
def network_of(
    config: Config, shape: tuple[int, ...], num_classes: int, sharding: bool = False
) -> Network:
    """The network of a run for examples of ``shape``, on this site's device.

    With ``sharding`` it is a shard of the network on each device.
    """
    device = device_of(config.computing.device)
    task, network = config.task, build(config, shape, num_classes)[0]
    if sharding:
        # Imported here: FSDP2 takes a second to import, and few sites have it.
        from client_app.sharded import ShardedModel, sharded

        model: FlatModel = (shards := ShardedModel(network, device))
    else:
        model = FlatModel(network, device)
    compiled = torch.compile(model.network) if config.computing.compile else model.network
    layout = (
        torch.channels_last
        if config.computing.channels_last and len(shape) == 3
        else torch.contiguous_format
    )

    def predict(x: Tensor) -> Tensor:
        # Each layer is put together from all processes.
        together = all_or_none() if sharding else nullcontext()
        with (
            together,
            torch.autocast(
                device.type, torch.bfloat16, enabled=config.computing.precision == "bfloat16"
            ),
        ):
            logits: Tensor = compiled(x.contiguous(memory_format=layout))
        return logits

    at_once = min(
        config.computing.micro_batch or training.EVALUATION_BATCH, training.EVALUATION_BATCH
    )
    plain = training.plain(
        model, lambda batch: task.losses(predict(batch[0]).float(), batch[1]).mean()
    )
    if sharding:
        # Parts of the whole batch, not of a process's: all go through equally many.
        plain = training.accumulated(
            sharded(plain, shards), config.computing.micro_batch * shards.count
        )
        sharp = training.sharpness_aware(plain, _radius(config), model.norm)
        return Network(
            task,
            config.results.details,
            model,
            predict,
            model.x,
            model.stats,
            plain,
            sharp,
            at_once,
        )
    plain = training.accumulated(plain, config.computing.micro_batch)
    if dist.is_available() and dist.is_initialized():
        plain = training.data_parallel(
            plain, dist.get_rank(), dist.get_world_size(), model.statistics
        )
    initial = model.x.clone() if isinstance(config.plan, PeerPlan) else model.x
    sharp = training.sharpness_aware(plain, _radius(config))
    return Network(
        task, config.results.details, model, predict, initial, model.stats, plain, sharp, at_once
    )


def name_of(config: Config, site: SiteId, context: Context) -> str:
    """A site's name for people."""
    name = f"site {site.number}"
    if site.num_sites and config.partition.kind == "natural":
        name = _pool(origin_of(config, site)).groups[site.number]
    name = str(context.node_config.get("name", name))
    if wrong := fault([name]):
        raise ConfigError(f"name of --node-config: {wrong}")
    return name


def open_site(message: Message, context: Context) -> tuple[Config, SiteId, SiteData, Network]:
    """Everything that a message is answered with, besides what it holds itself."""
    config, site = config_of_site(context), SiteId.of(context)
    agreed = Agreed.of(config_of(message))
    classes, common = agreed.classes, Moments(*agreed.moments) if agreed.moments else None
    data = site_data(config, site, classes, common)
    sharding = bool(context.node_config.get(SHARDING))
    return (
        config,
        site,
        data,
        network_of(config, tuple(data.train.x.shape[1:]), len(classes), sharding),
    )


def private(context: Context, network: Network) -> Noise | None:
    """What this site does to what leaves.

    Raises:
        ValueError: it cannot be done to this network, or the site's epsilon is spent.
    """
    noise = Noise.of(context)
    if noise and network.model.num_stats:
        raise ConfigError(
            "model.norm = 'batch': statistics would leave without noise; "
            "allowed at this site: 'group'"
        )
    return noise


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Inside, dropout draws from a seed of this site and round.

    It knows no generator but torch's global one.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # Not torch.manual_seed: without a GPU it would remember, with a traceback each, seeds for
        # devices that never come.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield
