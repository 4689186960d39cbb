"""D-PSGD: a gradient step, then the weighted mean of the neighbours.

    x = sum_j w_ij (x_j - lr g_j(x_j))

Source: Lian et al., "Can Decentralized Algorithms Outperform Centralized Algorithms?", NeurIPS
2017, in the order of the code of Lin et al. 2021 (adapt, then combine). The formula is
:mod:`strategies.peer.dsgd` without momentum.
Special cases: one peer is SGD; on the complete graph it is model averaging.
"""

from strategies.keys import PeerKeys
from strategies.method import Method, Neighbourhood, PeerPlan, Run
from strategies.peer.dsgd import dsgd


class Keys(PeerKeys):
    """The keys of D-PSGD: those of every peer."""


def plan(keys: Keys, run: Run) -> PeerPlan:
    """Adapt, then combine."""
    algorithm = dsgd(beta=0.0, nesterov=False, adapt_first=True)
    return PeerPlan(algorithm, Neighbourhood(rho=run.sam_radius), keys.local_steps)


METHOD = Method("d-psgd", Keys, plan)
