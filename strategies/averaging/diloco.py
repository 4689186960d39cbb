"""DiLoCo: AdamW inside for H steps, Nesterov momentum outside.

    D     = x - mean_k x_k        the outer gradient of a round of H local steps
    v     = mu v + D
    x     = x - eta (D + mu v)

The inner optimizer is ``training.optimizer``; its moments stay at the site from round to round.

Source: Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models",
arXiv 2311.08105 (2023), algorithm 1, as described in other works; **the original was not read**,
and no number of it is reproduced or claimed. Differs: sites may be weighted by their examples; the
inner rate decays once over the run, after ``training.lr-warmup``.
Special cases: eta = 1, mu = 0 is FedAvg with local steps; the outer step is that of
``torch.optim.SGD(lr=eta, momentum=mu, nesterov=True)`` along D.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from strategies.keys import Above0, Decay, Positive
from strategies.method import LocalTraining, Mean, Method, RoundPlan, RoundStart, Run, Section


class Keys(Section):
    """The keys of DiLoCo."""

    local_steps: Positive = 50
    """H, batches of each site in a round; 500 in the paper"""
    outer_lr: Above0 = 0.7
    """eta"""
    outer_momentum: Decay = 0.9
    """mu; for tens of rounds 0.5"""
    weighting: Literal["equal", "samples"] = "equal"
    """equal, or samples: sites count by their training examples"""


class Outer(NamedTuple):
    """The model and the outer momentum."""

    x: Tensor
    v: Tensor


def plan(keys: Keys, run: Run) -> RoundPlan[Outer]:
    """Local steps, then the outer step on their mean."""

    def instruct(_: Outer, start: RoundStart) -> LocalTraining:
        left = math.ceil((start.total - start.done) * start.an_epoch - 1e-6)
        steps = min(keys.local_steps, left)
        end = min(1.0, (start.done + steps / start.an_epoch) / start.total)
        return LocalTraining(
            run.lr, (start.done / start.total, end), steps=steps, keep_moments=True
        )

    def absorb(state: Outer, mean: Mean) -> Outer:
        outer = state.x - mean.x
        v = torch.add(outer, state.v, alpha=keys.outer_momentum)
        step = torch.add(outer, v, alpha=keys.outer_momentum)
        return Outer(torch.sub(state.x, step, alpha=keys.outer_lr), v)

    return RoundPlan(
        lambda x: Outer(x, torch.zeros_like(x)), instruct, absorb, weighting=keys.weighting
    )


METHOD = Method("diloco", Keys, plan)
