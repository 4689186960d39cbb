"""ASGD: every gradient is applied when it arrives, however old the model it was taken at.

    x = x - eta s(staleness) delta

Source: Dean et al., "Large Scale Distributed Deep Networks", NeurIPS 2012 (Downpour SGD). Differs:
a site may take several steps; weights by staleness are offered. The rule is
:mod:`strategies.asynchronous.descent` with everything else off.
Special case: one site is SGD.
"""

from strategies.asynchronous.descent import descent
from strategies.keys import DescentKeys
from strategies.method import ArrivalPlan, Method, Run


class Keys(DescentKeys):
    """The keys of ASGD: those of all asynchronous descent."""


def plan(keys: Keys, run: Run) -> ArrivalPlan:
    """Apply each contribution when it arrives."""
    return ArrivalPlan(descent(eta=keys.server_lr, weight=keys.weight()), steps=keys.local_steps)


METHOD = Method("asgd", Keys, plan)
