"""``python -m configuration CONF SET``: check a configuration before anything is started.

Prints two assignments for a shell: ``RUN_CONFIG`` (what differs from the defaults, in the form that
Flower takes) and ``SITES``.
"""

import re
import shlex
import sys
from typing import Any

from click import ClickException

from configuration.config import Config, configuration
from configuration.errors import ConfigError, shown
from configuration.flower import parse_config_args


def pairs(config: Config) -> str:
    """What differs from the defaults, as ``key=value`` pairs in TOML."""
    shipped = Config().flat() if config.method is Config().method else {}
    return " ".join(
        f"{key}={_toml(value)}" for key, value in config.flat().items() if shipped.get(key) != value
    )


def _toml(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return repr(value)
    if '"' in value and "'" in value:
        raise ConfigError(f"{value!r}: Flower takes no value with both kinds of quotes")
    return f"'{value}'" if '"' in value or "\\" in value else f'"{value}"'


def parsed(text: str) -> dict[str, Any]:
    """Read ``key=value`` pairs in TOML with Flower's own parser.

    The parser silently leaves out whatever is no such pair; here that is an error.

    Raises:
        ConfigError: it left something out.
    """
    if rest := re.sub(r"""\S+?=('[^']*'|"[^"]*"|\S+)""", "", text).strip():
        raise ConfigError(
            f"{shown(rest)}: no key=value, without spaces around =; a text stands in quotes"
        )
    return parse_config_args([text])


if __name__ == "__main__":
    try:
        found = configuration("".join(sys.argv[1:2]) or None, **parsed(" ".join(sys.argv[2:])))
        print(f"RUN_CONFIG={shlex.quote(pairs(found))} SITES={found.num_sites}")
    except (ConfigError, ClickException) as wrong:
        sys.exit(str(wrong))
