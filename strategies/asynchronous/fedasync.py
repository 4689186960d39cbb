"""FedAsync: the server's model moves a part of the way to each model that arrives.

    alpha_t = alpha s(staleness)
    x       = (1 - alpha_t) x + alpha_t x_site

Source: Xie, Koyejo, Gupta, "Asynchronous Federated Optimization", OPT 2020 (arXiv 1903.03934),
algorithm 1. The site's proximal term mu/2 |x - base|^2 is ``proximal-mu``. Differs: none known;
alpha_t is computed from alpha again for each arrival.
Special cases: alpha = 1 with constant weight keeps the newest model; alpha = 0 keeps the first.
"""

from typing import NamedTuple

from torch import Tensor

from strategies.asynchronous.rule import ServerRule, Update, Weight, blocks
from strategies.keys import NotNegative, Positive, Share, StalenessKeys
from strategies.method import ArrivalPlan, Method, Run


class Mixing(NamedTuple):
    """FedAsync's state: the model, and how often it changed."""

    x: Tensor
    version: int


def fedasync(*, alpha: float, weight: Weight) -> ServerRule[Mixing]:
    """FedAsync with mixing rate ``alpha`` and ``weight`` by staleness."""

    def absorb(state: Mixing, update: Update) -> Mixing:
        steps, left = [], 1.0
        for part in reversed(update.parts):  # each step shrinks what those before it brought
            rate = alpha * weight(part.staleness) / len(update.parts)
            steps.append((part, rate / left))
            left -= rate
        for part, rate in reversed(steps):
            for x, base, delta in blocks(state.x, part.base, part.delta):
                x.lerp_(base - delta, rate)
        return Mixing(state.x, state.version + 1)

    def reach(x: float, delta: float, lr: float) -> float:
        return alpha * (2 * x + delta)

    return ServerRule(lambda x: Mixing(x.clone(), 0), absorb, reach, based=True)


class Keys(StalenessKeys):
    """The keys of FedAsync."""

    local_steps: Positive = 5
    """batches of a contribution"""
    mixing_rate: Share = 0.6
    """alpha"""
    proximal_mu: NotNegative = 0.005
    """pull towards the model that the site was sent"""


def plan(keys: Keys, run: Run) -> ArrivalPlan:
    """Mix in each model when it arrives."""
    if keys.local_steps == 1 and keys.proximal_mu != Keys().proximal_mu:
        raise ValueError(
            "fedasync.proximal-mu: has no effect with fedasync.local-steps = 1, "
            "which stays where it begins"
        )
    rule = fedasync(alpha=keys.mixing_rate, weight=keys.weight())
    return ArrivalPlan(rule, steps=keys.local_steps, proximal=keys.proximal_mu)


METHOD = Method("fedasync", Keys, plan)
