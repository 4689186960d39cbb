"""A method of the literature as a value: the keys it takes, and a plan that a driver executes.

A plan is one of a few kinds, each with a driver of its own: :class:`RoundPlan` (synchronous
averaging), :class:`ArrivalPlan` (the model changes when a site answers) and :class:`PeerPlan` (no
server). A driver does not know the name of the method. Nothing here knows Flower.
"""

from collections.abc import Callable, Mapping
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from strategies.asynchronous.rule import ServerRule
from strategies.peer.algorithm import LinkAlgorithm, PeerAlgorithm
from strategies.robust import Robust
from strategies.topology import Topology

Vectors = Mapping[str, Tensor]


class Section(BaseModel):
    """A table of the run configuration: typed keys with defaults and descriptions, in hyphens."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        populate_by_name=True,
        alias_generator=lambda field: field.replace("_", "-"),
        use_attribute_docstrings=True,
    )


class Run(NamedTuple):
    """What a plan may depend on beside its own keys.

    Attributes:
        lr: the learning rate at the start of the run.
        sam_radius: of sharpness-aware training of any method; 0: off.
        num_sites: how many take part.
        robust: the mean of contributions.
    """

    lr: float
    sam_radius: float
    num_sites: int = 1
    robust: Robust = Robust()


class LocalTraining(NamedTuple):
    """An order to a site: what it does with the model that comes with it.

    Attributes:
        epochs: passes over its training part; or
        steps: batches.
        lr: the rate at the start of a cycle.
        cycle: fractions of the cycle, in [0, 1], at the first batch and after the last.
        proximal: mu of the pull towards the model that was sent.
        delta: whether the site answers how far it moved (sent minus made) instead of the model it
            made.
        keep_moments: whether the optimizer's moments stay at the site for its next order.
        plain: whether the optimizer is SGD without momentum, whatever the configuration says.
    """

    lr: float
    cycle: tuple[float, float]
    epochs: int = 0
    steps: int = 0
    proximal: float = 0.0
    delta: bool = False
    keep_moments: bool = False
    plain: bool = False


# Synchronous rounds.


class RoundStart(NamedTuple):
    """Where a run in rounds stands when a round begins.

    Attributes:
        round_number: counts from 1.
        done: epochs a site so far.
        total: epochs a site in the whole run.
        an_epoch: batches an epoch, the mean over the sites.
    """

    round_number: int
    done: float
    total: int
    an_epoch: float


S = TypeVar("S")
M = TypeVar("M")


class SiteRule(NamedTuple, Generic[M]):
    """What a site remembers from round to round, and what it does to its gradients.

    Attributes:
        init: the memory, a NamedTuple of tensors, at a model [d], before the first round.
        correct: memory, what the server sent and a gradient [d] to the gradient that is followed;
            it may be written in place.
        finish: memory, what the server sent, the model [d] at the end and the sum of the learning
            rates to the new memory and the vectors that go back beside the model.
        sends: the names of these vectors, each [d].
    """

    init: Callable[[Tensor], M]
    correct: Callable[[M, Vectors, Tensor], Tensor]
    finish: Callable[[M, Vectors, Tensor, float], tuple[M, Vectors]]
    sends: tuple[str, ...] = ()


class Mean(NamedTuple):
    """The mean of what came back from a round.

    Attributes:
        vectors: the mean over the sites that answered of each vector that they sent: ``x`` [d] and
            the site rule's.
        share: the weight of the sites that answered, of 1 for all.
    """

    vectors: Vectors
    share: float

    @property
    def x(self) -> Tensor:
        """The mean of the models."""
        return self.vectors["x"]


class RoundPlan(NamedTuple, Generic[S]):
    """Synchronous averaging: instruct the sites, take the mean of what they made, step.

    Attributes:
        init: the server's state at a model [d]; a NamedTuple with a field ``x``.
        instruct: what sites do in a round.
        absorb: the state after a round. Like ``init`` it writes into nothing that it is given:
            ``x`` is what was sent.
        beside: vectors that go to the sites beside the model, by name.
        site: what sites remember; None for nothing.
        weighting: whether sites count the same or by their training examples.
        pooled: whether there is one site, which holds everybody's data; only in a simulation.
    """

    init: Callable[[Tensor], S]
    instruct: Callable[[S, RoundStart], LocalTraining]
    absorb: Callable[[S, Mean], S]
    beside: Callable[[S], Vectors] = lambda state: {}
    site: SiteRule[Any] | None = None
    weighting: Literal["equal", "samples"] = "equal"
    pooled: bool = False


class AlonePlan(NamedTuple):
    """Sites that learn nothing from each other: yardsticks.

    Attributes:
        instruct: what sites do in a round.
        ensemble: test the mean prediction of all models instead of each site's own.
    """

    instruct: Callable[[RoundStart], LocalTraining]
    ensemble: bool


class ForeignPlan(NamedTuple):
    """Rounds whose aggregation is another framework's.

    Attributes:
        build: makes the other framework's object.
        instruct: what sites do in a round.
        weighting: as in :class:`RoundPlan`; of BatchNorm statistics, which that object never sees.
        by_loss: whether that object needs the sites' losses.
        averages: whether that object looks at nothing but the mean of the models, so that it can be
            given another mean.
    """

    build: Callable[[], Any]
    instruct: Callable[[RoundStart], LocalTraining]
    weighting: Literal["equal", "samples"] = "equal"
    by_loss: bool = False
    averages: bool = False


# Arrivals.


class Schedule(NamedTuple):
    """When a contribution that arrived is applied (:mod:`strategies.asynchronous.white_list`).

    Attributes:
        kind: ``arrival``: at once. ``list``: each site once before any again; a site that
            contributed waits for its turn and starts again with the model of its release.
            ``refill``: the same, and when the list is empty all sites are sent the same newest
            model. ``local``: a site goes on while it waits, and what it made meanwhile is averaged.
        slack: contributions by which a site may be ahead of the slowest; not of ``arrival``.
    """

    kind: Literal["arrival", "list", "refill", "local"] = "arrival"
    slack: float = 0.0


class ArrivalPlan(NamedTuple):
    """Asynchronous training.

    Attributes:
        rule: what an arrival does to the model.
        schedule: when it does.
        steps: batches of a contribution.
        proximal: mu of the sites' pull towards the model that was sent.
        least: contributions without which the model never changes.
        by_speed: whether a site takes local steps in proportion to its speed.
        window: of so many contributions a robust mean is taken; 0: the rule takes none.
    """

    rule: ServerRule[Any]
    schedule: Schedule = Schedule()
    steps: int = 1
    proximal: float = 0.0
    least: int = 1
    by_speed: bool = False
    window: int = 0


# Peers.


class Neighbourhood(NamedTuple):
    """The gradient that a peer follows: its own, or one of its neighbourhood.

    Attributes:
        at: ``own``: its own at its own model. ``data``: the neighbours' gradients at its model,
            which takes a second message. ``model``: its own gradients at the neighbours' models.
        rho: radius of sharpness-aware minimization; 0: off.
        perturbed_by: of gradients in the neighbourhood, who perturbs
            (:mod:`strategies.peer.neighbourhood`).
    """

    at: Literal["own", "data", "model"] = "own"
    rho: float = 0.0
    perturbed_by: Literal["owner-of-data", "none", "owner-of-model"] = "owner-of-data"

    @property
    def messages(self) -> int:
        """How many messages a peer gets in an exchange."""
        return 2 if self.at == "data" else 1


class PeerPlan(NamedTuple):
    """Peers without a server.

    Attributes:
        algorithm: what a peer does with gradients and with what its neighbours sent.
        gradient: where it takes them.
        steps: batches between two exchanges.
        check: a topology and the averaging rate with which the method works; raises TopologyError
            for others.
        accumulates_errors: whether it would carry on what a codec loses, and what a robust mean
            leaves out.
    """

    algorithm: PeerAlgorithm[Any] | LinkAlgorithm[Any]
    gradient: Neighbourhood = Neighbourhood()
    steps: int = 1
    check: Callable[[Topology, float], None] = lambda topology, rate: None
    accumulates_errors: bool = False

    def exchange(self, step: int) -> int:
        """The exchange, counted from 0, whose offers are delivered in a step."""
        return (step - 1) // self.gradient.messages

    def number(self, step: int) -> int:
        """The exchange, counted from 0, for which a step trains.

        A plain step trains for the exchange after it, any other for its own.
        """
        return self.exchange(step) + (0 if step and self.gradient.at != "own" else 1)

    def done(self, step: int, exchanges: int) -> float:
        """The fraction of a run of so many exchanges that is over in a step."""
        return min(1.0, self.number(step) / exchanges)

    def after(self, step: int, done: float, batches: int) -> float:
        """The fraction that will be over after the exchange of a step, ``done`` being over in it.

        Before the first exchange nothing tells how many there are: then as if all sites had this
        one's ``batches`` in a run.
        """
        number = self.number(step)
        return done * (number + 1) / number if number else self.steps / batches


Plan = RoundPlan[Any] | AlonePlan | ForeignPlan | ArrivalPlan | PeerPlan
K = TypeVar("K", bound=Section)


class Method(NamedTuple, Generic[K]):
    """A named method.

    Attributes:
        name: as in the configuration.
        keys: what it takes.
        plan: what its keys and the run make of it.
        unused: keys of other sections that have no effect with it and that nothing else tells, such
            as ``topology.averaging-rate``.
        section: where its keys stand, by default under its name.
    """

    name: str
    keys: type[K]
    plan: Callable[[K, Run], Plan]
    unused: frozenset[str] = frozenset()
    section: str = ""

    @property
    def table(self) -> str:
        """The name of the method's section in the configuration."""
        return self.section or self.name
