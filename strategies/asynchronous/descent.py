"""Asynchronous descent: ASGD, ASGD with momentum, DC-ASGD, and what GSGM does with an update.

    g     = delta + (lambda / lr) delta . delta . (x - base)       delay compensation; "." elementwise; lambda = 0: none
    g     = s(staleness) g
    g_hat = mean of the last p of these                            partly averaged; p = 1: g itself
    v     = beta v + (1 - beta) g_hat                              damped global momentum
    x     = x - eta v

In gradients: delta = lr G, so that the total weight of each update is eta lr. With ``lambda_a`` instead of ``lambda``, adaptive:
lambda = lambda_a / sqrt(m + 1e-7), m = 0.95 m + 0.05 G . G.

Sources: ASGD: Dean et al., NeurIPS 2012. DC-ASGD: Zheng et al., "Asynchronous Stochastic Gradient Descent with Delay
Compensation", ICML 2017. GSGM: "Gradient Scheduling with Global Momentum for Non-IID Data Distributed Asynchronous Training", arXiv
1902.07848 (2019). **GSGM is reconstructed from the abstracts**: which updates are averaged, that the momentum is damped, and their
defaults are ours; its white list is :mod:`strategies.asynchronous.white_list`. Differs: DC-ASGD keeps one ``m``, not one a worker;
a site may take several steps, where the papers send one gradient.
Special cases: p = 1, beta = 0, s = 1, lambda = 0 is ASGD; with one site that is SGD; beta > 0 alone is ASGD with momentum.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from strategies.asynchronous.rule import ServerRule, Update, Weight, blocks

EPSILON, DECAY = 1e-7, 0.95  # of the mean square of the gradient


class Descent(NamedTuple):
    """The model and what is remembered beside it; empty vectors where a switch is off."""

    x: Tensor
    version: int
    momentum: Tensor
    square: Tensor
    recent: tuple[Tensor, ...]


def descent(*, eta: float, beta: float, window: int, weight: Weight, compensation: float, adaptive: bool) -> ServerRule[Descent]:
    """Asynchronous descent.

    Args:
        eta: the server's factor on the sites' own steps.
        beta: of the global momentum.
        window: how many of the last updates are averaged, p.
        weight: of an update by its staleness.
        compensation: lambda of DC-ASGD; 0 for none.
        adaptive: whether ``compensation`` is lambda_a.
    """

    def init(x: Tensor) -> Descent:
        none = x.new_empty(0)
        return Descent(
            x.clone(), 0, torch.zeros_like(x) if beta else none, torch.zeros_like(x) if compensation and adaptive else none, ()
        )

    def corrected(state: Descent, update: Update) -> Tensor:
        scale = weight(update.staleness)
        if not compensation:
            return update.delta if scale == 1 else update.delta * scale
        g = torch.empty_like(update.delta)
        squares = state.square if adaptive else g  # g stands in: it is not read
        for out, delta, base, x, square in blocks(g, update.delta, update.base, state.x, squares):
            strength: float | Tensor = compensation
            gradient = delta / update.lr
            if adaptive:
                square.mul_(DECAY).addcmul_(gradient, gradient, value=1 - DECAY)
                strength = compensation * torch.rsqrt(square + EPSILON)
            torch.mul(torch.addcmul(delta, strength * delta * gradient, x - base), scale, out=out)
        return g

    def absorb(state: Descent, update: Update) -> Descent:
        g = corrected(state, update)
        recent = (*state.recent, g)[-window:]
        momentum = state.momentum if beta else state.x  # x stands in: it is not read as momentum
        for x, v, *last in blocks(state.x, momentum, *recent):
            mean = last[0] if len(last) == 1 else torch.stack(last).mean(0)
            x.sub_(v.lerp_(mean, 1 - beta) if beta else mean, alpha=eta)
        return state._replace(version=state.version + 1, recent=recent if window > 1 else ())

    return ServerRule(init, absorb)
