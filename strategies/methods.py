"""The table of all methods: from a name to its file."""

import importlib
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, TypeVar

from strategies.asynchronous import asgd, asgd_momentum, dc_asgd, delayed_nesterov, fedasync, fedbuff, gsgm
from strategies.averaging import centralized, co_learning, diloco, ensemble, fedavg, flower, local, scaffold
from strategies.method import Method
from strategies.peer import (
    cdmsgd,
    cdsgd,
    d_psgd,
    dfedsam,
    dmsgd,
    dsgdm,
    gradient_tracking,
    n_saddle,
    ngm,
    q_saddle,
    qgm,
)

T = TypeVar("T")

_ALL: tuple[Method[Any], ...] = (
    co_learning.METHOD,
    fedavg.METHOD,
    diloco.METHOD,
    scaffold.METHOD,
    local.METHOD,
    ensemble.METHOD,
    centralized.METHOD,
    gsgm.METHOD,
    asgd.METHOD,
    asgd_momentum.METHOD,
    dc_asgd.CONSTANT,
    dc_asgd.ADAPTIVE,
    fedasync.METHOD,
    delayed_nesterov.METHOD,
    fedbuff.METHOD,
    d_psgd.METHOD,
    cdsgd.METHOD,
    cdmsgd.METHOD,
    dsgdm.METHOD,
    dmsgd.METHOD,
    qgm.METHOD,
    ngm.METHOD,
    gradient_tracking.METHOD,
    q_saddle.METHOD,
    n_saddle.METHOD,
    dfedsam.METHOD,
    *flower.METHODS,
)
METHODS = {method.name: method for method in _ALL}


def find(name: object) -> Method[Any]:
    """The method of a name, or one's own by ``package.module:NAME``.

    Raises:
        ValueError: there is none.
    """
    if isinstance(name, str) and name in METHODS:
        return METHODS[name]
    return imported(name, Method, METHODS, "METHOD")


def imported(path: object, kind: type[T], known: Iterable[str], example: str) -> T:
    """A value of one's own by ``package.module:NAME``.

    Raises:
        ValueError: there is none, or it is of another kind.
    """
    module, colon, name = str(path).partition(":")
    if not colon:
        guess = get_close_matches(str(path), known, n=1)
        hint = f"; did you mean {guess[0]!r}?" if guess else ""
        raise ValueError(f"allowed: {', '.join(known)}, package.module:{example}{hint}")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ValueError(f"it cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(found, kind):
        raise ValueError(f"a {kind.__name__} is expected, it is a {type(found).__name__}")
    return found
