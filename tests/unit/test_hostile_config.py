"""Hostile run configurations: refused with names before any site trains, or they run."""

import logging
import re
import warnings
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configuration.checks import kind_of
from configuration.config import Config
from configuration.errors import ConfigError
from configuration.graph import graph_of
from datasets.partitions import PARTITIONS
from models.networks import NETWORKS
from server_app.discovery import RunError
from simulation.laboratory import simulate
from strategies.codecs import CODECS
from strategies.methods import METHODS
from strategies.topology import TOPOLOGIES
from tests.conftest import default_config, own

KEYS = default_config()
# Of each driver, and of each kind of rule.
FAMILIES = (
    *(
        "co-learning",
        "fedavg",
        "diloco",
        "scaffold",
        "local",
        "ensemble",
        "centralized",
        "FedAdam",
        "Krum",
    ),
    *("gsgm", "asgd", "dc-asgd-a", "fedasync", "fedbuff", "delayed-nesterov"),
    *("d-psgd", "dmsgd", "qgm", "gradient-tracking", "relaysgd", "noloco", "n-saddle"),
)
WHOLE = [0, -1, 1, 2, 7, 2**31, 2**63, 10**30, -(10**30), 10**400]
BROKEN = [
    0.0,
    -0.0,
    -1.0,
    0.5,
    1.0,
    3.0,
    1e-320,
    1e-30,
    1e9,
    1e30,
    1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
]
TEXTS = [
    *(
        "",
        " ",
        "nan",
        "a" * 10**6,
        "x" * 200,
        "\x00",
        "\ud800",
        "[/]",
        "$x_$",
        "..",
        "~nobody/x",
        "/dev/zero",
        "/dev/null/x",
    ),
    *(
        ":",
        "x:",
        ":x",
        "a:b:c",
        "nowhere:x",
        "this:x",
        "builtins:exec",
        "json:loads",
        "os:path",
        "math:pi",
        "functools:partial",
    ),
]
OTHERS: list[Any] = [*WHOLE, *BROKEN, *TEXTS, True, False, None, [], [1], {}, {"a": 1}, b"x"]
STRANGE = [
    "",
    ".",
    "training.",
    "training..lr",
    "keys",
    "training",
    "x" * 10**4,
    "a\x00",
    "__class__",
    "co_learning",
]
# Allowed for themselves, and often not together. Data sets that would be downloaded are left out.
ALLOWED: dict[str, list[Any]] = {
    "strategy": list(METHODS),
    "model.name": list(NETWORKS),
    "model.norm": ["group", "evonorm"],
    "data.source": ["csv", "text-csv", "image-folder", "audio-folder"],
    "data.test-part": ["pooled", "official"],
    "data.augment": ["flip-crop"],
    "partition.kind": list(PARTITIONS),
    "topology.name": list(TOPOLOGIES),
    "topology.mixing": ["uniform"],
    "wire.codec": list(CODECS),
    "wire.cross-codec": list(CODECS),
    "wire.error-feedback": ["deep-squeeze", "choco"],
    "wire.sealing": ["keys", "trust-on-first-use"],
    "wire.bits": [2, 4, 16],
    "training.optimizer": ["adamw", "muon"],
    "training.lr-shape": ["linear", "cosine"],
    "computing.device": ["cuda", "cuda:99", "mps"],
    "computing.precision": ["bfloat16"],
    "flower.arguments": [
        "eta=nan",
        "eta=1e999",
        "proximal_mu=-5",
        "num_malicious_nodes=99",
        "num_malicious_nodes=-1",
        "beta=5",
    ],
    "num-sites": [1, 2, 4, 8],
}
LIKE: dict[type, list[Any]] = {bool: [True, False], int: WHOLE, float: BROKEN, str: TEXTS}


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """A small run with one to three hostile keys, mostly keys that it takes."""
    strategy = draw(st.sampled_from(FAMILIES))
    tables = {
        *(key.partition(".")[0] for key in KEYS if "." not in key),
        "training",
        "model",
        "data",
        "partition",
        "results",
    }
    tables |= {METHODS[strategy].table, "computing"} | (
        {"topology", "wire"} if kind_of(METHODS[strategy]) == "peers" else set()
    )
    taken = [key for key in KEYS if key.partition(".")[0] in tables]
    found = small(strategy)
    for _ in range(draw(st.integers(1, 3))):
        key = draw(
            st.sampled_from(taken)
            if draw(st.integers(0, 19))
            else st.sampled_from([*KEYS, *STRANGE])
        )
        pools = [
            LIKE.get(type(KEYS.get(key)), OTHERS),
            ALLOWED.get(key, []),
            *([OTHERS] if draw(st.integers(0, 9)) == 0 else []),
        ]
        found[key] = draw(st.sampled_from([value for pool in pools for value in pool]))
    # Compiling takes a minute.
    return found | ({"computing.compile": False} if found.get("computing.compile") is True else {})


def small(strategy: str) -> dict[str, Any]:
    """A second's run."""
    short = {key.replace("_", "-"): value for key, value in own(strategy, local_epochs=1).items()}
    more: dict[str, dict[str, Any]] = {
        "relaysgd": {"topology.name": "path"},
        "diloco": {"diloco.local-steps": 5},
    }
    return (
        {"strategy": strategy, "num-sites": 3, "epochs": 1, "model.name": "mlp"}
        | short
        | more.get(strategy, {})
    )


def named(error: Exception) -> str:
    """What it says, if that is short and names a key and its value."""
    text = str(error)
    assert len(text) < 3000, text
    keys = "|".join(re.escape(key) for key in sorted({*KEYS, "sealing"}, key=len, reverse=True))
    assert re.search(rf"\b({keys}) = \S", text), text
    return text


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(configurations())
def test_it_is_read_or_refused_key_by_key(found: dict[str, Any]) -> None:
    try:
        config = Config.read(found)
    except ConfigError as error:
        for line in str(error).splitlines():
            assert re.match(r"([\w.-]+|'.*'.*) = .*: .", line), line
            assert len(line) < 1500
    else:
        assert Config.read(config.flat()) == config


@pytest.mark.slow
@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(configurations())
def test_what_is_accepted_runs_or_says_what_to_change(found: dict[str, Any]) -> None:
    try:
        config = Config.read(found)
    except ConfigError:
        return
    if config.epochs > 1 or config.num_sites > 8:
        return
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = simulate(progress=False, **found)
    except (RunError, ValueError) as error:
        named(error)
    else:
        assert run.finished
        assert len(run.history) >= 1
    finally:
        logging.disable(logging.NOTSET)


NONSENSE: list[tuple[dict[str, Any], str]] = [
    (
        {"model.name": "builtins:exec"},
        "model.name = 'builtins:exec': a function written in Python or a class is expected",
    ),
    ({"model.name": "this:x"}, "model.name = 'this:x' cannot be imported: AttributeError"),
    (
        {"wire.codec": "builtins:exec", "strategy": "dmsgd"},
        "wire.codec = 'builtins:exec': a function is expected",
    ),
    (
        {"wire.codec": "json:loads", "strategy": "dmsgd"},
        "wire.codec = 'json:loads': the JSON object must be str",
    ),
    (
        {"wire.cross-codec": "this:x", "strategy": "ngm"},
        "wire.cross-codec = 'this:x': it cannot be imported",
    ),
    (
        {"epochs": 10**30},
        "epochs = 1000000000000000000000000000000: must be less than or equal to 1000000",
    ),
    (
        {"training.batch-size": 10**30},
        "training.batch-size = 1000000000000000000000000000000: must be less",
    ),
    ({"training.lr": 1e9}, "training.lr = 1000000000.0: must be less than or equal to 100"),
    (
        {"training.sam-radius": 1e30},
        "training.sam-radius = 1e+30: must be less than or equal to 1000000",
    ),
    (
        {"strategy": "asgd", "asgd.server-lr": 1e308},
        "asgd.server-lr = 1e+308: must be less than or equal to 1000000",
    ),
    ({"num-sites": 10**9}, "num-sites = 1000000000: must be less than or equal to 10000"),
    (
        {"num-sites": 1001, "strategy": "d-psgd"},
        "num-sites = 1001: d-psgd takes at most 1000 peers",
    ),
    (
        {"data.path": "a" * 10**6},
        f"data.path = '{'a' * 79}... (1000002 characters): at most 1000 characters",
    ),
    ({"x" * 10**6: 1}, f"'{'x' * 79}... (1000002 characters) = 1: at most 1000 characters"),
    ({"a\x00": 1}, r"'a\x00' = 1: unknown key"),
]


@pytest.mark.parametrize(("changes", "message"), NONSENSE, ids=lambda value: str(value)[:40])
def test_nonsense_is_refused_before_anything_is_sent(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Config.read(changes)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("edges", ["/dev/zero", "/", "\x00", "~nobody/x", ""])
def test_links_come_from_a_regular_file(edges: str) -> None:
    config = Config.read({"strategy": "d-psgd", "topology.name": "edges", "topology.edges": edges})
    with pytest.raises(
        ValueError,
        match=r"topology\.edges = '.*': a file with a link 'i j' or 'i j weight' a line "
        r"is expected",
    ):
        graph_of(config)


def test_own_function_that_raises_is_named(tmp_path: Any) -> None:
    with pytest.raises(RunError, match=r"data\.source = 'json:loads': JSONDecodeError"):
        simulate(progress=False, data={"source": "json:loads", "path": "x"})
    with pytest.raises(RunError, match=r"partition\.kind = 'json:loads': TypeError"):
        simulate(progress=False, partition={"kind": "json:loads"})
