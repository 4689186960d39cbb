"""GSGM: scheduled, partly averaged updates and global momentum on an asynchronous optimizer.

    schedule         every site contributes once before any contributes again
    partly averaged  g_hat = mean of the last p of s(staleness) g,   g of the base optimizer
    momentum         v = beta v + (1 - beta) g_hat;   x = x - eta v

The schedule is :mod:`strategies.asynchronous.white_list`.

Source: "Gradient Scheduling with Global Momentum for Non-IID Data Distributed Asynchronous
Training", arXiv 1902.07848 (2019). **Reconstructed from the abstracts**: which updates are
averaged, that the momentum is damped, when the list is refilled, and the defaults are ours; no
number of the paper is reproduced or claimed. With Adam or RMSProp as base, Adam's first moment is
the momentum, and RMSProp has none (:mod:`strategies.asynchronous.adaptive`).
Special cases: base asgd, p = 1, beta = 0, s = 1 and an infinite slack is ASGD.
"""

from typing import Annotated, Any, Literal

from strategies.asynchronous.adaptive import adaptive
from strategies.asynchronous.descent import descent
from strategies.asynchronous.robust import robust_window
from strategies.asynchronous.rule import ServerRule, Weight, constant
from strategies.keys import Decay, DescentKeys, NotNegative, Only, Positive
from strategies.method import ArrivalPlan, Method, Run, Schedule


class Keys(DescentKeys):
    """The keys of GSGM."""

    schedule: Literal["refill", "list", "local"] = "refill"
    (
        "refill: all start again together when each has contributed; list: a site waits for its "
        "turn alone; local: it goes on, and what it made is averaged"
    )
    slack: Annotated[NotNegative, Only(schedule=("list", "local"))] = 0.0
    """contributions by which a site may be ahead of the slowest"""
    window: Positive = 3
    """of so many contributions the mean is taken"""
    momentum: Annotated[Decay, Only(base=("asgd", "dc-asgd-c", "dc-asgd-a", "adam"))] = 0.9
    """beta of the server's momentum"""
    base: Literal["asgd", "dc-asgd-c", "dc-asgd-a", "adam", "rmsprop"] = "asgd"
    """optimizer at the server; with adam and rmsprop server-lr is its learning rate"""
    compensation: Annotated[NotNegative, Only(base=("dc-asgd-c", "dc-asgd-a"))] = 0.04
    """lambda of dc-asgd-c (such as 0.04), lambda_0 of dc-asgd-a (such as 2)"""


def _rule(keys: Keys, window: int, weight: Weight) -> ServerRule[Any]:
    match keys.base:
        case "adam":
            return adaptive(
                eta=keys.server_lr,
                beta=keys.momentum,
                beta_2=0.999,
                window=window,
                weight=weight,
                correct=True,
            )
        case "rmsprop":
            return adaptive(
                eta=keys.server_lr,
                beta=0.0,
                beta_2=0.99,
                window=window,
                weight=weight,
                correct=False,
            )
        case base:
            return descent(
                eta=keys.server_lr,
                beta=keys.momentum,
                window=window,
                weight=weight,
                compensation=0.0 if base == "asgd" else keys.compensation,
                adaptive=base == "dc-asgd-a",
            )


def plan(keys: Keys, run: Run) -> ArrivalPlan:
    """Apply the rule of a window, with the schedule of the keys."""
    rule = _rule(keys, keys.window, keys.weight())
    compensated = keys.base.startswith("dc")  # by the model that each contribution was made of
    if run.robust.on and not compensated:
        rule = robust_window(
            _rule(keys, 1, constant), size=keys.window, weight=keys.weight(), robust=run.robust
        )
    window = 0 if compensated else keys.window
    return ArrivalPlan(
        rule, Schedule(keys.schedule, keys.slack), steps=keys.local_steps, window=window
    )


METHOD = Method("gsgm", Keys, plan)
