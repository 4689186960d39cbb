"""FedBuff: updates are collected, and the model takes one step for every K of them.

    b = b + delta / sqrt(1 + staleness)
    after each K-th:   x = x - eta b / K,   b = 0

Source: Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022,
algorithm 1. Differs: plain descent at the server. The delta is against the model that the site was
sent, and the divisor is K, not the sum of the weights (other implementations err in either).
Staleness counts steps of the server, so the version changes once for every K arrivals.
Special cases: K = number of sites, no staleness, eta = 1 is one round of model averaging; K = 1 is
ASGD with weights.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from strategies.asynchronous.robust import robust_window
from strategies.asynchronous.rule import ServerRule, Update, Weight, constant, polynomial
from strategies.keys import Above0, ArrivalKeys, NotNegative, Positive
from strategies.method import ArrivalPlan, Method, Run


class Buffer(NamedTuple):
    """The model, the sum of what arrived since its last step, and how many that were."""

    x: Tensor
    version: int
    total: Tensor
    collected: int


def fedbuff(*, eta: float, size: int, weight: Weight) -> ServerRule[Buffer]:
    """FedBuff with a buffer of ``size`` updates and the server's rate ``eta``."""

    def absorb(state: Buffer, update: Update) -> Buffer:
        total, collected = state.total, state.collected + 1
        for part in update.parts:
            total.add_(part.delta, alpha=weight(part.staleness) / len(update.parts))
        if collected < size:
            return state._replace(collected=collected)
        return Buffer(state.x.sub_(total, alpha=eta / size), state.version + 1, total.zero_(), 0)

    def reach(x: float, delta: float, lr: float) -> float:
        return eta * delta

    return ServerRule(lambda x: Buffer(x.clone(), 0, torch.zeros_like(x), 0), absorb, reach)


class Keys(ArrivalKeys):
    """The keys of FedBuff."""

    local_steps: Positive = 5
    """batches of a contribution; 1: a gradient"""
    buffer_size: Positive = 3
    """contributions of a step"""
    server_lr: Above0 = 1.0
    """factor on the mean of the sites' own steps"""
    staleness_exponent: NotNegative = 0.5
    """a of the weights (1 + staleness)^-a"""


def plan(keys: Keys, run: Run) -> ArrivalPlan:
    """Collect contributions in a buffer, and apply their mean."""
    weight = polynomial(keys.staleness_exponent)
    size = keys.buffer_size
    if run.robust.on:
        one = fedbuff(eta=keys.server_lr, size=1, weight=constant)
        rule: ServerRule[Any] = robust_window(
            one, size=size, weight=weight, robust=run.robust, collect=True
        )
    else:
        rule = fedbuff(eta=keys.server_lr, size=size, weight=weight)
    return ArrivalPlan(rule, steps=keys.local_steps, least=size, window=size)


METHOD = Method("fedbuff", Keys, plan)
