"""README and docs/ say what is so.

Links lead somewhere, keys and columns exist, commands are accepted, Python blocks run.
"""

import ast
import inspect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt

from client_app.policy import SiteFile
from configuration.__main__ import parsed
from configuration.config import Config, configuration
from configuration.generate import fields, tables
from server_app.overview import COLUMNS
from server_app.results import REFUSED
from simulation.laboratory import Run, simulate
from strategies import protocol
from tests.conftest import ROOT

PAGES = sorted((ROOT / "docs").rglob("*.md"))
NAMES = ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY", "CODE_OF_CONDUCT")
DOCUMENTS = [*(ROOT / f"{name}.md" for name in NAMES), *PAGES]
BLOCK = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\((?!https?:|mailto:)([^)\s]+)\)")
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
KEYS = {
    f"{table}.{key}" if table else key for table, kind in tables().items() for key in fields(kind)
}
TABLES = {table for table in tables() if table}
FILES = (".py", ".png", ".safetensors", ".toml")
SMALL: dict[str, Any] = {"num_sites": 3, "epochs": 1, "model": {"name": "mlp"}, "progress": False}
documents = pytest.mark.parametrize(
    "path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix()
)


def blocks(path: Path, language: str) -> list[str]:
    return [text for _, kind, text in BLOCK.findall(path.read_text()) if kind == language]


def prose(path: Path) -> str:
    return BLOCK.sub("", path.read_text())


def codes(path: Path) -> list[str]:
    """Inline code, which may go on in the next line."""
    return INLINE.findall(prose(path).replace("\n", " "))


def anchors(path: Path) -> set[str]:
    """Of a page's headings, as GitHub and mkdocs make them; or as they are given."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE):
        if given := re.search(r"\{ #([\w-]+) \}$", heading):
            found.add(given[1])
        found.add(re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-"))
    return found


@documents
def test_links_lead_somewhere(path: Path) -> None:
    for link in LINK.findall(prose(path)):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_is_in_the_index_of_pages() -> None:
    index = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        assert f" {page.relative_to(ROOT / 'docs').as_posix()}\n" in index


@documents
def test_keys_exist_and_their_values_are_allowed(path: Path) -> None:
    """Inline code such as ``gsgm.window`` and ``wire.codec = "qsgd"``."""
    for code in codes(path):
        key = re.match(r"([a-z-]+)\.[a-z-]+(?= = |$)", code)
        if key and key[1] in TABLES and Path(key[0]).suffix not in FILES:
            assert key[0] in KEYS, code
            kind = tables()[key[1]]
            name, _, value = code.partition(" = ")
            if value and '"package.module' not in value:
                table = tomllib.loads(f"{name.partition('.')[2]} = {value}")
                kind.model_validate(table)


def commands(path: Path) -> Iterator[str]:
    for text in blocks(path, "bash"):
        yield from text.replace("\\\n", "").splitlines()
    yield from (code for code in codes(path) if code.startswith("make "))


@documents
def test_commands_of_make_are_accepted(path: Path) -> None:
    """Targets exist, and a run's configuration is one that ``make run`` would start."""
    targets = re.findall(r"^([a-z.][\w./-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in commands(path):
        if not (made := re.match(r"make ([\w./-]+)", command)):
            continue
        assert made[1] in targets, command
        conf, given = re.search(r"CONF=(\S+)", command), re.search(r"SET='([^']*)'", command)
        if made[1] == "run" and not (conf and conf[1].startswith("runs/")):
            file = str(ROOT / conf[1]) if conf else None
            configuration(file, **parsed(given[1] if given else ""))


@documents
def test_commands_of_flower_are_accepted(path: Path) -> None:
    for command in commands(path):
        if given := re.search(r"""--run-config (?:'([^']*)'|"([^"]*)")""", command):
            Config.read(parsed(given[1] or given[2]))


@documents
def test_modules_that_are_run_exist(path: Path) -> None:
    for module in re.findall(r"python -m ([\w.]+)", path.read_text()):
        if module not in ("uv", "pytest", "pip"):
            file = ROOT / module.replace(".", "/")
            assert file.with_suffix(".py").exists() or (file / "__main__.py").exists(), module


def test_site_files_are_accepted(tmp_path: Path) -> None:
    page = ROOT / "docs/how-to/site.md"
    first, second = (tomllib.loads(text) for text in blocks(page, "toml"))
    SiteFile.model_validate(first)
    SiteFile.model_validate(first | second)


def test_rules_of_a_site_are_all_described() -> None:
    text = (ROOT / "docs/how-to/site.md").read_text()
    for field in SiteFile.model_fields["policy"].annotation.model_fields.values():  # type: ignore[union-attr]
        assert f"`{field.alias}`" in text


def test_messages_are_described_field_by_field() -> None:
    text = (ROOT / "docs/reference/messages.md").read_text()
    for name, part in inspect.getmembers(protocol, inspect.isclass):
        if issubclass(part, protocol.Part) and part is not protocol.Part:
            assert f"`{name}`" in text
            for field in part.model_fields.values():
                assert f"`{field.alias}`" in text, f"{name}: {field.alias}"


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"strategy": "gsgm"},
        {"strategy": "dmsgd"},
        {"strategy": "ensemble"},
    ],
    ids=lambda keys: keys.get("strategy", "co-learning"),
)
def test_files_columns_and_metrics_of_a_run_are_described(
    keys: dict[str, Any], tmp_path: Path
) -> None:
    text = (ROOT / "docs/reference/results.md").read_text()
    run = simulate(**SMALL, **keys)
    run.save(tmp_path / "run")
    files = {re.sub(r"-\d+", "-K", file.name) for file in (tmp_path / "run").iterdir()}
    metrics = {
        re.sub(r"^(bytes-to|staleness)-\d+$", r"\1-", name) for name in run.metrics["metric"]
    }
    metrics = {
        f"{name}{'J' if name == 'bytes-to-' else 'K'}" if name[-1] == "-" else name
        for name in metrics
    }
    for name in {*files, *metrics, *COLUMNS, *REFUSED}:
        assert f"`{name}`" in text, name


@pytest.fixture(scope="module")
def a_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return simulate(**SMALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [page for page in DOCUMENTS if blocks(page, "python")],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_python_blocks_run(
    path: Path, a_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a page one after the other, where a run lies in ``runs/``."""
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    a_run.save(tmp_path / "runs/20261126-164239-co-learning")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "document"}
    for number, text in enumerate(blocks(path, "python")):
        exec(compile(text, f"{path.name}, block {number}", "exec"), names)
    plt.close("all")


def test_golden_values_are_those_of_the_table_and_of_the_tests() -> None:
    """Computed by the page's own programs, in its table, and in the tests that cite the page."""
    page = ROOT / "docs/explanation/golden-values.md"
    names: dict[str, Any] = {}
    for text in blocks(page, "python"):
        exec(text, names)
    rows = re.findall(r"^\| ([^|]+) \| (-?\d\.\d.*) \|$", page.read_text(), re.MULTILINE)
    table = {name: np.fromstring(cells.replace("|", " "), sep=" ") for name, cells in rows}
    assert table.keys() == names["found"].keys()
    for name, values in names["found"].items():
        np.testing.assert_allclose(values.ravel(), table[name], rtol=0, atol=6e-7)
    tests = ast.walk(ast.parse((ROOT / "tests/equivalence/test_peer.py").read_text()))
    texts = [node.value for node in tests if isinstance(node, ast.Constant)]
    ten = re.compile(r"(-?\d\.\d{6} ?){10}")
    cited = [text for text in texts if isinstance(text, str) and ten.fullmatch(text)]
    assert len(cited) > 10
    known = {tuple(values) for values in table.values()}
    assert all(tuple(map(float, values.split())) in known for values in cited)


def test_readme_is_short_and_begins_with_what_it_is() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    screen = "\n".join(lines[:20])
    for word in ("synchronous", "asynchronous", "peer-to-peer", "compressed", "sealed"):
        assert word in screen
    assert re.search(r"^```bash\nmake run .*\nmake test ", screen, re.MULTILINE)


def test_changelog_begins_with_the_version_and_nobody_else_names_it() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    newest = re.search(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == version
    assert "\nversion:" not in (ROOT / "CITATION.cff").read_text()
