"""Updates by hand, and the models that an asynchronous rule makes of them."""

from typing import Any

import torch
from torch import Tensor

from strategies.asynchronous.rule import ServerRule, Update, constant

PLAIN: dict[str, Any] = {
    "eta": 1.0,
    "beta": 0.0,
    "window": 1,
    "weight": constant,
    "compensation": 0.0,
    "adaptive": False,
}


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def update(
    delta: Tensor, base: Tensor | None = None, lr: float = 0.1, staleness: int = 0
) -> Update:
    return Update(delta, torch.zeros_like(delta) if base is None else base, lr, staleness)


def follow(rule: ServerRule[Any], x: Tensor, updates: list[Update]) -> list[Tensor]:
    """The model after each update."""
    state, seen = rule.init(x), []
    for each in updates:
        state = rule.absorb(state, each)
        seen.append(state.x.clone())
    return seen


def close(found: list[Tensor], expected: list[float]) -> None:
    torch.testing.assert_close(torch.cat(found), vector(*expected))


PARTS = [
    update(vector(0.4), vector(1), lr=0.1, staleness=3),
    update(vector(0.2), vector(2), lr=0.2, staleness=1),
    update(vector(-0.1), vector(3), lr=0.1),
]
TOGETHER = PARTS[2]._replace(earlier=tuple(PARTS[:2]))


def walk(seed: int, steps: int = 30) -> list[Update]:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(steps, 2, 5, generator=generator, dtype=torch.float64)
    return [
        update(0.1 * delta, base, staleness=step % 4) for step, (delta, base) in enumerate(draws)
    ]
