"""The rule by which a server applies one arrival.

Who waits, and in which order arrivals are taken, belongs to the driver.

A rule *owns* the state it is given: it may overwrite its tensors, and the caller goes on with the
state returned, as with a donated buffer in JAX. A copy of a model of 25 million parameters costs
more than everything a rule computes; nobody else holds the state. What is in an :class:`Update` is
never written.
"""

from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, Protocol, TypeVar

from torch import Tensor

# Elements worked on at a time: what a rule computes on the way stays in the processor's cache.
BLOCK = 1 << 18


class State(Protocol):
    """The least that the state of a rule has."""

    @property
    def x(self) -> Tensor:
        """The model [d]."""

    @property
    def version(self) -> int:
        """How often the model changed; an update's staleness is counted in it."""


S = TypeVar("S", bound=State)


class Update(NamedTuple):
    """One arrival.

    Attributes:
        delta: [d], the model that the site was sent minus the one it made of it.
        base: [d], the model that the site was sent; empty for a rule that does without it.
        lr: the sum of the learning rates of the site's steps: ``delta / lr`` is its mean gradient.
        staleness: by how many versions the model changed in the meantime.
        earlier: what the site sent before while it waited for its turn. One contribution is the
            mean of all these, each against the model that it was made of, as old as that is.
        site: whose it is.
    """

    delta: Tensor
    base: Tensor
    lr: float
    staleness: int
    earlier: tuple["Update", ...] = ()
    site: int = 0

    @property
    def parts(self) -> tuple["Update", ...]:
        """All updates of the contribution, mostly one."""
        return (*self.earlier, self)


class Part(NamedTuple):
    """An update and its weight."""

    vector: Tensor
    weight: float


class ServerRule(NamedTuple, Generic[S]):
    """A rule.

    Attributes:
        init: the state at a model [d].
        absorb: the state after an update.
        reach: how far ``absorb`` moves a coordinate of the model at most, given the largest
            magnitudes of all models and of all deltas so far and the smallest ``lr``: a state that
            must not leave its bounds is not given what could take it there.
        based: whether ``absorb`` looks at the model that the site was sent: the server then keeps
            one for each site at work.
    """

    init: Callable[[Tensor], S]
    absorb: Callable[[S, Update], S]
    reach: Callable[[float, float, float], float]
    based: bool = False


Weight = Callable[[int], float]  # in (0, 1]


def constant(staleness: int) -> float:
    """The weight 1, whatever the staleness."""
    return 1.0


def polynomial(exponent: float) -> Weight:
    """``(1 + staleness)^-a`` (FedAsync: Xie et al. 2019, section 5.2; FedBuff with a = 1/2)."""
    return lambda staleness: (1.0 + staleness) ** -exponent


def hinge(slope: float, border: float) -> Weight:
    """1 up to ``border`` b, then ``1 / (a (staleness - b) + 1)``, a the ``slope``.

    Source: FedAsync (Xie et al. 2019, section 5.2).
    """
    return lambda staleness: 1.0 / (slope * max(0.0, staleness - border) + 1.0)


def blocks(*vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same places of several vectors [d], one block after the other."""
    return zip(*(vector.split(BLOCK) for vector in vectors), strict=True)
