"""Adam and RMSProp at the server on partly averaged updates: GSGM with an adaptive optimizer.

    G_hat = mean of the last p of s(staleness) delta / lr
    m     = beta m + (1 - beta) G_hat                     the first moment is the global momentum
    u     = beta_2 u + (1 - beta_2) G_hat . G_hat
    x     = x - eta (m / (1 - beta^t)) / (sqrt(u / (1 - beta_2^t)) + epsilon)

Source: Kingma and Ba, ICLR 2015, algorithm 1; RMSProp is beta = 0 without the corrections
1 - beta^t (Tieleman and Hinton 2012).
Differs: fed one site's update at a time (**reconstructed**: GSGM's abstracts say "on popular
optimization algorithms").
Special case: one site, p = 1 is ``torch.optim.Adam`` or ``RMSprop``.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from strategies.asynchronous.rule import Part, ServerRule, Update, Weight, blocks

EPSILON = 1e-8
OVERFLOW = 1e18  # of a gradient: its square is still a float32


class Adaptive(NamedTuple):
    """The model and the two moments of its gradient."""

    x: Tensor
    version: int
    mean: Tensor
    square: Tensor
    recent: tuple[tuple[Part, ...], ...]


def adaptive(
    *, eta: float, beta: float, beta_2: float, window: int, weight: Weight, correct: bool
) -> ServerRule[Adaptive]:
    """Adam, or RMSProp (not ``correct``, ``beta`` = 0), on updates in the order of arrival.

    Args:
        eta: learning rate of the server.
        beta: decay of the first moment.
        beta_2: decay of the second moment.
        window: how many of the last updates are averaged, p.
        weight: of an update by its staleness.
        correct: divide the moments by 1 - beta^t.
    """

    def init(x: Tensor) -> Adaptive:
        return Adaptive(x.clone(), 0, torch.zeros_like(x), torch.zeros_like(x), ())

    def absorb(state: Adaptive, update: Update) -> Adaptive:
        t = state.version + 1
        first, second = (1 - beta**t, 1 - beta_2**t) if correct else (1.0, 1.0)
        new = tuple(
            Part(part.delta, weight(part.staleness) / part.lr / len(update.parts))
            for part in update.parts
        )
        averaged = (*state.recent, new)
        parts = [part for contribution in averaged for part in contribution]
        for x, mean, square, *deltas in blocks(
            state.x, state.mean, state.square, *(part.vector for part in parts)
        ):
            g = torch.zeros_like(x)
            for delta, part in zip(deltas, parts, strict=True):
                g.add_(delta, alpha=part.weight / len(averaged))
            mean.lerp_(g, 1 - beta)
            square.mul_(beta_2).addcmul_(g, g, value=1 - beta_2)
            x.addcdiv_(
                mean, torch.div(square, second, out=g).sqrt_().add_(EPSILON), value=-eta / first
            )
        return state._replace(version=t, recent=averaged[-window + 1 :] if window > 1 else ())

    def reach(x: float, delta: float, lr: float) -> float:
        # Cauchy-Schwarz on the two moments; the corrections only help. No square overflows float32.
        if beta**2 >= beta_2 or delta / lr >= OVERFLOW:
            return math.inf
        return eta * (1 - beta) / math.sqrt((1 - beta_2) * (1 - beta**2 / beta_2))

    return ServerRule(init, absorb, reach)
