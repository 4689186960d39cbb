"""The table of all methods: from a name to its file."""

from typing import Any

from strategies.asynchronous import (
    asgd,
    asgd_momentum,
    dc_asgd,
    delayed_nesterov,
    fedasync,
    fedbuff,
    gsgm,
)
from strategies.averaging import (
    centralized,
    co_learning,
    diloco,
    ensemble,
    fedavg,
    flower,
    local,
    scaffold,
)
from strategies.imported import imported
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
    noloco,
    q_saddle,
    qgm,
    relay_sgd,
)

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
    relay_sgd.METHOD,
    noloco.METHOD,
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
