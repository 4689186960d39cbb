"""The whole run configuration: one frozen model, checked before any site starts work.

Defaults stand in ``pyproject.toml`` under ``[tool.flwr.app.config]`` and nowhere else; this file says what is allowed.
"""

import inspect
import re
import sys
import tomllib
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import flwr.serverapp.strategy as shipped
from click import ClickException
from flwr.common.config import parse_config_args
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

ROOT = Path(__file__).parent.parent
IMPORT_PATH = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"

ASYNCHRONOUS = ("gsgm", "asgd", "asgd-momentum", "dc-asgd-c", "dc-asgd-a", "fedasync", "fedbuff")
SHARP = ("q-saddle", "n-saddle", "dfedsam")  # these are others with sharpness-aware gradients
CROSS = ("ngm", "n-saddle")
PEERS = ("d-psgd", "cdsgd", "cdmsgd", "dsgdm", "dmsgd", "qgm", "ngm", "gradient-tracking", *SHARP)
ONLY_PEERS = {"sealing": "off", "codec": "identity", "error-feedback": "none", "cross-codec": "identity"}
OWN_STRATEGIES = ("co-learning", "fedavg", "local", "ensemble", "centralized", *ASYNCHRONOUS, *PEERS)
Codec = Literal["identity", "fp16", "bf16", "qsgd", "top-k", "random-k", "sign"]
NETWORKS = ("cnn", "mlp", "lenet5", "resnet20", "vgg11")
PICTURES = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "image-folder")
OFFICIAL_TEST = ("mnist", "fashion-mnist", "cifar10", "cifar100")
SOURCES = (*PICTURES, "audio-folder", "csv", "text-csv")

Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]


class ConfigError(ValueError):
    """The run configuration cannot be run; the message names the key, its value and what is allowed."""


def shipped_strategies() -> dict[str, type[shipped.Strategy]]:
    """The strategies of Flower that average arrays, by class name: all but trees and wrappers of another strategy."""
    return {
        name: found
        for name in shipped.__all__
        if inspect.isclass(found := getattr(shipped, name)) and issubclass(found, shipped.FedAvg) and not name.startswith("FedXgb")
    }


def strategy_arguments(name: str, text: str) -> dict[str, bool | int | float]:
    """Arguments of the strategy ``name`` of Flower, read from ``"eta=0.1 beta_1=0.9"``.

    Raises:
        ConfigError: an unknown argument, a value that is no number, or a required argument left out.
    """
    ours = {"self", "weighted_by_key", "arrayrecord_key", "configrecord_key", "train_loss_key"}
    parameters = {
        key: parameter
        for key, parameter in inspect.signature(shipped_strategies()[name]).parameters.items()
        if key not in ours and not key.endswith(("_fn", "_rule")) and not key.startswith(("fraction_", "min_"))
    }
    arguments: dict[str, bool | int | float] = {}
    for item in text.split():
        key, _, value = item.partition("=")
        if key not in parameters:
            allowed = ", ".join(parameters) or "none"
            raise ConfigError(f"strategy-arguments = {text!r}: {name} knows no argument {key!r}; allowed: {allowed}")
        try:
            arguments[key] = int(value) if value.lstrip("+-").isdigit() else float(value)
        except ValueError:
            raise ConfigError(f"strategy-arguments = {text!r}: {value!r} is not a number") from None
    required = [key for key, parameter in parameters.items() if parameter.default is parameter.empty]
    if missing := [key for key in required if key not in arguments]:
        raise ConfigError(f"strategy-arguments = {text!r}: {name} needs {' '.join(f'{key}=...' for key in missing)}")
    return arguments


class Config(BaseModel):
    """One run. Read it with :meth:`read`; the comments beside the defaults in ``pyproject.toml`` say what each key does."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, alias_generator=lambda field: field.replace("_", "-"))

    strategy: str
    strategy_arguments: str
    num_sites: Positive
    min_sites: Positive
    epochs: Positive
    local_epochs: Positive
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    timeout_s: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    results_dir: Annotated[str, Field(min_length=1)]

    max_local_epochs: Positive
    epsilon: NotNegative
    weighting: Literal["equal", "samples"]

    local_steps: Positive
    evaluate_every: Annotated[int, Field(ge=0)]
    schedule: Literal["white-list", "local"]
    slack: NotNegative
    window: Positive
    base_optimizer: Literal["asgd", "dc-asgd-c", "dc-asgd-a", "adam", "rmsprop"]
    server_lr: Rate
    server_momentum: Annotated[float, Field(ge=0, lt=1)]
    compensation: NotNegative
    compensation_adaptive: NotNegative
    staleness: Literal["constant", "polynomial", "hinge"]
    staleness_exponent: NotNegative
    staleness_border: NotNegative
    mixing_rate: Share
    proximal_mu: NotNegative
    buffer_size: Positive

    topology: Literal[
        "ring",
        "path",
        "star",
        "complete",
        "torus",
        "hypercube",
        "bipartite",
        "hubs",
        "circulant",
        "random-regular",
        "exponential",
        "one-peer-exponential",
        "dyck",
        "dyck-purdue",
        "edges",
    ]
    mixing: Literal["metropolis", "uniform"]
    lazy: bool
    degree: Positive
    stride: Positive
    edges: str
    averaging_rate: Share
    momentum_form: Literal["position", "velocity"]
    momentum_consensus_weight: Annotated[float, Field(ge=0, le=1)]
    quasi_global_decay: Annotated[float, Field(ge=0, lt=1)]
    cross_gradients: Literal["data", "model"]
    cross_perturbation: Literal["owner-of-data", "none", "owner-of-model"]
    codec: Codec
    codec_bits: Literal[2, 4, 8, 16]
    codec_share: Share
    error_feedback: Literal["none", "deep-squeeze", "choco"]
    cross_codec: Codec
    sealing: Literal["off", "keys", "trust-on-first-use"]
    collect_models: bool

    lr: Rate
    lr_ratio: Share
    lr_shape: Literal["exponential", "linear", "cosine"]
    lr_steps: Literal["batch", "epoch"]
    lr_envelope: Rate

    optimizer: Literal["sgd", "adamw"]
    momentum: Annotated[float, Field(ge=0, lt=1)]
    nesterov: bool
    weight_decay: NotNegative
    batch_size: Positive
    clip_norm: NotNegative
    sam_radius: NotNegative

    model: str
    norm: Literal["batch", "group", "evonorm"]

    data: str
    data_path: str
    label: Annotated[str, Field(min_length=1)]
    group: str
    image_size: Positive
    audio_seconds: Rate
    text_buckets: Positive
    partition: Literal["iid", "dirichlet", "dirichlet-equal", "classes", "sizes", "natural"]
    dirichlet_alpha: Rate
    classes_per_site: Positive
    size_ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    iid_fraction: Annotated[float, Field(ge=0, le=1)]
    test_part: Literal["own", "pooled", "official"]
    test_fraction: Annotated[float, Field(gt=0, lt=1)]
    augment: Literal["none", "flip-crop"]

    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|(cuda|xpu)(:\d+)?)$")]
    precision: Literal["float32", "bfloat16"]
    channels_last: bool
    compile: bool

    @classmethod
    def read(cls, run_config: Mapping[str, Any]) -> Self:
        """Check a run configuration (kebab-case keys, as Flower hands it over).

        Raises:
            ConfigError: names every key that is wrong, its value and what is allowed.
        """
        try:
            return cls.model_validate(dict(run_config))
        except ValidationError as error:
            raise ConfigError("\n".join(_explain(each) for each in error.errors())) from None

    def kebab(self) -> dict[str, bool | int | float | str]:
        """The configuration as Flower's ``--run-config`` takes it."""
        return self.model_dump(by_alias=True)

    @field_validator("strategy")
    @classmethod
    def _known_strategy(cls, name: str) -> str:
        return _one_of(name, (*OWN_STRATEGIES, *shipped_strategies()))

    @field_validator("model")
    @classmethod
    def _known_model(cls, name: str) -> str:
        if name.startswith("torchvision:"):
            from torchvision import models  # here: it takes a second to import

            _one_of(name.removeprefix("torchvision:"), tuple(models.list_models(module=models)))
            return name
        return _one_of_or_import_path(name, NETWORKS, "torchvision:NAME")

    @field_validator("data")
    @classmethod
    def _known_source(cls, name: str) -> str:
        return _one_of_or_import_path(name, SOURCES)

    @property
    def unit(self) -> str:
        """What the run counts: round, update of the server, or exchange of peers."""
        return "update" if self.strategy in ASYNCHRONOUS else "exchange" if self.strategy in PEERS else "round"

    @property
    def two_steps(self) -> bool:
        """Whether peers exchange gradients after their models: two messages an exchange."""
        return self.strategy in CROSS and self.cross_gradients == "data"

    def _peers(self, refuse: Callable[[str, str], None]) -> None:
        """What does not go together in a strategy of peers."""
        if self.num_sites < 2:
            refuse("num-sites", f"{self.strategy} needs peers to exchange with; at least 2")
        if self.optimizer != "sgd":
            refuse("optimizer", f"{self.strategy} brings its own momentum; allowed: 'sgd'")
        if self.strategy in SHARP and not self.sam_radius:
            refuse("sam-radius", f"{self.strategy} is sharpness-aware; above 0, such as 0.05")
        if self.codec in ("top-k", "random-k", "sign") and self.error_feedback == "none":
            refuse("error-feedback", f"codec = {self.codec!r} loses what it leaves out; allowed: 'deep-squeeze', 'choco'")
        if self.error_feedback == "choco" and self.topology == "one-peer-exponential":
            refuse("error-feedback", "neighbours change, 'choco' needs them to hear everything; allowed: 'none', 'deep-squeeze'")
        if self.strategy == "gradient-tracking" and self.codec not in ("identity", "fp16", "bf16"):
            refuse(
                "codec",
                "gradient-tracking cannot take it, its trackers carry on every error; allowed: 'identity', 'fp16', 'bf16'",
            )
        if self.topology in ("exponential", "one-peer-exponential") and self.two_steps:
            refuse("topology", "gradients go back where models came from, against its links; or cross-gradients = 'model'")
        if self.strategy in CROSS:
            if self.local_steps > 1:
                refuse("local-steps", f"{self.strategy} exchanges gradients of every batch; allowed: 1")
            if self.cross_perturbation == "owner-of-model" and (self.cross_gradients == "model" or self.codec != "identity"):
                refuse("cross-perturbation", "'owner-of-model' needs cross-gradients = 'data' and codec = 'identity'")

    @model_validator(mode="after")
    def _together(self) -> Self:
        def refuse(key: str, why: str) -> None:
            value = self.kebab()[key]
            raise ValueError(f"{key} = {value!r}: {why}")

        if self.min_sites > self.num_sites:
            refuse("min-sites", f"at most num-sites, which is {self.num_sites}")
        if self.unit == "round" and self.local_epochs > self.epochs:
            refuse("local-epochs", f"at most epochs, which is {self.epochs}")
        if self.strategy == "co-learning" and self.max_local_epochs < self.local_epochs:
            refuse("max-local-epochs", f"at least local-epochs, which is {self.local_epochs}")
        if self.nesterov and (self.momentum == 0 or self.optimizer != "sgd"):
            refuse("nesterov", 'needs optimizer = "sgd" and a momentum above 0')
        if self.strategy in OWN_STRATEGIES:
            if self.strategy_arguments:
                refuse("strategy-arguments", f"only for a strategy of Flower; {self.strategy} takes none")
        else:
            strategy_arguments(self.strategy, self.strategy_arguments)
        if self.strategy in PEERS:
            self._peers(refuse)
        else:
            for key, without in ONLY_PEERS.items():
                if getattr(self, key.replace("-", "_")) != without:
                    refuse(key, f"only for a strategy of peers, not for {self.strategy}; allowed: {without!r}")
        if self.test_part == "official" and self.data in SOURCES and self.data not in OFFICIAL_TEST:
            refuse("test-part", f"{self.data} has no official test part; allowed: 'own'")
        if self.augment != "none" and self.data in ("audio-folder", "csv", "text-csv"):
            refuse("augment", f"only pictures can be flipped and cropped, not {self.data}; allowed: 'none'")
        if self.model == "mlp" and self.channels_last:
            refuse("channels-last", "only for a convolutional model; allowed: False")
        return self


@cache
def _defaults() -> dict[str, Any]:
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"])


def configuration(conf: str | Path | None = None, **changes: Any) -> Config:
    """The configuration of a run: the defaults of ``pyproject.toml``, then a file of ``conf/``, then ``changes``.

    Keys are those of the run configuration, ``-`` or ``_`` between their words.

    Raises:
        ConfigError: names every key that is wrong, its value and what is allowed.
    """
    return _configuration(conf, {key.replace("_", "-"): value for key, value in changes.items()})


def _configuration(conf: str | Path | None, changes: Mapping[str, Any]) -> Config:
    from_file = {}
    if conf is not None:
        path = next((path for path in (Path(conf), ROOT / conf) if path.is_file()), None)
        if path is None:
            raise ConfigError(f"conf = {str(conf)!r}: there is no such file")
        from_file = tomllib.loads(path.read_text())
    return Config.read(_defaults() | from_file | dict(changes))


def _one_of(name: str, allowed: tuple[str, ...]) -> str:
    if name not in allowed:
        guess = get_close_matches(name, allowed, n=1)
        hint = f"; did you mean {guess[0]!r}?" if guess else ""
        raise ValueError(f"allowed: {', '.join(allowed)}{hint}")
    return name


def _one_of_or_import_path(name: str, allowed: tuple[str, ...], *more: str) -> str:
    if re.fullmatch(IMPORT_PATH, name):
        return name
    return _one_of(name, (*allowed, *more, "package.module:function"))


def _explain(error: Any) -> str:
    """One line of pydantic's findings, in the words of a configuration file."""
    key = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    match error["type"]:
        case "extra_forbidden":
            keys = tuple(field.replace("_", "-") for field in Config.model_fields)
            guess = get_close_matches(key, keys, n=1)
            return f"{key} = {error['input']!r}: unknown key" + (f"; did you mean {guess[0]!r}?" if guess else "")
        case "missing":
            return f"{key}: missing"
    return f"{key} = {error['input']!r}: {message}" if key else message


if __name__ == "__main__":  # `make run` lets it look at CONF and SET before anything is started
    try:
        _configuration(sys.argv[1] or None, parse_config_args(sys.argv[2:]))
    except (ConfigError, ClickException) as wrong:
        sys.exit(str(wrong))
