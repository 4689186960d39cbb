"""Delayed Nesterov: momentum at the server that moves once in N arrivals, not with each stale one.

    buffer = buffer + D                   D: what a site moved, from the model it was sent
    every N-th arrival:   m = beta m + buffer / N
                          x = x - eta ((1 - c N + c) beta m + D / N);   buffer = 0
    any other:            x = x - eta (c beta m + D / N)              c in [0, 1/N]

Source: Liu et al., "Asynchronous Local-SGD Training for Language Modeling", arXiv 2401.09135
(2024), which finds that momentum and stale updates do not go together; **reconstructed from the
abstract and a description of the rule**. ``by-speed`` is its dynamic local update: a site takes
``max(1, floor(H speed / fastest))`` batches, so that all are equally long on their way.
Special cases: N = 1 is Nesterov momentum as in ``torch.optim.SGD`` (DiLoCo's outer step, one site
at a time); beta = 0 is ASGD with the rate eta / N.
"""

from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from strategies.asynchronous.rule import ServerRule, Update
from strategies.keys import Above0, ArrivalKeys, Decay, Positive
from strategies.method import ArrivalPlan, Method, Run


class Delayed(NamedTuple):
    """The model, the momentum, the sum of what arrived since it moved, and how many that were."""

    x: Tensor
    version: int
    momentum: Tensor
    buffer: Tensor
    collected: int


def delayed_nesterov(*, eta: float, beta: float, period: int, share: float) -> ServerRule[Delayed]:
    """Delayed Nesterov.

    Args:
        eta: the server's rate.
        beta: of the momentum.
        period: N, arrivals from one move of the momentum to the next.
        share: c N, in [0, 1]: how much of the momentum's steps is spread evenly over all arrivals.
    """

    def init(x: Tensor) -> Delayed:
        return Delayed(x.clone(), 0, torch.zeros_like(x), torch.zeros_like(x), 0)

    def absorb(state: Delayed, update: Update) -> Delayed:
        momentum, buffer, collected, along = (
            state.momentum,
            state.buffer,
            state.collected + 1,
            share / period,
        )
        for part in update.parts:
            buffer.add_(part.delta, alpha=1 / len(update.parts))
        if collected == period:
            momentum.mul_(beta).add_(buffer, alpha=1 / period)
            buffer, collected, along = buffer.zero_(), 0, 1 - share + share / period
        x = state.x.sub_(momentum, alpha=eta * along * beta)
        for part in update.parts:
            x.sub_(part.delta, alpha=eta / period / len(update.parts))
        return Delayed(x, state.version + 1, momentum, buffer, collected)

    def reach(x: float, delta: float, lr: float) -> float:
        return eta * delta * (beta / (1 - beta) + 1 / period)

    return ServerRule(init, absorb, reach)


class Keys(ArrivalKeys):
    """The keys of Delayed Nesterov."""

    local_steps: Positive = 10
    """H, batches of a contribution"""
    by_speed: bool = False
    """whether slower sites take fewer of them"""
    server_lr: Above0 = 0.7
    """eta"""
    momentum: Decay = 0.9
    """beta"""
    period: Positive = 5
    """N, arrivals from one move of the momentum to the next"""
    share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """c N: how much of the momentum's steps is spread evenly over all arrivals"""


def plan(keys: Keys, run: Run) -> ArrivalPlan:
    """Apply each contribution when it arrives."""
    rule = delayed_nesterov(
        eta=keys.server_lr, beta=keys.momentum, period=keys.period, share=keys.share
    )
    return ArrivalPlan(rule, steps=keys.local_steps, by_speed=keys.by_speed)


METHOD = Method("delayed-nesterov", Keys, plan)
