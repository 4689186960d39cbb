"""Q-SADDLe: quasi-global momentum along sharpness-aware gradients.

    g = grad F_i(x_i + rho grad F_i(x_i) / |grad F_i(x_i)|);    the rest is QGM's

Source: Choudhary, Aketi, Roy, "SADDLe: Sharpness-Aware Decentralized Deep Learning with
Heterogeneous Data", WACV 2025 (arXiv 2405.13961), **reconstructed from the abstract**: SAM perturbs
by the peer's own gradient at its own model, and changes nothing else. No number of the paper is
reproduced or claimed. Special case: rho -> 0 is QGM.
"""

from strategies.keys import SharpKeys
from strategies.method import Method, Neighbourhood, PeerPlan, Run
from strategies.peer import qgm


class Keys(qgm.Keys, SharpKeys):
    """The keys of Q-SADDLe."""


def plan(keys: Keys, run: Run) -> PeerPlan:
    """The plan of QGM with sharpness-aware gradients."""
    return qgm.plan(keys, run)._replace(gradient=Neighbourhood(rho=keys.rho))


METHOD = Method("q-saddle", Keys, plan)
