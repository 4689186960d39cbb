"""Checks of a SuperNode's ``--node-config``, before any work.

A misspelt ``peer-keys`` would reveal a model. This module is used where no torch may be loaded
(:mod:`client_app.app`).
"""

from collections.abc import Mapping

SIMULATED = ("partition-id", "num-partitions")  # Flower's own
TEXTS = ("data", "name", "state", "save", "private-key", "peer-keys", "service")
ALLOWED = ("site", *TEXTS, *SIMULATED)
TOGETHER = (("site", "data"), ("private-key", "peer-keys"), SIMULATED)
MOST = 10**6  # sites


class NodeError(ValueError):
    """A key of ``--node-config`` is wrong; the message names it, its value and what is allowed."""


def check_node(node: Mapping[str, object]) -> None:
    """Check the keys of a node.

    Raises:
        NodeError: one is unknown, of another type, or does not go with the others.
    """
    for key, value in node.items():
        if key not in ALLOWED:
            raise NodeError(
                f"--node-config {key} = {value!r}: unknown key; allowed: {', '.join(ALLOWED)}"
            )
        if key == "site" and not (type(value) is int and 0 <= value < MOST):
            raise NodeError(
                f"--node-config site = {value!r}; allowed: a whole number from 0 to {MOST - 1}"
            )
        if key in TEXTS and not isinstance(value, str):
            raise NodeError(f'--node-config {key} = {value!r}; allowed: a text, {key}="..."')
    for pair in TOGETHER:
        if len(missing := [key for key in pair if key not in node]) == 1:
            [there] = {*pair} - {*missing}
            raise NodeError(
                f"--node-config {there} = {node[there]!r}: there is no {missing[0]}; "
                f"{' and '.join(pair)} belong together"
            )
    if "service" in node and (more := [key for key in node if key not in ("service", *SIMULATED)]):
        raise NodeError(
            f"--node-config {more[0]} = {node[more[0]]!r}: "
            "a site with a service says this in its site.toml"
        )
    # A run of Flower's simulation names its data itself.
    if "private-key" in node and "data" not in node:
        raise NodeError(
            f"--node-config private-key = {node['private-key']!r}: "
            "a site with keys reads no data but its own; add site and data"
        )
