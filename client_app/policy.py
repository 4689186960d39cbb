"""The operator's ``site.toml``: what a site is, and what runs may ask of it.

It is checked before any work.

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

import grp
import math
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, Literal, NoReturn

import torch
from flwr.app import MetricRecord
from pydantic import Field, ValidationError

from client_app.ranks import SHARDING
from client_app.training import num_batches
from configuration.config import Config, flatten
from configuration.sections import Data
from datasets.names import fault
from models.networks import NETWORKS
from models.tasks import TASKS
from page import address_of
from strategies.method import ArrivalPlan, PeerPlan, Section
from strategies.methods import METHODS
from strategies.protocol import Order, PeerOrder

# What a run may name by an import path: importing runs code.
IMPORTABLE = (
    "strategy",
    "training.task",
    "model.name",
    "wire.codec",
    "wire.cross-codec",
    "topology.name",
    "partition.kind",
    "data.source",
)
OF_TORCHVISION = "torchvision:"
# Before, FSDP2 keeps what client_app.sharded takes from it in another way.
SHARDS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15)
ELEMENTWISE = ("sgd", "adamw")  # optimizers that need no whole matrix
DAY_S = 86_400
LONGEST_SOCKET = 107  # bytes of a path, on Linux


class PolicyError(ValueError):
    """A rule of this site is broken; the message names it."""


Count = Annotated[int, Field(ge=1)]


class Policy(Section):
    """The rules of a site: what runs may ask."""

    strategies: list[str] = Field(default=list(METHODS), min_length=1)
    """methods by name; a method of somebody's own stands in import-paths too"""
    models: list[str] = Field(default=list(NETWORKS), min_length=1)
    """networks by name, such as "cnn" or "torchvision:resnet18"; one of somebody's own stands in
    import-paths too"""
    tasks: list[str] = Field(default=list(TASKS), min_length=1)
    """what networks are trained to do, by name; one of somebody's own stands in import-paths too"""
    import_paths: list[str] = Field(default=[])
    """package.module:NAME that runs may name; their code is this site's own, installed copy"""
    sealing: Literal["any", "keys"] = "any"
    """keys: sealed runs only"""
    smallest_batch: Count = 8
    """examples"""
    smallest_steps: Count = 1
    """batches behind an answer"""
    smallest_examples: Count = 32
    """different examples behind an answer; a test on fewer tells no metric"""
    metrics: list[Literal["loss", "accuracy", "means"]] = Field(default=["loss", "accuracy"])
    """which leave; of means the other metrics are made, such as those of each class, F1 and IoU"""
    decimals: Annotated[int, Field(ge=0, le=17)] = 3
    """to which metrics are rounded before they leave; a loss of 10 or more to as many digits as one
    below"""
    largest_model: Count = 10**9
    """parameters"""
    seconds: Annotated[float, Field(ge=0.001, le=1e7)] = 3600.0
    """of work on a message"""
    runs_a_day: Count = 20
    """runs that are begun"""


class Privacy(Section):
    """Clipping and noise of the answers (:mod:`client_app.privacy`)."""

    clip_norm: Annotated[float, Field(gt=0, le=1e6)]
    """of an update, or of a peer's gradient"""
    noise_multiplier: Annotated[float, Field(gt=0, le=1e6)]
    """standard deviation of the noise, in clip-norms"""
    epsilon: Annotated[float, Field(gt=0)]
    """with an answer that would cost more in all, this site takes part no longer"""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """at which epsilon is counted; less than one over the number of examples"""


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
    """the system's group whose members may send requests, beside the service's own user"""
    audit: str = ""
    """file to which a line of JSON is added for each request and answer; empty: none is kept"""
    state: str = ""
    """folder in which a run's memory outlives this service; empty: it does not"""
    save: str = ""
    """file for the finished model of a peer"""
    initial: str = ""
    """file from which networks start where runs have model.initial; runs name no file of this
    site"""
    private_key: str = ""
    """file of the site's own key, for sealed runs"""
    peer_keys: str = ""
    """file of its neighbours' public keys"""
    page: str = ""
    """host:port at which the site's own page is served, such as "127.0.0.1:8081"; it asks for no
    password; empty: none is"""
    policy: Policy = Policy()
    sharding: bool = False
    """for models that do not fit one device: each process of torchrun has its shard of parameters,
    gradients and moments (FSDP2)"""
    privacy: Privacy | None = None
    """clipping and noise of what leaves; none where the table is left out"""

    def node_config(self) -> dict[str, bool | int | float | str]:
        """The node's configuration, as handlers find it in Flower's context."""
        paths = {
            "save": self.save,
            "state": self.state,
            "private-key": self.private_key,
            "peer-keys": self.peer_keys,
        }
        named = {"name": self.name} if self.name else {}
        privacy = self.privacy.model_dump(by_alias=True) if self.privacy else {}
        return {
            "site": self.site,
            "data": self.data.path,
            **named,
            **({SHARDING: True} if self.sharding else {}),
            **{key: path for key, path in paths.items() if path},
            **{f"privacy.{key}": value for key, value in privacy.items()},
        }

    def run_config(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """A run's configuration with this site's data in the place of the run's."""
        own = {f"data.{key}": value for key, value in self.data.model_dump(by_alias=True).items()}
        found = flatten(asked)
        if found.get("model.initial"):
            own["model.initial"] = self.initial
        return {key: value for key, value in found.items() if not key.startswith("data.")} | own


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
        problem = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
        problem = "missing" if first["type"] == "missing" else f"{first['input']!r}: {problem}"
        raise PolicyError(f"{path}: {key}: {problem}") from None
    except (OSError, ValueError) as error:
        raise PolicyError(f"{path}: {error}") from None
    if wrong := [
        each
        for each in found.policy.strategies
        if each not in METHODS and each not in found.policy.import_paths
    ]:
        raise PolicyError(
            f"{path}: policy.strategies: {wrong[0]!r} is no method; "
            f"allowed: {', '.join(METHODS)}, import-paths"
        )
    if wrong := [
        each
        for each in found.policy.tasks
        if each not in TASKS and each not in found.policy.import_paths
    ]:
        raise PolicyError(
            f"{path}: policy.tasks: {wrong[0]!r} is no task; "
            f"allowed: {', '.join(TASKS)}, import-paths"
        )
    if bool(found.private_key) != bool(found.peer_keys):
        raise PolicyError(f"{path}: private-key and peer-keys belong together")
    if found.name and (wrong_name := fault([found.name])):
        raise PolicyError(f"{path}: name: {wrong_name}")
    if found.page:
        try:
            address_of(found.page)
        except ValueError as error:
            raise PolicyError(f"{path}: page: {error}") from None
    if found.privacy and not found.state:
        raise PolicyError(
            f"{path}: privacy needs state, a folder in which it is written down what is spent"
        )
    if found.privacy and found.policy.metrics:
        raise PolicyError(
            f"{path}: privacy: metrics leave without noise, epsilon would not be true: "
            "set policy.metrics = []"
        )
    if found.policy.sealing == "keys" and not found.private_key:
        raise PolicyError(f"{path}: policy.sealing = 'keys' needs private-key and peer-keys")
    return found


def check_machine(site: SiteFile) -> None:
    """Whether what the file names is there.

    Raises:
        PolicyError: it is not; the message names the key, its value and what is wrong.
    """
    path = Path(site.socket)
    if not 0 < len(os.fsencode(site.socket)) <= LONGEST_SOCKET:
        _wrong("socket", site.socket, f"a path of 1 to {LONGEST_SOCKET} bytes is expected")
    if path.exists() and not path.is_socket():
        _wrong("socket", site.socket, "something else is there")
    if site.audit and not Path(site.audit).parent.is_dir():
        _wrong("audit", site.audit, "its folder is not there")
    files = {
        "socket": path.parent,
        "audit": Path(site.audit),
        "state": Path(site.state),
        "save": Path(site.save),
    }
    for key, file in files.items():
        if getattr(site, key) and not _writable(file, folder=key in ("socket", "state")):
            _wrong(
                key, getattr(site, key), "this user must not write there, or it is of another kind"
            )
    if site.group:
        try:
            number = grp.getgrnam(site.group).gr_gid
        except KeyError:
            _wrong("group", site.group, "there is no such group")
        if os.geteuid() and number not in (os.getegid(), *os.getgroups()):
            _wrong(
                "group", site.group, "this user is no member of it and cannot hand the socket over"
            )
    for each in site.policy.import_paths:
        try:
            resolve_name(each)
        except Exception as error:
            _wrong(
                "policy.import-paths",
                each,
                f"it cannot be imported: {type(error).__name__}: {error}",
            )
    for each in site.policy.models:
        try:
            Config.read({"model.name": each})
        except ValueError as error:
            _wrong("policy.models", each, str(error).partition(": ")[2])


def check_processes(site: SiteFile, count: int) -> None:
    """Whether there are processes to share what the file has them share.

    Raises:
        PolicyError: there is but one, or torch is too old.
    """
    if site.sharding and not SHARDS:
        reason = f"torch 2.15 or newer is needed, here is {torch.__version__}; allowed: false"
        _wrong("sharding", True, reason)
    if site.sharding and count == 1:
        _wrong(
            "sharding",
            True,
            "there is one process; allowed: false, or torchrun with 2 processes or more",
        )


def _writable(path: Path, *, folder: bool) -> bool:
    """Whether this user may write a file, or into a folder, that is there or can be made."""
    if path.exists():
        return path.is_dir() == folder and os.access(path, os.W_OK)
    above = next(each for each in path.absolute().parents if each.exists())
    return above.is_dir() and os.access(above, os.W_OK | os.X_OK)


def check_holdings(site: SiteFile, num_train: int) -> None:
    """Whether so many training examples are enough for the site's own rules.

    Raises:
        PolicyError: no answer would ever leave, or its epsilon would promise nothing.
    """
    for key, least in (
        ("smallest-batch", site.policy.smallest_batch),
        ("smallest-examples", site.policy.smallest_examples),
    ):
        if num_train < least:
            _wrong(
                f"policy.{key}",
                least,
                f"this site has {num_train} training examples; allowed: at most so many",
            )
    if site.privacy and site.privacy.delta >= 1 / num_train:
        _wrong(
            "privacy.delta",
            site.privacy.delta,
            f"less than 1 / {num_train}, the training examples, is expected",
        )


def _wrong(key: str, value: object, why: str) -> NoReturn:
    raise PolicyError(f"{key} = {value!r}: {why}")


def check_paths(policy: Policy, run_config: Mapping[str, Any]) -> None:
    """Before the configuration is read, which imports what it names.

    Raises:
        PolicyError: it names what is not allowed.
    """
    for key in IMPORTABLE:
        path = run_config.get(key)
        if (
            isinstance(path, str)
            and ":" in path
            and not path.startswith(OF_TORCHVISION)
            and path not in policy.import_paths
        ):
            refuse("import-paths", policy.import_paths, f"{key} = {path!r}")


def check_run(policy: Policy, config: Config) -> None:
    """Check the configuration of a run.

    Raises:
        PolicyError: it breaks a rule.
    """
    training = config.training
    if config.strategy not in policy.strategies:
        refuse("strategies", policy.strategies, f"strategy = {config.strategy!r}")
    if config.model.name not in policy.models and config.model.name not in policy.import_paths:
        refuse("models", policy.models, f"model.name = {config.model.name!r}")
    if training.task not in policy.tasks and training.task not in policy.import_paths:
        refuse("tasks", policy.tasks, f"training.task = {training.task!r}")
    if policy.sealing == "keys" and config.wire.sealing != "keys":
        refuse("sealing", policy.sealing, f"wire.sealing = {config.wire.sealing!r}")
    if training.batch_size < policy.smallest_batch:
        refuse(
            "smallest-batch", policy.smallest_batch, f"training.batch-size = {training.batch_size}"
        )


def check_sharding(site: SiteFile, config: Config) -> None:
    """Whether a run's model can be sharded, where the site has it so.

    Raises:
        PolicyError: it cannot.
    """
    rule = "this site has sharding = true; allowed:"
    if not site.sharding:
        return
    if isinstance(config.plan, PeerPlan):
        raise PolicyError(
            f"strategy = {config.strategy!r}: a peer keeps whole models; "
            f"{rule} methods with a server"
        )
    if config.training.optimizer not in ELEMENTWISE:
        raise PolicyError(
            f"training.optimizer = {config.training.optimizer!r}: {rule} {', '.join(ELEMENTWISE)}"
        )
    if config.computing.compile:
        raise PolicyError(f"computing.compile = true: {rule} false")


def check_order(
    policy: Policy, config: Config, order: Order | PeerOrder | None, num_train: int
) -> None:
    """Check what a message asks for, at a site of ``num_train`` examples.

    Without an ``order``, what the messages of this run will ask for is checked.

    Raises:
        PolicyError: it breaks a rule.
    """
    batches, plan = num_batches(num_train, config.training.batch_size), config.plan
    if isinstance(order, Order) and order.local:
        steps = order.local.steps or order.local.epochs * batches
    elif not isinstance(order, Order) and isinstance(plan, PeerPlan | ArrivalPlan):
        steps = plan.steps
    else:
        return
    if steps < policy.smallest_steps:
        refuse("smallest-steps", policy.smallest_steps, f"an answer after {steps} batches")
    if (batch := round(num_train / batches)) < policy.smallest_batch:
        refuse(
            "smallest-batch",
            policy.smallest_batch,
            f"batches of {batch} of this site's {num_train} examples",
        )
    if (examples := min(round(steps * num_train / batches), num_train)) < policy.smallest_examples:
        refuse(
            "smallest-examples", policy.smallest_examples, f"an answer after {examples} examples"
        )


def withhold(policy: Policy, metrics: MetricRecord, num_test: int) -> None:
    """Take out what must not leave, and round the rest.

    Args:
        policy: the site's.
        metrics: a record of an answer; changed.
        num_test: examples that a test was made on.
    """
    of_test = "samples" not in metrics
    for name, value in list(metrics.items()):
        kind = next((kind for kind in ("loss", "accuracy", "means") if kind in name), None)
        if kind and (
            kind not in policy.metrics
            or ((of_test or "test" in name) and num_test < policy.smallest_examples)
        ):
            del metrics[name]
        elif kind:
            rounded = [
                _rounded(float(each), policy.decimals)
                for each in (value if isinstance(value, list) else [value])
            ]
            metrics[name] = rounded if isinstance(value, list) else rounded[0]


def _rounded(value: float, decimals: int) -> float:
    """A rounded value; a large one gets no more digits than a small one.

    A model can be made to multiply what it reports.
    """
    large = math.floor(math.log10(abs(value))) if 1 <= abs(value) < math.inf else 0
    return round(value, decimals - large)


def refuse(rule: str, allowed: object, asked: str) -> NoReturn:
    """Say which rule is broken, and by what.

    Raises:
        PolicyError: always.
    """
    raise PolicyError(f"{asked}: this site's policy has {rule} = {allowed!r}")
