"""What a site is and what runs may ask of it: its operator's ``site.toml``, checked before any work.

    site = 0
    name = "clinic A"
    socket = "/run/archipelago/site.sock"

    [data]                        # as in the run configuration; the run's own are not looked at
    source = "csv"
    path = "/srv/heart.csv"
    label = "target > 0"

    [policy]
    strategies = ["co-learning", "dmsgd"]
    smallest-batch = 16

A run that breaks a rule is answered with an error that names the rule.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import Field, ValidationError

from configuration.config import Config
from configuration.sections import Data
from datasets.names import fault
from models.networks import NETWORKS
from strategies.method import ArrivalPlan, PeerPlan, Section
from strategies.methods import METHODS
from strategies.protocol import Order, PeerOrder

# What a run may name by an import path: importing runs code.
IMPORTABLE = ("strategy", "model.name", "wire.codec", "wire.cross-codec", "topology.name", "partition.kind", "data.source")
OF_TORCHVISION = "torchvision:"
DAY_S = 86_400


class PolicyError(ValueError):
    """A rule of this site is broken; the message names it."""


Count = Annotated[int, Field(ge=1)]


class Policy(Section):
    """What runs may ask."""

    strategies: list[str] = Field(default=list(METHODS), min_length=1)
    """methods by name; a method of somebody's own stands in import-paths too"""
    models: list[str] = Field(default=list(NETWORKS), min_length=1)
    """networks by name, such as "cnn" or "torchvision:resnet18"; one of somebody's own stands in import-paths too"""
    import_paths: list[str] = Field(default=[])
    """package.module:NAME that runs may name; their code is this site's own, installed copy"""
    sealing: Literal["any", "keys"] = "any"
    """keys: sealed runs only"""
    smallest_batch: Count = 8
    """examples"""
    smallest_steps: Count = 1
    """batches behind an answer"""
    smallest_examples: Count = 32
    """examples behind an answer: batch by batch in training, all of the test part in a test"""
    largest_model: Count = 10**9
    """parameters"""
    seconds: Annotated[float, Field(gt=0)] = 3600.0
    """of work on a message"""
    runs_a_day: Count = 20
    """runs that are begun"""


class SiteFile(Section):
    """A site, as its operator describes it."""

    site: Annotated[int, Field(ge=0, lt=10**6)]
    """its number, from 0"""
    socket: str
    """the Unix socket at which the service listens"""
    data: Data
    """what it holds"""
    name: str = ""
    """for people; empty: site and its number"""
    group: str = ""
    """the system's group whose members may send letters, beside the service's own user"""
    audit: str = ""
    """file to which a line of JSON is added for each letter and answer; empty: none is kept"""
    state: str = ""
    """folder in which a run's memory outlives this service; empty: it does not"""
    save: str = ""
    """file for the finished model of a peer"""
    private_key: str = ""
    """file of the site's own key, for sealed runs"""
    peer_keys: str = ""
    """file of its neighbours' public keys"""
    policy: Policy = Policy()

    def node_config(self) -> dict[str, bool | int | float | str]:
        """As the handlers find it in Flower's context."""
        paths = {"save": self.save, "state": self.state, "private-key": self.private_key, "peer-keys": self.peer_keys}
        named = {"name": self.name} if self.name else {}
        return {"site": self.site, "data": self.data.path, **named, **{key: path for key, path in paths.items() if path}}

    def run_config(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """A run's configuration with this site's data in the place of the run's."""
        own = {f"data.{key}": value for key, value in self.data.model_dump(by_alias=True).items()}
        return {key: value for key, value in asked.items() if not key.startswith("data.")} | own


def read_site(path: Path) -> SiteFile:
    """The operator's file.

    Raises:
        PolicyError: a key of it is wrong; the message names it, its value and what is allowed.
    """
    try:
        found = SiteFile.model_validate(tomllib.loads(path.read_text()))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        said = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
        said = "missing" if first["type"] == "missing" else f"{first['input']!r}: {said}"
        raise PolicyError(f"{path}: {key}: {said}") from None
    except (OSError, ValueError) as error:
        raise PolicyError(f"{path}: {error}") from None
    if wrong := [each for each in found.policy.strategies if each not in METHODS and each not in found.policy.import_paths]:
        raise PolicyError(f"{path}: policy.strategies: {wrong[0]!r} is no method; allowed: {', '.join(METHODS)}, import-paths")
    if bool(found.private_key) != bool(found.peer_keys):
        raise PolicyError(f"{path}: private-key and peer-keys belong together")
    if found.name and (wrong_name := fault([found.name])):
        raise PolicyError(f"{path}: name: {wrong_name}")
    if found.policy.sealing == "keys" and not found.private_key:
        raise PolicyError(f"{path}: policy.sealing = 'keys' needs private-key and peer-keys")
    return found


def check_paths(policy: Policy, run_config: Mapping[str, Any]) -> None:
    """Before the configuration is read, which imports what it names.

    Raises:
        PolicyError: it names what is not allowed.
    """
    for key in IMPORTABLE:
        path = run_config.get(key)
        if isinstance(path, str) and ":" in path and not path.startswith(OF_TORCHVISION) and path not in policy.import_paths:
            refuse("import-paths", policy.import_paths, f"{key} = {path!r}")


def check_run(policy: Policy, config: Config) -> None:
    """What a run is.

    Raises:
        PolicyError: it breaks a rule.
    """
    training = config.training
    if config.strategy not in policy.strategies:
        refuse("strategies", policy.strategies, f"strategy = {config.strategy!r}")
    if config.model.name not in policy.models and config.model.name not in policy.import_paths:
        refuse("models", policy.models, f"model.name = {config.model.name!r}")
    if policy.sealing == "keys" and config.wire.sealing != "keys":
        refuse("sealing", policy.sealing, f"wire.sealing = {config.wire.sealing!r}")
    if training.batch_size < policy.smallest_batch:
        refuse("smallest-batch", policy.smallest_batch, f"training.batch-size = {training.batch_size}")
    plan = config.plan
    if isinstance(plan, PeerPlan | ArrivalPlan):
        _check_steps(policy, config, plan.steps)


def check_order(policy: Policy, config: Config, order: Order | PeerOrder, num_train: int) -> None:
    """What a message asks for.

    Raises:
        PolicyError: it breaks a rule.
    """
    if isinstance(order, Order) and order.local:
        an_epoch = -(-num_train // config.training.batch_size)
        _check_steps(policy, config, order.local.steps or order.local.epochs * an_epoch)


def _check_steps(policy: Policy, config: Config, steps: int) -> None:
    if steps < policy.smallest_steps:
        refuse("smallest-steps", policy.smallest_steps, f"an answer after {steps} batches")
    if (examples := steps * config.training.batch_size) < policy.smallest_examples:
        refuse("smallest-examples", policy.smallest_examples, f"an answer after {examples} examples")


def refuse(rule: str, allowed: object, asked: str) -> NoReturn:
    """Say which rule is broken, and by what.

    Raises:
        PolicyError: always.
    """
    raise PolicyError(f"{asked}: this site's policy has {rule} = {allowed!r}")
