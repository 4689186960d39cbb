"""DFedSAM: several sharpness-aware local steps, then the weighted mean of the neighbours.

    v_k    = beta v_(k-1) + g(x_k + rho g(x_k) / |g(x_k)|)
    x_half = x - lr sum_k v_k         over so many local steps k
    x_new  = sum_j w_ij x_half_j

Source: Shi et al., "Improving the Model Consistency of Decentralized Federated Learning", ICML
2023. Differs: momentum is not reset by an exchange. The formula is :mod:`strategies.peer.dsgd`
along :func:`client_app.training.sharpness_aware` gradients.
Special case: rho -> 0 is DSGDm.
"""

from strategies.keys import MomentumKeys, PeerKeys, SharpKeys
from strategies.method import Method, Neighbourhood, PeerPlan, Run
from strategies.peer.dsgd import dsgd


class Keys(PeerKeys, MomentumKeys, SharpKeys):
    """The keys of DFedSAM."""


def plan(keys: Keys, run: Run) -> PeerPlan:
    """Adapt, then combine."""
    algorithm = dsgd(beta=keys.momentum, nesterov=keys.nesterov, adapt_first=True)
    return PeerPlan(algorithm, Neighbourhood(rho=keys.rho), keys.local_steps)


METHOD = Method("dfedsam", Keys, plan)
