"""Errors of a configuration, and how they show values."""

from typing import Any

from pydantic import BaseModel

SHOWN = 80  # characters of a value


class ConfigError(ValueError):
    """The run configuration is invalid; the message names key, value and what is allowed."""


def changed(section: BaseModel) -> dict[str, Any]:
    """The keys of a section that are not as shipped, with their values."""
    fields = type(section).model_fields
    values = {name: getattr(section, name) for name in fields}
    return {
        str(fields[name].alias): value
        for name, value in values.items()
        if value != fields[name].default
    }


def shown_key(key: str) -> str:
    """A key, not longer than a line and without control characters."""
    return key if key.isprintable() and 0 < len(key) <= SHOWN else shown(key)


def shown(value: object) -> str:
    """A value, not longer than a line."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"
