"""ASGD with a damped momentum at the server.

    v = beta v + (1 - beta) s(staleness) delta
    x = x - eta v

Source: the "global momentum" of GSGM (arXiv 1902.07848), alone; **reconstructed from the
abstracts**: that it is damped is ours.
Special case: beta = 0 is ASGD.
"""

from strategies.asynchronous.descent import descent
from strategies.keys import Decay, DescentKeys
from strategies.method import ArrivalPlan, Method, Run


class Keys(DescentKeys):
    """The keys of ASGD with momentum."""

    momentum: Decay = 0.9
    """beta of the server's momentum"""


def plan(keys: Keys, run: Run) -> ArrivalPlan:
    """Apply each contribution when it arrives, through the momentum."""
    rule = descent(eta=keys.server_lr, beta=keys.momentum, weight=keys.weight())
    return ArrivalPlan(rule, steps=keys.local_steps)


METHOD = Method("asgd-momentum", Keys, plan)
