"""States as flat tensors and numbers, and back."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from strategies.peer.dmsgd import HeavyBall
from strategies.peer.state import Hat, PeerState, Pending
from strategies.saving import flatten, restore

X = torch.arange(3.0)
EMPTY = torch.empty(0)
INITIAL = PeerState(HeavyBall(X, X, X * 0), EMPTY, shift=EMPTY)
FULL = PeerState(
    HeavyBall(X, X + 1, X + 2),
    stats=X + 3,
    shift=X + 4,
    step=7,
    batches=12,
    seen={2: 6, 11: 5},
    memories=tuple(X + k for k in range(11)),
    sent=(X + 5, X + 6),
    hats={2: Hat(6, (X + 7, X + 8)), 11: Hat(5, (X + 9, X + 10))},
    cross={2: X + 11},
    offered=6,
    reset=False,
    pending=Pending(X + 12, torch.tensor([0.5]), (X + 13,)),
)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) and type(one) is type(other)


@pytest.mark.parametrize("state", [INITIAL, FULL], ids=["initial", "full"])
def test_a_state_is_restored_whole(state: PeerState) -> None:
    tensors, numbers = flatten(state)
    assert same(restore(PeerState, {**tensors, **numbers}, algorithm=HeavyBall), state)


def test_parts_are_named_by_their_path() -> None:
    tensors, numbers = flatten(FULL)
    assert {"algorithm.p", "hats.11.vectors.1", "pending.mixed.0", "memories.10"} <= tensors.keys()
    assert {"step", "hats.2.step", "seen.11", "reset"} <= numbers.keys()
    assert not any(part is EMPTY for part in flatten(INITIAL)[0].values())


def test_a_number_that_is_missing_is_an_error() -> None:
    class Counted(NamedTuple):
        x: Tensor
        number: int

    with pytest.raises(KeyError, match="number"):
        restore(Counted, {"x": X})
