"""Centralized training: all data in one place, as a yardstick; only in a simulation.

It is trained on the union of all data, which no federation can do.
Special case: FedAvg with one site.
"""

from strategies.averaging import fedavg
from strategies.keys import Positive
from strategies.method import Method, RoundPlan, Run, Section


class Keys(Section):
    """How often it is tested."""

    local_epochs: Positive = 2
    """epochs from test to test"""


def plan(keys: Keys, run: Run) -> RoundPlan[fedavg.Average]:
    """FedAvg of one site."""
    return fedavg.plan(fedavg.Keys(local_epochs=keys.local_epochs), run, pooled=True)


METHOD = Method(
    "centralized", Keys, plan, frozenset({"sampling.fraction", "results.personalise-epochs"})
)
