"""A method as somebody's own."""

from strategies.averaging import fedavg
from strategies.keys import Above0
from strategies.method import Method, RoundPlan, Run, Section


class Keys(Section):
    """The keys of a user's method."""

    strength: Above0 = 1.0
    """how strong"""


def plan(keys: Keys, run: Run) -> RoundPlan[fedavg.Average]:
    """FedAvg that goes a part of the way."""
    found = fedavg.plan(fedavg.Keys(), run)
    return found._replace(
        absorb=lambda state, mean: fedavg.Average(state.x.lerp(mean.x, keys.strength))
    )


MINE = Method("mine", Keys, plan)
