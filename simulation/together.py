"""The handlers of several sites at once: what they have computed is computed together.

Local training is one vectorised pass, in which the models of the sites are the rows of a matrix
[n, d]; tests of one model are one pass over the examples of all sites. All else that a site does to
answer is its own code, a site at a time. Equal to one site after the other, to rounding; but
dropout draws other numbers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial, reduce
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from client_app import handlers, training
from client_app.memory import restore_from_disk, restore_run_id
from client_app.site import Network, seeded
from client_app.work import Optimizers, Steps, Test, Trained, Training, Work
from configuration.config import Config
from datasets.lazy import Lazy
from datasets.sources import SourceError
from simulation.grid import Call, Fate, VirtualGrid
from simulation.vectorised import Networks, stacked
from simulation.world import SiteWorld
from strategies.codecs import CODECS
from strategies.gradients import perturbed
from strategies.records import config_of, num_bytes

STEPS: dict[str, Callable[[Message, Context], Steps]] = {
    "train": handlers.training_of,
    "evaluate": handlers.test_of,
}


class Together(VirtualGrid):
    """A grid whose sites answer together.

    How long an answer takes, and how large it is, follows from the site's last one to a message of
    the same kind. So answers are computed when the first of them arrives: all that are under way. A
    site that fails is heard of when its answer would have come.

    Args:
        client_app: answers all messages but those to train and to test.
        sites: as in :class:`VirtualGrid`, like all else.
        run_config: of every site.
        state: where sites keep what they remember.
        start_s: the time.
    """

    def __init__(
        self,
        client_app: ClientApp,
        sites: list[SiteWorld],
        run_config: Mapping[str, Any],
        state: Path | None = None,
        start_s: float = 0.0,
    ) -> None:
        super().__init__(client_app, sites, run_config, state=state, start_s=start_s)
        self._waiting: list[tuple[Call, Fate | None]] = []
        self._costs: dict[tuple[Any, ...], tuple[float, int]] = {}  # samples and bytes
        self._made: dict[str, Callable[[], Message]] = {}
        # Of one's own, a codec may make answers of other sizes.
        self._fixed = run_config["wire.codec"] in CODECS

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages."""
        sent = super().push_messages(messages)
        if any(fate is None for _, fate in self._waiting):
            self._compute()
        return sent

    def _send(self, message: Message) -> str:
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        if kind not in STEPS or any(call.node == node and not fate for call, fate in self._waiting):
            self._compute()
        return super()._send(message)

    def _work(self, call: Call) -> None:
        if call.message.metadata.message_type not in STEPS:
            super()._work(call)
            return
        fate = None
        if cost := self._costs.get(_kind(call)):
            fate = self._fate(call, *cost)
            if fate.time is not None and fate.lost:
                self._deliver(call, fate.time, self._unavailable(call.message))
            elif fate.time is not None:
                if in_time := self._in_time(call, fate.time):
                    late = partial(self._late, call.message.metadata.message_id)
                    self._store(call, fate.time, late)
                fate = fate._replace(lost=not in_time)
        self._waiting.append((call, fate))

    def _late(self, identity: str) -> Message:
        if identity not in self._made:
            self._compute()
        return self._made.pop(identity)()

    def _compute(self) -> None:
        """Compute the answers to all messages; a site does one after the other."""
        while self._waiting:
            nodes = set[int]()
            some: list[tuple[Call, Fate | None]] = []
            others: list[tuple[Call, Fate | None]] = []
            for each in self._waiting:
                (others if each[0].node in nodes else some).append(each)
                nodes.add(each[0].node)
            self._waiting = others
            contexts = [self._context(call.node) for call, _ in some]
            replies = answers(
                [(call.message, context) for (call, _), context in zip(some, contexts, strict=True)]
            )
            for (call, fate), context, reply in zip(some, contexts, replies, strict=True):
                if fate is None:
                    if not reply.has_error() and self._fixed:
                        self._costs[_kind(call)] = self._samples(reply), num_bytes(reply)
                    self._answered(call, context, reply)
                    continue
                if fate.kept:
                    self.contexts[call.node] = context
                if not fate.lost:
                    self._made[call.message.metadata.message_id] = self._replies.put(reply)


def _kind(call: Call) -> tuple[Any, ...]:
    """What the costs of an answer depend on."""
    order = config_of(call.message)
    what = (order.get(key) for key in ("local-steps", "local-epochs", "test"))
    return call.node, call.message.metadata.message_type, *what


def answers(calls: Sequence[tuple[Message, Context]]) -> list[Message]:
    """What sites answer: one message each, to train or to test."""
    waiting = [_Answer(*call) for call in calls]
    while unfinished := [answer for answer in waiting if answer.work is not None]:
        works = [answer.work for answer in unfinished if answer.work is not None]
        for answer, found in zip(unfinished, _computed(works), strict=True):
            answer.go_on(found)
    return [answer.reply() for answer in waiting]


class _Answer:
    """A handler that stops at each piece of its work.

    Attributes:
        work: what it waits for; None at its end.
    """

    def __init__(self, message: Message, context: Context) -> None:
        self._call = message, context
        self._end: Message | BaseException | None = None
        self._steps: Steps | None = None
        self.work: Work | None = None
        self.go_on(None)

    def go_on(self, found: Any) -> None:
        """Go on with what came of the work, or with the error that did."""

        def step(message: Message, context: Context) -> Message:
            if self._steps is None:
                restore_from_disk(message, context)
                self._steps = STEPS[message.metadata.message_type](message, context)
            if isinstance(found, Exception):
                raise found
            self.work = self._steps.send(found)
            return message

        self.work = None
        try:
            restore_run_id(*self._call, step)
        except StopIteration as end:
            self._end = end.value
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self._end = error

    def reply(self) -> Message:
        """The answer, or that there is none."""

        def end(message: Message, context: Context) -> Message:
            if isinstance(self._end, Message):
                return self._end
            assert self._end is not None
            raise self._end

        call = reduce(
            lambda inner, mod: lambda message, context: mod(message, context, inner),
            reversed(handlers.MODS),
            end,
        )
        return call(*self._call)


def _computed(works: Sequence[Work]) -> list[Any]:
    """What comes of each piece of work: an exception where it fails."""
    trained = iter(_trained([work for work in works if isinstance(work, Training)]))
    tested = iter(_tested([work for work in works if isinstance(work, Test)]))
    return [next(trained if isinstance(work, Training) else tested) for work in works]


def _alone(work: Work) -> Any:
    try:
        return work.compute()
    except Exception as error:
        return error


# Local training.


@lru_cache(maxsize=1)
def _networks(config: Config, network: Network, shape: tuple[int, ...]) -> Networks:
    return Networks(config, network.model, shape)


def _trained(works: list[Training]) -> list[Any]:
    if len(works) > 1:
        first = works[0]
        networks = _networks(first.config, first.network, tuple(first.part.x.shape[1:]))
        read_ahead = isinstance(first.part.x, Lazy) and first.part.x.workers
        if not networks.one_by_one and not read_ahead:
            try:
                return _stacked(works, networks)
            except SourceError:  # one site's
                pass
    found = []
    for work in works:
        each = _alone(work)
        found.append(each._replace(x=each.x.clone()) if isinstance(each, Trained) else each)
    return found


class _Rows(NamedTuple):
    """Models as rows [k, d], or one [d], and their gradients."""

    network: nn.Module
    x: Tensor
    grad: Tensor


class _Alike(NamedTuple):
    """Sites that follow their gradients with the same rates.

    Attributes:
        rows: theirs.
        steps: of each.
        rate: of each step.
        optimizers: of all of them; of a site whose moments stay, its own.
    """

    rows: int | slice
    steps: int
    rate: Callable[[int], float]
    optimizers: Optimizers

    def step(self, number: int, gradients: Tensor) -> None:
        """Follow the gradients [n, d] of all sites."""
        if number < self.steps:
            [optimizer] = self.optimizers
            [group] = optimizer.param_groups
            group["lr"], group["params"][0].grad = self.rate(number), gradients[self.rows]
            optimizer.step()


def _alike(works: list[Training], x: Tensor) -> Iterator[_Alike]:
    """All sites, in their order, whose models are ``x`` [n, d]."""

    def key(row: int) -> tuple[Any, ...]:
        work = works[row]
        return work.local, work.an_epoch, work.remember and row

    for _, rows in groupby(range(len(works)), key):
        first, *others = rows
        work = works[first]
        chosen = first if work.remember else slice(first, first + 1 + len(others))
        model = work.network.model.network
        optimizers = work.optimizers(_Rows(model, x[chosen], torch.zeros_like(x[chosen])))
        if work.remember:
            work.remember(optimizers)
        yield _Alike(chosen, work.steps, work.rates(), optimizers)


def _stacked(works: list[Training], networks: Networks) -> list[Trained]:
    # Those that still train are always the first.
    order = sorted(range(len(works)), key=lambda number: works[number].steps, reverse=True)
    rows = [works[number] for number in order]
    keys, device = rows[0].config.training, rows[0].network.model.x.device
    x = torch.stack([work.x.to(device) for work in rows])
    groups, batches = list(_alike(rows, x)), [work.batches() for work in rows]
    losses = x.new_zeros(len(x))
    with seeded(device, works[0].layers()):
        for step in range(rows[0].steps):
            some = [next(each) for each in batches[: sum(work.steps > step for work in rows)]]
            points, batch = x[: len(some)], stacked(some)
            loss, gradients, _ = networks.gradients(points, batch)
            if keys.sam_radius:
                near = perturbed(points, gradients, keys.sam_radius)
                gradients = networks.gradients(near, batch).gradients
            for row, (work, own) in enumerate(zip(rows, some, strict=False)):
                if work.correct:
                    gradient = work.correct(_known(loss[row], gradients[row]))
                    gradients[row] = gradient(points[row], own)[1]
            if keys.clip_norm:
                norm = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
                gradients.mul_((keys.clip_norm / (norm + 1e-6)).clamp(max=1))
            for group in groups:
                group.step(step, gradients)
            losses[: len(some)] += loss
    optimizers = {
        row: group.optimizers for group in groups for row in [group.rows] if isinstance(row, int)
    }
    made = {
        number: Trained(
            x[row], x.new_empty(0), total / works[number].steps, optimizers.get(row, [])
        )
        for row, (number, total) in enumerate(zip(order, losses.tolist(), strict=True))
    }
    return [made[number] for number in range(len(works))]


def _known(loss: Tensor, gradient: Tensor) -> training.Gradient:
    """What was computed already."""
    return lambda x, batch, *, track=True: (loss, gradient)


# Tests.


def _tested(works: list[Test]) -> list[Any]:
    found: dict[int, Any] = {}
    for numbers in _of_one_model(works):
        some = [works[number] for number in numbers]
        made = _tested_together(some) if len(some) > 1 else [_alone(some[0])]
        found |= zip(numbers, made, strict=True)
    return [found[number] for number in range(len(works))]


def _of_one_model(works: list[Test]) -> list[list[int]]:
    """Tests of the same memory, as many together as one of them takes examples at once."""
    groups: list[list[int]] = []
    last: dict[tuple[int, int], tuple[list[int], int]] = {}
    for number, work in enumerate(works):
        key = work.xs.data_ptr(), len(work.xs)
        group, examples = last.get(key, ([], 0))
        examples += len(work.part.y)
        if (
            not group
            or examples > work.network.at_once
            or len(work.xs) > 1
            or isinstance(work.part.x, Lazy)
        ):
            groups.append(group := [])
            examples = len(work.part.y)
        group.append(number)
        last[key] = group, examples
    return groups


def _tested_together(works: list[Test]) -> list[Any]:
    first = works[0]
    networks = _networks(first.config, first.network, tuple(first.part.x.shape[1:]))
    first.network.model.load(first.xs[0], first.stats[0])
    inputs = torch.cat([training.prepare(work.part.x) for work in works])
    outputs = networks.outputs(inputs).split([len(work.part.y) for work in works])
    return [
        _alone(work._replace(network=work.network._replace(predict=_constant(own))))
        for work, own in zip(works, outputs, strict=True)
    ]


def _constant(outputs: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda inputs: outputs
