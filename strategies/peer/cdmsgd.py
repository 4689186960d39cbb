"""CDMSGD: CDSGD with momentum of one's own.

    v = beta v - lr g_i(x_i)
    x = sum_j w_ij x_j + v                  Nesterov: + beta v - lr g_i(x_i)

Source: Jiang et al., "Collaborative Deep Learning in Fixed Topology Networks", NeurIPS 2017, and
its Keras code. The formula is :mod:`strategies.peer.dsgd`. Special case: beta = 0 is CDSGD.
"""

from strategies.keys import MomentumKeys, PeerKeys
from strategies.method import Method, Neighbourhood, PeerPlan, Run
from strategies.peer.dsgd import dsgd


class Keys(PeerKeys, MomentumKeys):
    """The keys of CDMSGD."""


def plan(keys: Keys, run: Run) -> PeerPlan:
    """Combine while adapting."""
    algorithm = dsgd(beta=keys.momentum, nesterov=keys.nesterov, adapt_first=False)
    return PeerPlan(algorithm, Neighbourhood(rho=run.sam_radius), keys.local_steps)


METHOD = Method("cdmsgd", Keys, plan)
