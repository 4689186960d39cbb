"""Robust means of the newest contributions, for GSGM and FedBuff, which average some of them.

    b     = of the last p contributions (FedBuff: of those collected) the newest of each site,
            each s(staleness) delta
    g_hat = median, trimmed mean or Krum of b (:mod:`strategies.robust`)

``g_hat`` stands where GSGM has the mean of its last p contributions, and FedBuff that of the K that
it collected. Source: none; asynchronous robust methods of the literature keep a buffer a group of
sites, such as Yang and Li, "BASGD: Buffered Asynchronous SGD for Byzantine Learning", ICML 2021.
Differs from the methods: a site counts once, so that one that answers more often has no more to
say; and no step is taken while there are so few sites that f hostile ones could outvote the others.
Adaptive optimizers divide by the newest contribution's learning rates instead of each one's own.
Special case: f = 0 and contributions of different sites is the method itself.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from strategies.asynchronous.rule import ServerRule, Update, Weight
from strategies.robust import Robust, mean_of


class Newest(NamedTuple):
    """The rule's state, and the newest contributions.

    Attributes:
        inner: the rule's state.
        sites: whose the contributions are, in the order of arrival.
        vectors: the contributions [d], in the same order.
        collected: how many came since the last step.
    """

    inner: Any
    sites: tuple[int, ...] = ()
    vectors: tuple[Tensor, ...] = ()
    collected: int = 0

    @property
    def x(self) -> Tensor:
        """The model [d]."""
        x: Tensor = self.inner.x
        return x

    @property
    def version(self) -> int:
        """How often the model changed."""
        version: int = self.inner.version
        return version


def robust_window(
    rule: ServerRule[Any], *, size: int, weight: Weight, robust: Robust, collect: bool = False
) -> ServerRule[Newest]:
    """A rule on robust means.

    Args:
        rule: takes one contribution at a time, and does not weigh it.
        size: p or K, how many are averaged.
        weight: of a contribution by its staleness.
        robust: which mean.
        collect: whether the rule waits until ``size`` came, and then forgets them.
    """

    def absorb(state: Newest, update: Update) -> Newest:
        parts = update.parts
        # A copy: whoever sent it may go on with its memory.
        made = torch.zeros_like(update.delta)
        for part in parts:
            made.add_(part.delta, alpha=weight(part.staleness) / len(parts))
        arrived = [*zip(state.sites, state.vectors, strict=True), (update.site, made)]
        newest = dict(arrived if collect else arrived[-size:])  # of a site the last one stays
        kept = tuple(newest.items()) if collect else tuple(arrived[-size:])
        sites, vectors = tuple(site for site, _ in kept), tuple(vector for _, vector in kept)
        collected = state.collected + 1
        if len(newest) < min(size, robust.majority) or (collect and collected < size):
            return state._replace(sites=sites, vectors=vectors, collected=collected)
        together = update._replace(
            delta=mean_of(list(newest.values()), robust), staleness=0, earlier=()
        )
        inner = rule.absorb(state.inner, together)
        return Newest(inner) if collect else Newest(inner, sites, vectors)

    return ServerRule(lambda x: Newest(rule.init(x)), absorb, rule.reach, based=rule.based)
