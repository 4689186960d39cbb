"""The table of methods: every name has one home."""

import ast
import re
from pathlib import Path

import pytest

from configuration.config import configuration
from configuration.errors import ConfigError
from strategies.averaging import fedavg
from strategies.method import Method, RoundPlan, Section
from strategies.methods import METHODS
from tests.conftest import ROOT
from tests.own_method import Keys, plan

UNDERLINED, TAKEN, TOP = (Method(name, Keys, plan) for name in ("my_own", "training", "seed"))
UNTYPED = Method("mine", dict, plan)  # type: ignore[type-var,arg-type]
EMPTY = Method("mine", Keys, lambda keys, run: None)  # type: ignore[arg-type,return-value]
FAILING = Method("mine", Keys, lambda keys, run: dict[str, RoundPlan[fedavg.Average]]()["x"])
OURS = [method for method in METHODS.values() if not method.section]


def home(method: "Method[Section]") -> Path:
    """The file of a method."""
    import sys

    return Path(str(sys.modules[method.plan.__module__].__file__))


def test_no_name_of_a_method_is_compared_outside_its_own_file() -> None:
    names = "|".join(re.escape(name) for name in METHODS)
    compared = re.compile(
        rf"""(==|!=|\bin|case)\s*[\(\[{{]?\s*(["'][^"']*["'],\s*)*["']({names})["']"""
    )
    folders = (
        "strategies",
        "server_app",
        "client_app",
        "simulation",
        "configuration",
        "datasets",
        "models",
    )
    for file in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            found = compared.search(line)
            if not found or "schedule" in line:  # GSGM's schedules: one is called local, too
                continue
            # GSGM's own file names its base optimizers.
            homes = home(METHODS[found[3]]), home(METHODS["gsgm"])
            assert file in homes, f"{file}:{number}: {line}"


@pytest.mark.parametrize("method", OURS, ids=lambda method: method.name)
def test_who_greps_for_a_name_finds_the_file_with_its_source_and_equation(
    method: "Method[Section]",
) -> None:
    text = home(method).read_text()
    assert f'"{method.name}"' in text
    title = (text.split('"""')[1]).lower()
    assert re.sub("[^a-z]", "", method.name.removesuffix("-c").removesuffix("-a"))[:4] in re.sub(
        "[^a-z]", "", title
    )
    assert len(text.splitlines()) <= 130


def test_what_drives_peers_and_arrivals_stays_readable() -> None:
    files = [
        ROOT / f"{name}.py"
        for name in (
            "client_app/peer",
            "server_app/relay",
            "server_app/asynchronous",
            "simulation/batched",
        )
    ]
    texts = {file: file.read_text() for file in files}
    # So many because lines are of at most 100 characters.
    assert sum(len(text.splitlines()) for text in texts.values()) <= 1485
    for file, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 40, f"{file}: {node.name}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("UNDERLINED", "its section is called 'my_own'; letters, digits and hyphens are expected"),
        ("TAKEN", "its section is called 'training', which every run has"),
        ("TOP", "its section is called 'seed', which every run has"),
        ("UNTYPED", "a subclass of strategies.method.Section is expected"),
        ("EMPTY", "its plan is NoneType; a RoundPlan, ArrivalPlan, ... is expected"),
        ("FAILING", "its plan fails: KeyError: 'x'"),
    ],
)
def test_what_is_wrong_with_a_method_of_ones_own_is_said_before_the_run(
    name: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"strategy = '{__name__}:{name}': .*{message}"):
        configuration(strategy=f"{__name__}:{name}")


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("GSGM", "gsgm"),
        ("DiLoCo", "diloco"),
        ("RelaySGD", "relaysgd"),
        ("DFedSAM", "dfedsam"),
        ("krum", "Krum"),
    ],
)
def test_name_as_in_its_paper_leads_to_the_name(written: str, name: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{name}'"):
        configuration(strategy=written)
