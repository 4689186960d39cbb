"""NGM: peers take gradients in their neighbourhood, and descend along their weighted mean.

    data variant     g_i = sum_j w_ij grad F_j(x_i)    the neighbours' gradients at the own model
    model variant    g_i = sum_j w_ij grad F_i(x_j)    the own gradients at the neighbours' models
    v = beta v - lr g_i;    x = sum_j w_ij x_j + v

The data variant needs a second exchange; for the model variant there is nothing more to send.

Source: Aketi et al., "Neighborhood Gradient Clustering", arXiv 2209.14390, and its code; the
differences stand in :mod:`strategies.peer.neighbourhood`, the descent in
:mod:`strategies.peer.dsgd`.
Special case: W = I is CDMSGD.
"""

from typing import Literal

from strategies.keys import MomentumKeys
from strategies.method import Method, Neighbourhood, PeerPlan, Run
from strategies.peer.dsgd import dsgd


class Keys(MomentumKeys):
    """The keys of NGM."""

    gradients: Literal["data", "model"] = "data"
    ("data: neighbours' gradients at the own model; model: own gradients at the neighbours' models")


def plan(keys: Keys, run: Run) -> PeerPlan:
    """Combine while adapting."""
    algorithm = dsgd(beta=keys.momentum, nesterov=keys.nesterov, adapt_first=False)
    return PeerPlan(algorithm, Neighbourhood(keys.gradients))


METHOD = Method("ngm", Keys, plan)
