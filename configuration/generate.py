"""``make docs``: what is generated from the sections of the configuration.

These are the defaults in ``pyproject.toml``, the reference of keys and the table of methods.
"""

import json
import re
import sys
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from configuration.checks import kind_of
from configuration.config import ROOT, Config
from configuration.sections import SECTIONS
from strategies.methods import METHODS

PYPROJECT = ROOT / "pyproject.toml"
REFERENCE = ROOT / "docs" / "reference" / "configuration.md"
TABLE = ROOT / "docs" / "reference" / "methods.md"
MARK = (
    "# Every key of a run, with its default: "
    "made by `make docs` from configuration/ and strategies/."
)


def tables() -> dict[str, type[BaseModel]]:
    """Every section by name, the empty name for the keys of no section."""
    return {"": Config, **SECTIONS, **{method.table: method.keys for method in METHODS.values()}}


def fields(kind: type[BaseModel]) -> dict[str, FieldInfo]:
    """The keys of a section as they are written."""
    return {
        str(field.alias): field
        for name, field in kind.model_fields.items()
        if name not in ("keys", *SECTIONS)
    }


def defaults() -> str:
    """The defaults, as they stand in ``pyproject.toml``."""
    lines = [MARK]
    for name, kind in tables().items():
        lines += ["", f"[tool.flwr.app.config.{name}]"] if name else ["[tool.flwr.app.config]"]
        rows = {key: f"{key} = {json.dumps(field.default)}" for key, field in fields(kind).items()}
        lines += [
            f"{row:<32} # {_line(fields(kind)[key].description)}" for key, row in rows.items()
        ]
    return "\n".join(lines) + "\n"


def pyproject(text: str) -> str:
    """The text of ``pyproject.toml`` with the present defaults."""
    return text[: text.index(MARK.partition(":")[0])] + defaults()


def reference() -> str:
    """The reference of all keys."""
    lines = [
        "# Configuration",
        "",
        "Made by `make docs`. Every key of a run, its type, default and meaning. "
        "A key that has no effect in a run must be as",
        "shipped: everything else is an error that says which methods take it.",
    ]
    for name, kind in tables().items():
        users = [f"`{method.name}`" for method in METHODS.values() if method.table == name]
        title = f"`[{name}]`" if name else "Of every run"
        lines += ["", f"## {title}", "", *([f"Of {', '.join(users)}.", ""] if users else [])]
        lines += ["| key | allowed | default | |", "|---|---|---|---|"]
        schema: dict[str, Any] = kind.model_json_schema(by_alias=True)["properties"]
        for key, field in fields(kind).items():
            lines.append(
                f"| `{key}` | {_allowed(schema[key])} | `{json.dumps(field.default)}` "
                f"| {_cell(field.description)} |"
            )
    return "\n".join(lines) + "\n"


def methods() -> str:
    """The table of all methods."""
    lines = [
        "# Methods",
        "",
        "Made by `make docs`.",
        "",
        "| method | driver | what it is | its keys |",
        "|---|---|---|---|",
    ]
    for method in METHODS.values():
        keys = ", ".join(f"`{key}`" for key in fields(method.keys))
        lines.append(f"| `{method.name}` | {kind_of(method)} | {_cell(_title(method))} | {keys} |")
    return "\n".join(lines) + "\n"


def _title(method: Any) -> str:
    """The title of a method: the first sentence of its module."""
    module = sys.modules[method.keys.__module__]
    if method.section:
        return "Flower's own"
    return re.sub(r"\s+", " ", (module.__doc__ or "").split("\n\n")[0]).rstrip(".")


def _allowed(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    bounds = [
        f"{sign} {schema[name]:g}"
        for name, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
        )
        if name in schema
    ]
    kind = {
        "integer": "whole number",
        "number": "number",
        "boolean": "true, false",
        "string": "text",
    }[schema["type"]]
    return f"{kind} {', '.join(bounds)}".strip()


def _cell(text: str | None) -> str:
    return _line(text).replace("|", "\\|")


def _line(text: str | None) -> str:
    """A description, which may be wrapped in its file, as one line."""
    return (text or "").strip().replace("\n", " ")


if __name__ == "__main__":
    PYPROJECT.write_text(pyproject(PYPROJECT.read_text()))
    REFERENCE.parent.mkdir(parents=True, exist_ok=True)
    REFERENCE.write_text(reference())
    TABLE.write_text(methods())
