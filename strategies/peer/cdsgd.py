"""CDSGD: neighbours average the models of before the gradient step.

    x = sum_j w_ij x_j - lr g_i(x_i)

Source: Jiang et al., "Collaborative Deep Learning in Fixed Topology Networks", NeurIPS 2017, and
its Keras code (combine while adapting). The formula is :mod:`strategies.peer.dsgd` without
momentum.
Special cases: one peer is SGD; equal models make it D-PSGD's first step without averaging.
"""

from strategies.keys import PeerKeys
from strategies.method import Method, Neighbourhood, PeerPlan, Run
from strategies.peer.dsgd import dsgd


class Keys(PeerKeys):
    """The keys of CDSGD: those of every peer."""


def plan(keys: Keys, run: Run) -> PeerPlan:
    """Combine while adapting."""
    algorithm = dsgd(beta=0.0, nesterov=False, adapt_first=False)
    return PeerPlan(algorithm, Neighbourhood(rho=run.sam_radius), keys.local_steps)


METHOD = Method("cdsgd", Keys, plan)
