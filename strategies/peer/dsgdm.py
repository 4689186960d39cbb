"""DSGDm, with Nesterov DSGDm-N: D-PSGD with momentum of one's own.

    v = beta v - lr g_i(x_i)
    x = sum_j w_ij (x_j + v_j)              Nesterov: x_j + beta v_j - lr g_j(x_j)

Source: the baseline of Lin et al., "Quasi-global momentum", ICML 2021, and its code. The formula is
:mod:`strategies.peer.dsgd`.
Special case: beta = 0 is D-PSGD.
"""

from strategies.keys import MomentumKeys, PeerKeys
from strategies.method import Method, Neighbourhood, PeerPlan, Run
from strategies.peer.dsgd import dsgd


class Keys(PeerKeys, MomentumKeys):
    """The keys of DSGDm."""


def plan(keys: Keys, run: Run) -> PeerPlan:
    """Adapt, then combine."""
    algorithm = dsgd(beta=keys.momentum, nesterov=keys.nesterov, adapt_first=True)
    return PeerPlan(algorithm, Neighbourhood(rho=run.sam_radius), keys.local_steps)


METHOD = Method("dsgdm", Keys, plan)
