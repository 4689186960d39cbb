"""Asynchronous descent: ASGD, ASGD with momentum, DC-ASGD, and what GSGM does with an update.

    g     = delta + (lambda / lr) delta . delta . (x - base)    delay compensation
    g     = s(staleness) g
    g_hat = mean of the last p of these                         partly averaged; p = 1: g itself
    v     = beta v + (1 - beta) g_hat                           damped global momentum
    x     = x - eta v

"." is elementwise; lambda = 0 is no compensation. In gradients: delta = lr G, so that the total
weight of each update is eta lr. With ``lambda_a`` instead of ``lambda``, adaptive:
lambda = lambda_a / sqrt(m + 1e-7), m = 0.95 m + 0.05 G . G.

Sources: ASGD: Dean et al., NeurIPS 2012. DC-ASGD: Zheng et al., "Asynchronous Stochastic Gradient
Descent with Delay Compensation", ICML 2017. GSGM: "Gradient Scheduling with Global Momentum for
Non-IID Data Distributed Asynchronous Training", arXiv 1902.07848 (2019). **GSGM is reconstructed
from the abstracts**: which updates are averaged, that the momentum is damped, and their defaults
are ours; its white list is :mod:`strategies.asynchronous.white_list`. Differs: DC-ASGD keeps one
``m``, not one a worker; a site may take several steps, where the papers send one gradient.
Special cases: p = 1, beta = 0, s = 1, lambda = 0 is ASGD; with one site that is SGD; beta > 0 alone
is ASGD with momentum.
"""

import math
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from strategies.asynchronous.rule import BLOCK, Part, ServerRule, Update, Weight, constant

EPSILON, DECAY = 1e-7, 0.95  # of the mean square of the gradient


class Descent(NamedTuple):
    """The model and what is remembered beside it; empty vectors where a switch is off."""

    x: Tensor
    version: int
    momentum: Tensor
    square: Tensor
    recent: tuple[tuple[Part, ...], ...]


def descent(
    *,
    eta: float,
    beta: float = 0.0,
    window: int = 1,
    weight: Weight = constant,
    compensation: float = 0.0,
    adaptive: bool = False,
) -> ServerRule[Descent]:
    """Asynchronous descent; by default ASGD.

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
            x.clone(),
            0,
            torch.zeros_like(x) if beta else none,
            torch.zeros_like(x) if compensation and adaptive else none,
            (),
        )

    def compensate(state: Descent, update: Update, place: slice, out: Tensor) -> None:
        """The delay-compensated update at ``place``, into ``out``."""
        delta = update.delta[place]
        torch.sub(state.x[place], update.base[place], out=out).mul_(delta).mul_(delta)
        if adaptive:
            square = (
                state.square[place]
                .mul_(DECAY)
                .addcmul_(delta, delta, value=(1 - DECAY) / update.lr**2)
            )
            out.div_(torch.add(square, EPSILON).sqrt_())
        torch.add(delta, out, alpha=compensation / update.lr, out=out)

    def absorb(state: Descent, update: Update) -> Descent:
        d = len(state.x)
        # Where nothing is remembered, a compensated update is made block by block.
        made = [
            state.x.new_empty(d if window > 1 else min(d, BLOCK)) if compensation else part.delta
            for part in update.parts
        ]
        shares = [weight(part.staleness) / len(made) for part in update.parts]
        averaged = (*state.recent, tuple(map(Part, made, shares)))
        for start in range(0, d, BLOCK):
            place = slice(start, min(start + BLOCK, d))
            here = slice(0, place.stop - start)
            if compensation:
                for part, g in zip(update.parts, made, strict=True):
                    compensate(state, part, place, g[here if len(g) < d else place])
            moved = state.momentum[place].mul_(beta) if beta else state.x[place]
            step = (1 - beta if beta else -eta) / len(averaged)
            for g, share in chain.from_iterable(averaged):
                moved.add_(g[here if len(g) < d else place], alpha=step * share)
            if beta:
                state.x[place].sub_(moved, alpha=eta)
        recent = averaged[-window + 1 :] if window > 1 else ()
        return state._replace(version=state.version + 1, recent=recent)

    def reach(x: float, delta: float, lr: float) -> float:
        if not compensation:
            return eta * delta
        # Adaptive: the square holds at least (1 - DECAY) G . G.
        strength = 1 / math.sqrt(1 - DECAY) if adaptive else delta / lr
        return eta * delta * (1 + compensation * strength * 2 * x)

    return ServerRule(init, absorb, reach, based=compensation > 0)
