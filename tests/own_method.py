"""Methods as somebody's own."""

from strategies.averaging import fedavg
from strategies.keys import Above0, PeerKeys
from strategies.method import Method, Neighbourhood, PeerPlan, RoundPlan, Run, Section
from strategies.peer.dsgd import dsgd


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

PLAIN = dsgd(beta=0.0, nesterov=False, adapt_first=True)
HEARS = Method("hears", PeerKeys, lambda _, run: PeerPlan(PLAIN, Neighbourhood(rho=run.sam_radius)))
DEAF = Method("deaf", PeerKeys, lambda _keys, _run: PeerPlan(PLAIN))
