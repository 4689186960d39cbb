"""N-SADDLe: NGM along sharpness-aware neighbourhood gradients.

    g_ij = grad F_j(x_i + rho grad F_j(x_i) / |grad F_j(x_i)|);    the rest is NGM's

Source: Choudhary, Aketi, Roy, "SADDLe: Sharpness-Aware Decentralized Deep Learning with
Heterogeneous Data", WACV 2025 (arXiv 2405.13961), **reconstructed from the abstract**: who perturbs
is not known (:mod:`strategies.peer.neighbourhood`), and no number of the paper is reproduced or
claimed. Special case: rho -> 0 is NGM.
"""

from typing import Literal

from strategies.keys import SharpKeys
from strategies.method import Method, Neighbourhood, PeerPlan, Run
from strategies.peer import ngm
from strategies.peer.dsgd import dsgd


class Keys(ngm.Keys, SharpKeys):
    """The keys of N-SADDLe."""

    perturbed_by: Literal["owner-of-data", "none", "owner-of-model"] = "owner-of-data"
    (
        "who perturbs: owner-of-data, none (the own gradient only), "
        "owner-of-model (with gradients = data and without a codec)"
    )


def plan(keys: Keys, run: Run) -> PeerPlan:
    """Combine while adapting."""
    if keys.perturbed_by == "owner-of-model" and keys.gradients == "model":
        raise ValueError(
            "n-saddle.perturbed-by = 'owner-of-model': needs n-saddle.gradients = 'data'"
        )
    algorithm = dsgd(beta=keys.momentum, nesterov=keys.nesterov, adapt_first=False)
    return PeerPlan(algorithm, Neighbourhood(keys.gradients, keys.rho, keys.perturbed_by))


METHOD = Method("n-saddle", Keys, plan)
