"""The run configuration: defaults, files and errors."""

import re
import tomllib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from configuration import generate
from configuration.__main__ import pairs, parsed
from configuration.checks import kind_of
from configuration.config import Config, configuration, flatten
from configuration.errors import ConfigError, changed
from configuration.flower import parse_config_args
from configuration.former import FORMER
from configuration.sections import Model
from datasets.sources import SOURCES, load
from models.networks import NETWORKS, build
from strategies.averaging.flower import arguments_of
from strategies.method import PeerPlan
from strategies.methods import METHODS
from tests.conftest import ROOT, default_config


def test_what_make_docs_writes_is_what_stands_in_the_repository() -> None:
    text = generate.PYPROJECT.read_text()
    assert generate.pyproject(text) == text
    assert generate.REFERENCE.read_text() == generate.reference()
    assert generate.TABLE.read_text() == generate.methods()


def test_defaults_are_a_run_and_hold_every_key() -> None:
    assert Config.read(default_config()) == Config.read({}) == configuration()
    assert configuration().flat().items() <= default_config().items()
    assert {
        f"{method.table}.{key}"
        for method in METHODS.values()
        for key in generate.fields(method.keys)
    } <= default_config().keys()


@pytest.mark.parametrize("path", sorted((ROOT / "conf").glob("*.toml")), ids=lambda path: path.stem)
def test_every_file_in_conf_is_a_configuration(path: Path) -> None:
    config = Config.read(default_config() | flatten(tomllib.loads(path.read_text())))
    assert config == configuration(path)


def test_configuration_survives_its_own_file() -> None:
    config = configuration(
        strategy="dmsgd", dmsgd={"momentum": 0.5}, training={"clip_norm": 1e-9, "lr": 1}
    )
    assert Config.read(tomllib.loads(tomli_w.dumps(config.flat()))) == config


def test_configuration_survives_flowers_command_line() -> None:
    quoted = 'a "quoted" > 0'
    config = configuration(
        data={"source": "csv", "label": quoted, "path": "C:\\x"},
        strategy="gsgm",
        gsgm={"window": 5},
        seed=7,
    )
    assert Config.read(parse_config_args([pairs(config)])) == config


@pytest.mark.parametrize(
    "text", ["epochs = 3", "epochs=3 seed = 2", "epochs:3", "junk epochs=3", 'strategy ="gsgm"']
)
def test_pairs_that_are_none_are_not_left_out_in_silence(text: str) -> None:
    with pytest.raises(ConfigError, match="no key=value, without spaces around ="):
        parsed(text)


def test_pairs_are_those_of_flower() -> None:
    assert parsed(""" epochs=3  training.lr=1e-2 data.path='a "b" = c' """) == {
        "epochs": 3,
        "training.lr": 0.01,
        "data.path": 'a "b" = c',
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.lr": -1.0}, "training.lr = -1.0: must be greater than or equal to 0"),
        ({"training.lr": float("nan")}, "training.lr = nan: "),
        ({"training.lr": "0.1"}, "training.lr = '0.1': must be a valid number"),
        ({"epochs": 2.5}, "epochs = 2.5: must be a valid integer"),
        ({"epochs": True}, "epochs = True: must be a valid integer"),
        ({"training.nesterov": 1}, "training.nesterov = 1: must be a valid boolean"),
        (
            {"training.lr-shape": "sine"},
            "training.lr-shape = 'sine': must be 'exponential', 'linear' or 'cosine'",
        ),
        ({"training.lr-ratio": 1.5}, "training.lr-ratio = 1.5: must be less than or equal to 1"),
        ({"lerning-rate": 1.0}, "lerning-rate = 1.0: unknown key"),
        ({"keys": 1}, "keys = 1: unknown key"),
        ({"training": 1}, "training = 1: unknown key"),
        ({"training.lr.x": 1}, "training.lr.x = 1: unknown key; did you mean 'training.lr"),
        (
            {"co-learning.local-epoch": 1},
            "co-learning.local-epoch = 1: unknown key; did you mean 'co-learning.local-epochs'?",
        ),
        (
            {"strategy": "FedAdm"},
            "strategy = 'FedAdm': allowed: co-learning, fedavg, .* did you mean 'FedAdam'?",
        ),
        ({"strategy": "DifferentialPrivacyServerSideFixedClipping"}, "allowed: co-learning"),
        ({"strategy": 3}, "strategy = 3: allowed: co-learning"),
        ({"strategy": "nowhere:METHOD"}, "strategy = 'nowhere:METHOD': it cannot be imported"),
        ({"strategy": "os:path"}, "strategy = 'os:path': a Method is expected, it is a module"),
        (
            {"model.name": "resnet18"},
            "model.name = 'resnet18': allowed: cnn, .*torchvision:NAME, package.module:NAME",
        ),
        (
            {"model.name": "torchvision:resnet19"},
            "model.name = 'torchvision:resnet19': allowed: .*did you mean 'torchvision:resnet1",
        ),
        ({"data.source": "cifar"}, "data.source = 'cifar': allowed: digits, "),
        ({"timeout-s": 0.001}, "timeout-s = 0.001: must be greater than or equal to 1"),
        ({"min-sites": 6}, "min-sites = 6: at most num-sites, which is 5"),
        (
            {"co-learning.local-epochs": 16, "epochs": 15},
            "local-epochs = 16: at most epochs, which is 15",
        ),
        (
            {"co-learning.max-local-epochs": 1},
            "co-learning.max-local-epochs = 1: at least local-epochs, which is 2",
        ),
        ({"training.nesterov": True, "training.momentum": 0.0}, "training.nesterov = True: needs"),
        (
            {"strategy": "FedAdam", "flower.arguments": "lr=1"},
            "argument 'lr' of FedAdam is unknown; allowed: eta, eta_l, beta_1",
        ),
        ({"strategy": "FedAdam", "flower.arguments": "eta=x"}, "'x' is not a number"),
        (
            {"strategy": "FedAdam", "flower.arguments": "eta=1e999"},
            "'1e999' is negative or not finite",
        ),
        (
            {"strategy": "FedProx", "flower.arguments": "proximal_mu=-5"},
            "'-5' is negative or not finite",
        ),
        (
            {"strategy": "FedAdam", "flower.arguments": "eta=1 eta=2"},
            "argument 'eta' of FedAdam is given twice",
        ),
        (
            {"strategy": "FedTrimmedAvg", "flower.arguments": "beta=5"},
            "flower.arguments = 'beta=5': FedTrimmedAvg refuses it",
        ),
        ({"strategy": "QFedAvg"}, "QFedAvg needs client_learning_rate=..."),
        (
            {"data.test-part": "official"},
            "data.test-part = 'official': digits has no official test part; allowed: 'own'",
        ),
        (
            {"data.source": "csv", "data.augment": "flip-crop"},
            "data.augment = 'flip-crop': only pictures",
        ),
        (
            {"model.name": "mlp", "computing.channels-last": True},
            "computing.channels-last = True: only for a convolutional model",
        ),
        (
            {"model.name": "gpt", "model.heads": 5},
            "model.heads = 5: must divide model.width, which is 128",
        ),
        ({"computing.device": "gpu"}, "computing.device = 'gpu': String should match"),
        ({"seed": "a" * 1000}, r"seed = 'a{79}\.\.\. \(1002 characters\): must be a valid integer"),
    ],
)
def test_mistake_is_named_with_key_value_and_what_is_allowed(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        Config.read(default_config() | changes)
    pattern = message if "\\" in message else message.replace("?", r"\?").replace("(", r"\(")
    assert re.search(pattern, str(error.value)), str(error.value)


# One key each that has no effect in the run, and what the error says about who takes it.
WITHOUT_EFFECT: list[tuple[dict[str, Any], str]] = [
    ({"gsgm.window": 5}, "gsgm.window = 5: strategy = 'co-learning' does not take it, only gsgm"),
    ({"fedavg.local-epochs": 3}, "only fedavg; did you mean co-learning.local-epochs?"),
    (
        {"strategy": "qgm", "dmsgd.momentum": 0.5},
        "strategy = 'qgm' does not take it, only dmsgd; did you mean qgm.momentum?",
    ),
    (
        {"flower.arguments": "eta=1"},
        (
            "flower.arguments = 'eta=1': strategy = 'co-learning' does not take it, "
            "only a strategy of Flower"
        ),
    ),
    ({"strategy": "asgd", "fedbuff.buffer-size": 7}, "only fedbuff"),
    (
        {"topology.name": "star"},
        "has no effect with strategy = 'co-learning'; taken by d-psgd, cdsgd",
    ),
    (
        {"wire.sealing": "keys"},
        "wire.sealing = 'keys': has no effect with strategy = 'co-learning'; taken by d-psgd",
    ),
    (
        {"wire.cross-codec": "fp16", "strategy": "asgd"},
        "has no effect with strategy = 'asgd'; taken by d-psgd",
    ),
    ({"results.evaluate-every": 3}, "taken by gsgm, asgd"),
    (
        {"strategy": "gsgm", "training.lr-steps": "epoch"},
        "has no effect with strategy = 'gsgm'; taken by co-learning",
    ),
    (
        {"strategy": "dmsgd", "training.momentum": 0.5},
        "has no effect with strategy = 'dmsgd'; taken by co-learning",
    ),
    (
        {"strategy": "dmsgd", "training.optimizer": "adamw"},
        "has no effect with strategy = 'dmsgd'; taken by co-learning",
    ),
    (
        {"strategy": "n-saddle", "training.sam-radius": 0.1},
        "has no effect with strategy = 'n-saddle'; taken by co-learning",
    ),
    (
        {"partition.alpha": 0.1},
        "has no effect with partition.kind = 'iid'; only with dirichlet, dirichlet-equal",
    ),
    (
        {"partition.classes-per-site": 3},
        "has no effect with partition.kind = 'iid'; only with classes",
    ),
    ({"partition.size-ratio": 3.0}, "has no effect with partition.kind = 'iid'; only with sizes"),
    ({"partition.iid-fraction": 0.5}, "has no effect with partition.kind = 'iid'"),
    (
        {"data.label": "x"},
        "has no effect with data.source = 'digits'; only with csv, parquet, text-csv",
    ),
    ({"data.image-size": 8}, "only with image-folder"),
    ({"data.audio-seconds": 2.0}, "only with audio-folder"),
    ({"data.text-buckets": 8}, "only with text-csv"),
    ({"model.norm": "group"}, "has no effect with model.name = 'cnn'; only with resnet20, vgg11"),
    (
        {"training.lr-ratio": 1.0, "training.lr-shape": "linear"},
        "training.lr-shape = 'linear': has no effect with training.lr-ratio = 1",
    ),
    (
        {"training.optimizer": "adamw", "training.nesterov": True},
        "has no effect with training.optimizer = 'adamw'; only with sgd",
    ),
    (
        {"strategy": "gsgm", "gsgm.staleness-border": 2.0},
        "has no effect with gsgm.staleness = 'constant'; only with hinge",
    ),
    (
        {"strategy": "gsgm", "gsgm.compensation": 2.0},
        "has no effect with gsgm.base = 'asgd'; only with dc-asgd-c, dc-asgd-a",
    ),
    (
        {"strategy": "gsgm", "gsgm.base": "rmsprop", "gsgm.momentum": 0.5},
        "has no effect with gsgm.base = 'rmsprop'",
    ),
    (
        {"strategy": "gsgm", "gsgm.schedule": "refill", "gsgm.slack": 1.0},
        "gsgm.slack = 1.0: has no effect with gsgm.schedule = 'refill'; only with list, local",
    ),
    (
        {"strategy": "asgd", "training.momentum": 0.5},
        "training.momentum = 0.5: has no effect with asgd.local-steps = 1",
    ),
    (
        {"partition.kind": "a:b", "partition.alpha": 0.1},
        "partition.alpha = 0.1: has no effect with partition.kind = 'a:b'",
    ),
    (
        {"data.source": "a:b", "data.label": "x"},
        "data.label = 'x': has no effect with data.source = 'a:b'",
    ),
    (
        {"model.name": "torchvision:resnet18", "model.norm": "group"},
        "has no effect with model.name = 'torchvision:resnet18'",
    ),
    (
        {"strategy": "dmsgd", "topology.name": "a:b", "topology.degree": 3},
        "has no effect with topology.name = 'a:b'",
    ),
    (
        {"strategy": "dmsgd", "topology.degree": 6},
        "has no effect with topology.name = 'ring'; only with random-regular",
    ),
    (
        {"strategy": "dmsgd", "topology.edges": "f"},
        "has no effect with topology.name = 'ring'; only with edges",
    ),
    (
        {"strategy": "dmsgd", "topology.name": "exponential", "topology.mixing": "uniform"},
        "has no effect with topology.name = 'exp",
    ),
    (
        {"strategy": "dmsgd", "wire.bits": 4},
        "wire.bits = 4: has no effect with wire.codec = 'identity'; only with qsgd",
    ),
    (
        {"strategy": "dmsgd", "wire.share": 0.5},
        "wire.share = 0.5: has no effect with wire.codec = 'identity'; only with top-k, random-k",
    ),
    (
        {"strategy": "dmsgd", "wire.error-feedback": "choco"},
        "wire.error-feedback = 'choco': has no effect with wire.codec = 'identity'",
    ),
    (
        {"strategy": "dmsgd", "wire.cross-codec": "sign"},
        "wire.cross-codec = 'sign': has no effect where no gradients are sent",
    ),
    (
        {"strategy": "dmsgd", "wire.sealing": "keys", "wire.collect-models": False},
        "has no effect with wire.sealing = 'keys'; only with off",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WITHOUT_EFFECT, ids=lambda value: str(value)[:60])
def test_key_without_effect_says_who_takes_it(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Config.read(default_config() | changes)
    assert message in str(error.value)


def test_every_key_of_every_other_method_is_refused() -> None:
    """Each key of each method's section, with a method that does not take it.

    At a value that is allowed and not the default.
    """
    other = {"integer": 7, "number": 0.37, "boolean": True}
    tried = 0
    for method in METHODS.values():
        stranger = "fedavg" if method.table != "fedavg" else "gsgm"
        properties = method.keys.model_json_schema(by_alias=True)["properties"]
        for key, field in generate.fields(method.keys).items():
            schema = properties[key]
            values = [
                value
                for value in schema.get("enum", [other.get(schema["type"], "x=1")])
                if value != field.default
            ]
            with pytest.raises(
                ConfigError,
                match=rf"{method.table}\.{key} = .*: strategy = '{stranger}' "
                r"does not take it, only",
            ):
                configuration(strategy=stranger, **{f"{method.table}.{key}": values[0]})
            tried += 1
    assert tried > 100


@pytest.mark.parametrize("key", sorted(FORMER))
def test_flat_key_of_before_is_answered_with_the_new_one(key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key} = 1: this key is now ") as error:
        Config.read({"strategy": "gsgm", key: 1})
    for name in re.findall(r"[\w-]+\.[\w-]+", str(error.value).partition("now ")[2]):
        assert name in default_config() or name.startswith("gsgm."), name


def test_file_of_a_run_of_before_is_answered_with_every_new_key() -> None:
    with pytest.raises(
        ConfigError,
        match=r"lr = 0.1: this key is now training.lr\nmodel = 'cnn': this key is now model.name",
    ):
        Config.read({"strategy": "fedavg", "lr": 0.1, "model": "cnn", "num-sites": 3})


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"training.lr = -0.1: .*\nepochs = 0: "):
        Config.read({"epochs": 0, "training.lr": -0.1})


def test_method_of_ones_own_has_its_section() -> None:
    path = "tests.own_method:MINE"
    config = configuration(strategy=path, mine={"strength": 0.5})
    assert changed(config.keys) == {"strength": 0.5}
    assert Config.read(config.flat()) == config
    with pytest.raises(
        ConfigError, match=r"mine.strenth = 1: unknown key; did you mean 'mine.strength'"
    ):
        configuration(strategy=path, mine={"strenth": 1})


def test_sharpness_aware_training_that_a_plan_of_ones_own_leaves_out_is_refused() -> None:
    deaf = "tests.own_method:DEAF"
    heard = configuration(strategy="tests.own_method:HEARS", training={"sam_radius": 0.1}).plan
    assert isinstance(heard, PeerPlan)
    assert heard.gradient.rho == 0.1
    assert configuration(strategy=deaf).strategy == deaf
    with pytest.raises(
        ConfigError, match=r"training.sam-radius = 0.1: has no effect with strategy = 'deaf'; taken"
    ):
        configuration(strategy=deaf, training={"sam_radius": 0.1})


def test_strategies_of_flower_are_found_without_trees_and_wrappers() -> None:
    names = {name for name, method in METHODS.items() if kind_of(method) == "rounds, by Flower"}
    assert {
        "FedAvg",
        "FedAdam",
        "FedAvgM",
        "FedProx",
        "FedMedian",
        "FedTrimmedAvg",
        "Krum",
        "MultiKrum",
        "Bulyan",
    } <= names
    assert not any(name.startswith(("FedXgb", "Differential")) for name in names)


def test_strategy_arguments_keep_whole_numbers_whole() -> None:
    assert arguments_of("MultiKrum", "num_nodes_to_select=3") == {"num_nodes_to_select": 3}
    assert arguments_of("FedAdam", "eta=1e-2 beta_1=.5") == {"eta": 0.01, "beta_1": 0.5}


def test_every_name_that_the_configuration_allows_is_known() -> None:
    for name in NETWORKS:
        shape, output = {"gpt": ((8,), (8, 10)), "unet": ((3, 32, 32), (10, 32, 32))}.get(
            name, ((3, 32, 32), None)
        )
        build(name, shape, 10, 1, output=output, tokens=name == "gpt", **Model().options)
    for name, source in SOURCES.items():
        if not source.folder:  # torchvision's would ask the network
            needs_path = pytest.raises(ValueError, match=r"data\.path")
            with needs_path if "path" in source.keys else nullcontext():
                load(
                    name,
                    "",
                    label="label",
                    group="",
                    image_size=8,
                    audio_seconds=1.0,
                    text_buckets=8,
                )
