"""The run configuration: defaults, files and errors."""

import re
import tomllib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from datasets.sources import load
from models.networks import build
from configuration.config import Config
from configuration.errors import ConfigError
from configuration.sections import NETWORKS, SOURCES
from tests.conftest import ROOT, default_config


def test_defaults_are_exactly_the_fields() -> None:
    assert Config.read(default_config()).kebab() == default_config()
    assert {field.replace("_", "-") for field in Config.model_fields} == default_config().keys()


@pytest.mark.parametrize("path", sorted((ROOT / "conf").glob("*.toml")), ids=lambda path: path.stem)
def test_every_file_in_conf_is_a_configuration(path: Path) -> None:
    with path.open("rb") as file:
        Config.read(default_config() | tomllib.load(file))


def test_configuration_survives_its_own_file() -> None:
    config = Config.read(default_config() | {"data.label": 'a "quoted" > 0', "training.lr": 1, "training.clip-norm": 1e-9})
    assert Config.read(tomllib.loads(tomli_w.dumps(config.flat()))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.lr": -1.0}, "lr = -1.0: must be greater than 0"),
        ({"training.lr": float("nan")}, "lr = nan: "),
        ({"training.lr": "0.1"}, "lr = '0.1': must be a valid number"),
        ({"epochs": 2.5}, "epochs = 2.5: must be a valid integer"),
        ({"epochs": True}, "epochs = True: must be a valid integer"),
        ({"training.nesterov": 1}, "nesterov = 1: must be a valid boolean"),
        ({"training.lr-shape": "sine"}, "lr-shape = 'sine': must be 'exponential', 'linear' or 'cosine'"),
        ({"training.lr-ratio": 1.5}, "lr-ratio = 1.5: must be less than or equal to 1"),
        ({"lerning-rate": 1.0}, "lerning-rate = 1.0: unknown key"),
        ({"local-epoch": 1}, "local-epoch = 1: unknown key; did you mean 'local-epochs'?"),
        ({"strategy": "FedAdm"}, "strategy = 'FedAdm': allowed: co-learning, fedavg, .* did you mean 'FedAdam'?"),
        ({"strategy": "DifferentialPrivacyServerSideFixedClipping"}, "allowed: co-learning"),
        ({"model.name": "resnet18"}, "model = 'resnet18': allowed: cnn, .*torchvision:NAME, package.module:function"),
        ({"model.name": "torchvision:resnet19"}, "model = 'torchvision:resnet19': allowed: .*did you mean 'resnet1"),
        ({"data.source": "cifar"}, "data = 'cifar': allowed: digits, "),
        ({"timeout-s": 0.001}, "timeout-s = 0.001: must be greater than or equal to 1"),
        ({"wire.sealing": "keys"}, "sealing = 'keys': only for a strategy of peers, not for co-learning; allowed: 'off'"),
        (
            {"wire.sealing": "trust-on-first-use", "strategy": "gsgm"},
            "sealing = 'trust-on-first-use': only for a strategy of peers",
        ),
        ({"wire.codec": "fp16", "strategy": "asgd"}, "codec = 'fp16': only for a strategy of peers, not for asgd"),
        ({"min-sites": 6}, "min-sites = 6: at most num-sites, which is 5"),
        ({"METHOD.local-epochs": 33}, "local-epochs = 33: at most epochs, which is 32"),
        ({"METHOD.max-local-epochs": 1}, "max-local-epochs = 1: at least local-epochs, which is 2"),
        ({"training.nesterov": True, "training.momentum": 0.0}, "nesterov = True: needs"),
        ({"flower.arguments": "eta=1"}, "strategy-arguments = 'eta=1': only for a strategy of Flower"),
        ({"strategy": "FedAdam", "flower.arguments": "lr=1"}, "FedAdam knows no argument 'lr'; allowed: eta, eta_l, beta_1"),
        ({"strategy": "FedAdam", "flower.arguments": "eta=x"}, "'x' is not a number"),
        ({"strategy": "QFedAvg"}, "QFedAvg needs client_learning_rate=..."),
        ({"data.test-part": "official"}, "test-part = 'official': digits has no official test part; allowed: 'own'"),
        ({"data.source": "csv", "data.augment": "flip-crop"}, "augment = 'flip-crop': only pictures"),
        ({"model.name": "mlp", "computing.channels-last": True}, "channels-last = True: only for a convolutional model"),
        ({"computing.device": "gpu"}, "device = 'gpu': String should match"),
    ],
)
def test_mistake_is_named_with_key_value_and_what_is_allowed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Config.read(default_config() | changes)
    assert re.search(message.replace("?", r"\?").replace("(", r"\("), str(error.value)), str(error.value)


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"epochs = 0: .*\nlr = 0.0: "):
        Config.read(default_config() | {"epochs": 0, "training.lr": 0.0})


def test_missing_key_is_named() -> None:
    config = default_config()
    del config["seed"]
    with pytest.raises(ConfigError, match="seed: missing"):
        Config.read(config)


def test_strategies_of_flower_are_found_without_trees_and_wrappers() -> None:
    names = set(shipped_strategies())
    assert {"FedAvg", "FedAdam", "FedAvgM", "FedProx", "FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan"} <= names
    assert not any(name.startswith(("FedXgb", "Differential")) for name in names)


def test_strategy_arguments_keep_whole_numbers_whole() -> None:
    assert strategy_arguments("MultiKrum", "num_nodes_to_select=3") == {"num_nodes_to_select": 3}
    assert strategy_arguments("FedAdam", "eta=1e-2 beta_1=-.5") == {"eta": 0.01, "beta_1": -0.5}


def test_every_name_that_the_configuration_allows_is_known() -> None:
    for name in NETWORKS:
        build(name, (3, 32, 32), 10, "batch", 1)
    for name in SOURCES:
        if name not in ("mnist", "fashion-mnist", "cifar10", "cifar100"):  # these would ask the network
            with pytest.raises(ValueError, match="data-path") if name != "digits" else nullcontext():
                load(name, "", label="label", group="", image_size=8, audio_seconds=1.0, text_buckets=8)
