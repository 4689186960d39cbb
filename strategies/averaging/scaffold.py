"""SCAFFOLD: control variates take the drift out of local steps.

    y_i   = x;  y_i = y_i - lr (g_i(y_i) - c_i + c)        local steps, plain SGD
    c_i'  = c_i - c + (x - y_i) / sum of lr                the mean gradient of the round
    x     = x + eta_g mean_i (y_i - x)
    c     = c + p mean_i (c_i' - c_i)                      p: share of the sites that answered

``c_i'`` is the paper's option II.

Source: Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML
2020, algorithm 1. Differs: the sum of the rates stands for K lr, since a rate may decay; weight
decay and clipping come after the correction. If an answer is lost on its way, its site's variate
has moved and the server's has not: c is then no longer the mean of the c_i until that site's next.
Special cases: c = c_i = 0 is FedAvg with plain SGD, as is the first round; with equal data and full
batches c_i = c, and the corrections vanish.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from strategies.keys import Above0, Positive, decaying
from strategies.method import (
    LocalTraining,
    Mean,
    Method,
    RoundPlan,
    RoundStart,
    Run,
    Section,
    SiteRule,
    Vectors,
)

C = "c"  # the server's variate, and a site's change of its own, on the wire


class Keys(Section):
    """The keys of SCAFFOLD."""

    local_epochs: Positive = 2
    """local epochs a round"""
    server_lr: Above0 = 1.0
    """eta_g"""
    weighting: Literal["equal", "samples"] = "equal"
    """equal, or samples: sites count by their training examples"""


class Server(NamedTuple):
    """The model and the server's control variate."""

    x: Tensor
    c: Tensor


class Site(NamedTuple):
    """A site's control variate [d]."""

    c: Tensor


def correct(memory: Site, sent: Vectors, gradient: Tensor) -> Tensor:
    """``g - c_i + c``."""
    return gradient.sub_(memory.c).add_(sent[C])


def finish(memory: Site, sent: Vectors, y: Tensor, lr: float) -> tuple[Site, Vectors]:
    """The site's new variate, and by how much it changed."""
    change = (sent["x"] - y).div_(lr).sub_(sent[C])
    return Site(memory.c + change), {C: change}


def plan(keys: Keys, run: Run) -> RoundPlan[Server]:
    """Average models and control variates."""
    decay = decaying(keys.local_epochs, run)

    def instruct(_: Server, start: RoundStart) -> LocalTraining:
        return decay(start)._replace(plain=True)

    def absorb(state: Server, mean: Mean) -> Server:
        x = torch.lerp(state.x, mean.x, keys.server_lr)
        return Server(x, torch.add(state.c, mean.vectors[C], alpha=mean.share))

    return RoundPlan(
        lambda x: Server(x, torch.zeros_like(x)),
        instruct,
        absorb,
        beside=lambda state: {C: state.c},
        site=SiteRule(lambda x: Site(torch.zeros_like(x)), correct, finish, (C,)),
        weighting=keys.weighting,
    )


METHOD = Method(
    "scaffold",
    Keys,
    plan,
    frozenset({"training.optimizer", "training.momentum", "training.nesterov"}),
)
