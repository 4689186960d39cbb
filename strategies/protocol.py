"""Typed messages between the server and its sites.

One function each way converts between a value and Flower's records.

A server that trusts what sites send is stopped by the first broken one. Every reply is therefore
read here, once and completely, before anything is touched: which records there are, every name,
type and range, every byte of an array's header, every number of a model. Whatever is wrong, or goes
wrong while reading, is a :class:`InvalidReply` that says what in one short line.
"""

import re
import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Annotated, Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from strategies.averaging.mean import extent, too_large
from strategies.codecs import Codec
from strategies.method import LocalTraining
from strategies.records import ARRAYS, CONFIG, METRICS, OFFER, STATS, TO, X, header, pack, unpack

MODEL = "model"  # the record with a peer's last model
# The record with what a site found when it tested the model that came, before it trained it.
TEST = "test"
NONCE, PUBLIC_KEY = 16, 32  # bytes
CODED = "x/"  # before the parts of an update in a codec
SWITCHES = ("delta", "keep-moments", "plain")  # of an order
MOMENTS = ("known", "mean", "variance")  # of the columns of a table
GREATEST = 1e30  # no loss is larger: sums over sites stay finite
ARRAY_NAME = re.compile(rf"({OFFER}|{TO}\d+)/[a-z0-9.-]{{1,32}}")
# Types of arrays between peers.
NUMBERS = {"uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


class InvalidReply(ValueError):
    """A reply cannot be used; the message says why in a line."""


def printable(text: str, longest: int = 80) -> str:
    """Text of a site for a log, a table or an error: one short line without control characters."""
    start = "".join(char if char.isprintable() else "?" for char in text[: longest + 1])
    return start if len(start) <= longest else f"{start[: longest - 1]}…"


def _shown(value: object) -> str:
    return printable(_SHORT.repr(value))


# What a message holds besides vectors.


def _is_printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be printable")
    return text


Whole = Annotated[int, Field(ge=0, le=10**15)]
Examples = Annotated[int, Field(ge=1, le=10**12)]
Magnitude = Annotated[float, Field(ge=0, le=GREATEST, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(ge=-GREATEST, le=GREATEST, allow_inf_nan=False)]
# Below 0: of a task of one's own, such as a signed error.
Means = Annotated[list[Finite], Field(max_length=10**5)]
# datasets.names makes no others.
Name = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_is_printable)]
Nonce = Annotated[bytes, Field(min_length=NONCE, max_length=NONCE)]
Column = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_is_printable)]


class Part(BaseModel):
    """A record of a message: keys with hyphens, of exact types, no others."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        populate_by_name=True,
        alias_generator=lambda field: field.replace("_", "-"),
    )

    def named(self) -> dict[str, Any]:
        """The fields that are set, by their keys on the wire."""
        return self.model_dump(by_alias=True, exclude_none=True)


class TrainMetrics(Part):
    """What a site reports of its training.

    Mean loss, first and last rate, examples, and ``samples``: gradients computed, one an example.
    Losses and accuracies are left out, here and below, where the site keeps them to itself.
    """

    loss: Magnitude | None = None
    lr_first: Magnitude
    lr_last: Magnitude
    num_examples: Examples
    samples: Whole


class TestMetrics(Part):
    """What a site reports of a test.

    Of several models it is a test of their mean prediction; beside it stand the accuracy of a
    majority vote and the mean accuracy of the single models.
    All are means over its examples; of ``means`` metrics are made (:class:`models.tasks.Task`).
    """

    __test__ = False  # pytest looks at names

    loss: Magnitude | None = None
    accuracy: Share | None = None
    accuracy_vote: Share | None = None
    accuracy_single: Share | None = None
    means: Means | None = None
    num_examples: Examples


class StepMetrics(Part):
    """What a peer reports of a step, as far as it took part in each."""

    num_examples: Examples
    samples: Whole
    loss: Magnitude | None = None
    lr_first: Magnitude | None = None
    lr_last: Magnitude | None = None
    disagreement: Magnitude | None = None
    test_loss: Magnitude | None = None
    test_accuracy: Share | None = None
    test_means: Means | None = None
    test_examples: Examples | None = None

    @model_validator(mode="after")
    def _check_consistent(self) -> "StepMetrics":
        if (self.lr_first is None) != (self.lr_last is None) or (
            self.loss is not None and self.lr_first is None
        ):
            raise ValueError("loss and rates go together")
        if (
            self.test_examples is None
            and (self.test_loss, self.test_accuracy, self.test_means) != (None,) * 3
        ):
            raise ValueError("what a test found goes with test-examples")
        return self


class StepNotes(Part):
    """What a peer says of a step.

    Attributes:
        refused: payloads it refuses, and why.
        broken: neighbours whose channels to it must be reset.
        reset: whether it has reset its own channel.
        lost: whether it has lost its memory of the run.
        nonce: its own in this run, where payloads are sealed; another one than before if it lost
            its memory.
    """

    refused: Annotated[list[str], Field(max_length=1000)]
    broken: list[Whole]
    reset: bool
    lost: bool
    nonce: Nonce | None = None


class SiteCard(Part):
    """A site's answer to who it is and what it holds.

    Attributes:
        site: its number, from 0.
        sites: how many a simulation has; 0 in a deployment, where a site knows nothing but itself.
        name: for people.
        classes, columns: of its labels; of its table, if it is one.
        shape: of an example.
        train, test: examples.
        notes: on its data, for people.
        code: of :func:`strategies.records.code_version`.
        known, mean, variance: of a table's columns, then of the numbers to predict.
        counts: examples of each class; a deployed site keeps them to itself.
        public_key: where keys are trusted on first use.
        initial: SHA-256 of the file from which the network starts.
        nonce: its own in this run, where payloads are sealed.
    """

    site: Annotated[int, Field(ge=0, lt=10**6)]
    sites: Annotated[int, Field(ge=0, le=10**6)]
    name: Name
    classes: Annotated[list[Name], Field(min_length=1, max_length=100)]
    columns: list[Column]
    shape: Annotated[list[Annotated[int, Field(ge=1, le=2**24)]], Field(min_length=1, max_length=4)]
    train: Examples
    test: Examples
    notes: Annotated[list[str], Field(max_length=1000)]
    code: Annotated[str, Field(max_length=64)]
    known: list[Magnitude] | None = None
    mean: list[Finite] | None = None
    variance: list[Annotated[float, Field(ge=0, le=GREATEST**2, allow_inf_nan=False)]] | None = None
    counts: list[Whole] | None = None
    initial: Annotated[str, Field(max_length=64)] | None = None
    public_key: Annotated[bytes, Field(min_length=PUBLIC_KEY, max_length=PUBLIC_KEY)] | None = None
    nonce: Nonce | None = None

    @model_validator(mode="after")
    def _check_consistent(self) -> "SiteCard":
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("classes must differ")
        if self.counts is not None and (len(self.counts), sum(self.counts)) != (
            len(self.classes),
            self.train + self.test,
        ):
            raise ValueError("counts must be those of the classes, train + test in all")
        moments = (self.known, self.mean, self.variance)
        if len({None if each is None else len(each) for each in moments}) > 1:
            raise ValueError("known, mean and variance go together")
        # Whether there are numbers to predict the server knows.
        if len(self.known or ()) not in (len(self.columns), len(self.columns) + len(self.classes)):
            raise ValueError(
                "known, mean and variance must be those of the columns and of the numbers to "
                "predict"
            )
        if self.columns and self.shape != [len(self.columns)]:
            raise ValueError("shape must be that of the columns")
        return self

    @property
    def moments(self) -> tuple[tuple[float, ...], ...]:
        """``known``, ``mean`` and ``variance``; empty where the data are no table."""
        return tuple(
            tuple(each) for each in (self.known, self.mean, self.variance) if each is not None
        )


# Orders: what the server tells.


class Agreed(NamedTuple):
    """The facts that all sites of a run share.

    Attributes:
        classes: of all sites.
        moments: ``known``, ``mean`` and ``variance`` over all sites, of a table's columns and of
            numbers to predict; empty where there are none.
        started: of a run that goes on, what its messages tell of that.
    """

    classes: tuple[str, ...]
    moments: tuple[tuple[float, ...], ...] = ()
    started: "Started | None" = None

    def config(self) -> dict[str, Any]:
        """The fields of a message."""
        moments = dict(zip(MOMENTS, map(list, self.moments), strict=False))
        return (
            {"classes": list(self.classes)}
            | moments
            | (self.started.config() if self.started else {})
        )

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Agreed":
        """The value in the fields of a message."""
        moments = tuple(tuple(config[key]) for key in MOMENTS if key in config)
        return cls(tuple(config["classes"]), moments, Started.of(config))


class Started(NamedTuple):
    """A run that was killed and goes on, which Flower takes for another run.

    Attributes:
        run: Flower's number of its first start: sites remember it by that.
        times: how often it was started again.
    """

    run: int
    times: int

    def config(self) -> dict[str, Any]:
        """The fields of a message."""
        # Flower's numbers are too large for a message's.
        return {"run": str(self.run), "started": self.times}

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Started | None":
        """The value in a message's fields; None where there is none that is valid."""
        run, times = config.get("run"), config.get("started")
        if not (
            isinstance(run, str)
            and re.fullmatch("[0-9]{1,20}", run)
            and isinstance(times, int)
            and times >= 0
        ):
            return None
        return cls(int(run), times)


class Order(NamedTuple):
    """To train (``local``) or to test the model that comes with it.

    Attributes:
        number: of the round, or of updates so far.
        agreed: what all sites know.
        local: what to do; None in a test.
        test: whether the model is tested before it is trained: a round is one message.
    """

    number: int
    agreed: Agreed
    local: LocalTraining | None = None
    test: bool = False


def write_order(order: Order) -> ConfigRecord:
    """The order as a record."""
    local = {} if order.local is None else write_local(order.local)
    test = {"test": True} if order.test else {}
    return ConfigRecord({"server-round": order.number, **order.agreed.config(), **local, **test})


def write_local(local: LocalTraining) -> dict[str, bool | int | float | str]:
    """The keys of an order that say what a site is to do, where they differ from the default."""
    found: dict[str, bool | int | float | str] = (
        {"local-steps": local.steps} if local.steps else {"local-epochs": local.epochs}
    )
    found |= {"lr": local.lr, "cycle-from": local.cycle[0], "cycle-to": local.cycle[1]}
    found |= {"proximal-mu": local.proximal} if local.proximal else {}
    return found | {key: True for key in SWITCHES if getattr(local, key.replace("-", "_"))}


def read_order(record: ConfigRecord) -> Order:
    """The order in a record.

    Raises:
        KeyError: a part is missing.
    """
    config: dict[str, Any] = dict(record)
    local = None
    if "lr" in config:
        local = LocalTraining(
            float(config["lr"]),
            (float(config["cycle-from"]), float(config["cycle-to"])),
            epochs=int(config.get("local-epochs", 0)),
            steps=int(config.get("local-steps", 0)),
            proximal=float(config.get("proximal-mu", 0.0)),
            **{key.replace("-", "_"): bool(config.get(key, False)) for key in SWITCHES},
        )
    return Order(
        int(config["server-round"]), Agreed.of(config), local, bool(config.get("test", False))
    )


class PeerOrder(NamedTuple):
    """To a peer: take this step.

    Attributes:
        step: counts from 0.
        agreed: what all sites know.
        neighbours: whom it hears in this step, with their weights.
        test: whether it tests its model.
        last: whether this is its last step.
        rejoin: whether it was away.
        reset: whether it must reset its channel: a neighbour lacks a difference (CHOCO).
        done: fraction of the run.
        listeners: who may read what it offers, where that is sealed.
        keys: public keys of the others, where they are trusted on first use.
        nonces: of those whom it hears and who may read what it offers, where that is sealed.
    """

    step: int
    agreed: Agreed
    neighbours: Mapping[int, float]
    test: bool
    last: bool
    rejoin: bool
    reset: bool
    done: float
    listeners: tuple[int, ...] | None = None
    keys: Mapping[int, bytes] = {}
    nonces: Mapping[int, bytes] = {}


def write_peer_order(order: PeerOrder) -> ConfigRecord:
    """The order as a record."""
    found: dict[str, Any] = {
        "server-round": order.step,
        **order.agreed.config(),
        "neighbours": list(order.neighbours),
        "weights": list(order.neighbours.values()),
        "test": order.test,
        "last": order.last,
        "rejoin": order.rejoin,
        "reset": order.reset,
        "cycle-from": order.done,
    }
    found |= {} if order.listeners is None else {"listeners": list(order.listeners)}
    found |= {f"key-{number}": key for number, key in order.keys.items()}
    return ConfigRecord(
        found | {f"nonce-{number}": nonce for number, nonce in order.nonces.items()}
    )


def read_peer_order(record: ConfigRecord) -> PeerOrder:
    """The order in a record.

    Raises:
        KeyError: a part is missing.
        ValueError: a key or a nonce is none.
    """
    config: dict[str, Any] = dict(record)
    return PeerOrder(
        int(config["server-round"]),
        Agreed.of(config),
        dict(zip(config["neighbours"], config["weights"], strict=True)),
        bool(config["test"]),
        bool(config["last"]),
        bool(config["rejoin"]),
        bool(config["reset"]),
        float(config["cycle-from"]),
        tuple(config["listeners"]) if "listeners" in config else None,
        _of_others(config, "key-", PUBLIC_KEY),
        _of_others(config, "nonce-", NONCE),
    )


def _of_others(config: Mapping[str, Any], prefix: str, length: int) -> dict[int, bytes]:
    """The keys or nonces of other sites, each of ``length`` bytes."""
    found = {name: value for name, value in config.items() if name.startswith(prefix)}
    for name, value in found.items():
        if not isinstance(value, bytes) or len(value) != length:
            raise ValueError(f"{name} is {_shown(value)}: {length} bytes are expected")
    return {int(name.removeprefix(prefix)): value for name, value in found.items()}


# Replies: what sites answer.


class Layout(NamedTuple):
    """The layout of a model on the wire.

    Attributes:
        sizes: elements of each vector.
        variances: which statistics are variances, [b] of bool.
        codec: in which sites send how far they moved ``x``; None where they send it whole.
        coded: what it makes of a vector: of each part, type and shape.
    """

    sizes: Mapping[str, int]
    variances: Tensor
    codec: Codec | None = None
    coded: Mapping[str, tuple[str, tuple[int, ...]]] = {}

    def with_codec(self, codec: Codec) -> "Layout":
        """This layout with updates in a codec, whose payloads are always of the same size."""
        payload = codec.encode(torch.ones(self.sizes[X]), torch.Generator())
        coded = {
            name: (str(part.dtype).removeprefix("torch."), tuple(part.shape))
            for name, part in payload.items()
        }
        return self._replace(codec=codec, coded=coded)


class Trained(NamedTuple):
    """A site's reply to an order to train.

    Attributes:
        vectors: the model it made, or how far it moved from the one it was sent.
        metrics: what it reports.
        largest: the largest magnitude in ``x``.
        change: of each vector, how far it is from the one that was sent.
    """

    vectors: dict[str, Tensor]
    metrics: TrainMetrics
    largest: float
    change: Mapping[str, float]


class Offer(NamedTuple):
    """A peer's reply to a step.

    Attributes:
        arrays: payloads for all neighbours (``offer/``) or one (``to-J/``), which only they look
            into.
        metrics: what it reports.
        notes: what it says.
        model: its last model, where the server may have it.
        flaw: why its last model cannot be used.
    """

    arrays: Mapping[str, Array]
    metrics: StepMetrics
    notes: StepNotes
    model: Mapping[str, Tensor] | None
    flaw: str


Rest = ParamSpec("Rest")
T = TypeVar("T")
P = TypeVar("P", bound=Part)


def _border(
    read: Callable[Concatenate[RecordDict, Rest], T],
) -> Callable[Concatenate[Message, Rest], T]:
    """A reader of replies that raises :class:`InvalidReply`, whatever is wrong with a reply."""

    def reader(reply: Message, /, *args: Rest.args, **kwargs: Rest.kwargs) -> T:
        if reply.has_error():
            raise InvalidReply(reason_of(reply))
        try:
            return read(reply.content, *args, **kwargs)
        except Exception as error:
            raise InvalidReply(_cause(error)) from error

    reader.__doc__ = read.__doc__
    return reader


def _cause(error: Exception) -> str:
    if isinstance(error, InvalidReply):
        return str(error)
    return f"cannot be read: {type(error).__name__}: {printable(str(error))}"


def reason_of(reply: Message) -> str:
    """The reason of a reply that is an error, in a line."""
    reason = (reply.error.reason or "no reason given").strip()
    return printable(reason.splitlines()[-1] if "\n" in reason else reason, 500)


def _records(content: Mapping[str, Any], **expected: type) -> Iterator[Any]:
    """The records of a reply in the order asked for; there must be these and no others."""
    if set(content) != set(expected):
        raise InvalidReply(
            f"the reply holds the records {_shown(sorted(content))}, "
            f"{sorted(expected)} are expected"
        )
    for name, kind in expected.items():
        if not isinstance(content[name], kind):
            raise InvalidReply(
                f"{name} is {type(content[name]).__name__}, {kind.__name__} is expected"
            )
        yield content[name]


def _part(kind: type[P], record: MetricRecord | ConfigRecord) -> P:
    try:
        return kind.model_validate(dict(record))
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        key = ".".join(str(step) for step in wrong["loc"])
        what = wrong["msg"].removeprefix("Value error, ").replace("Input should", "must")
        match wrong["type"]:
            case "missing":
                reason = f"{key} is missing"
            case "extra_forbidden":
                reason = f"{_shown(key)} is unknown"
            case _ if not key:
                reason = what
            case _:
                reason = f"{key} is {_shown(wrong['input'])}: {what}"
        raise InvalidReply(printable(reason, 240)) from None


def _examples(found: int | None, expected: int, name: str = "num-examples") -> None:
    if found != expected:
        raise InvalidReply(f"{name} is {found}, at first the site said {expected}")


def _whole(name: str, array: Array, dtype: str, shape: tuple[int, ...]) -> None:
    """Check that an array's bytes are those of its type and shape."""
    known, start = np.dtype(dtype), header(np.dtype(dtype), shape)
    length = len(start) + known.itemsize * int(np.prod(shape, dtype=object))
    if array.stype != "numpy.ndarray":
        raise InvalidReply(f"{name} is a {_shown(array.stype)}, 'numpy.ndarray' is expected")
    if len(array.data) != length or array.data[: len(start)] != start:
        raise InvalidReply(
            f"{name} holds {len(array.data)} bytes that are not {dtype} of shape {shape}"
        )


def _vectors(record: ArrayRecord, layout: Layout) -> dict[str, Tensor]:
    """The vectors of a model, in the reply's memory; their values are still to be looked at."""
    if set(record) != set(layout.sizes):
        raise InvalidReply(
            f"the reply holds the arrays {_shown(sorted(record))}, "
            f"{sorted(layout.sizes)} are expected"
        )
    found = {}
    for name, size in layout.sizes.items():
        array = record[name]
        if array.dtype != "float32" or tuple(array.shape) != (size,):
            raise InvalidReply(
                f"{name} is {_shown(array.dtype)} of shape {_shown(tuple(array.shape))}, "
                f"float32 of shape ({size},) is expected"
            )
        _whole(name, array, "float32", (size,))
        found[name] = unpack(array)
    if STATS in found and bool((found[STATS][layout.variances] < 0).any()):
        raise InvalidReply("stats holds a variance below 0")
    return found


def write_model(arrays: ArrayRecord, codec: Codec) -> ArrayRecord:
    """A model and what goes beside it, ``x`` in a codec."""
    coded = pack(codec.encode(unpack(arrays[X]), torch.Generator()))
    rest = {name: array for name, array in arrays.items() if name != X}
    return ArrayRecord({f"{CODED}{name}": array for name, array in coded.items()} | rest)


def read_model(arrays: ArrayRecord, codec: Codec | None) -> dict[str, Tensor]:
    """The vectors of a message to a site."""
    vectors = {name: unpack(array) for name, array in arrays.items()}
    coded = {
        name.removeprefix(CODED): vectors.pop(name)
        for name in list(vectors)
        if name.startswith(CODED)
    }
    return vectors | ({X: codec.decode(coded)} if coded and codec else {})


def _decoded(record: ArrayRecord, layout: Layout) -> tuple[Tensor, ArrayRecord]:
    """How far a site moved ``x``, and what it sent besides."""
    assert layout.codec is not None
    parts = {
        name.removeprefix(CODED): array for name, array in record.items() if name.startswith(CODED)
    }
    if set(parts) != set(layout.coded):
        raise InvalidReply(
            f"the update holds {_shown(sorted(parts))}, {sorted(layout.coded)} are expected"
        )
    for name, (dtype, shape) in layout.coded.items():
        if parts[name].dtype != dtype or tuple(parts[name].shape) != shape:
            raise InvalidReply(
                f"{CODED}{name} is {_shown(parts[name].dtype)} of shape "
                f"{_shown(tuple(parts[name].shape))}"
            )
        _whole(f"{CODED}{name}", parts[name], dtype, shape)
    x = layout.codec.decode({name: unpack(array) for name, array in parts.items()})
    if x.shape != (layout.sizes[X],) or x.dtype != torch.float32:
        raise InvalidReply(f"the update decodes to {x.dtype} of shape {tuple(x.shape)}")
    return x, ArrayRecord(
        {name: array for name, array in record.items() if not name.startswith(CODED)}
    )


def _model(
    record: ArrayRecord, layout: Layout, sent: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], float, dict[str, float]]:
    """A model's vectors, the largest magnitude in ``x``, and how far each is from what was sent."""
    if layout.codec:
        moved, rest = _decoded(record, layout)
        vectors = _vectors(
            rest,
            layout._replace(sizes={name: size for name, size in layout.sizes.items() if name != X}),
        )
        vectors[X] = sent[X] + moved if X in sent else moved
    else:
        vectors = _vectors(record, layout)
    measured = {name: extent(vector, sent.get(name)) for name, vector in vectors.items()}
    for largest, _ in measured.values():
        if reason := too_large(largest):
            raise InvalidReply(reason)
    return vectors, measured[X][0], {name: change for name, (_, change) in measured.items()}


@_border
def read_trained(
    content: RecordDict,
    layout: Layout,
    num_examples: int,
    sent: Mapping[str, Tensor],
    tested: bool = False,
) -> Trained:
    """Read a site's reply to an order to train.

    Args:
        content: of the reply.
        layout: of the model.
        num_examples: what the site said at first.
        sent: the vectors that the change is taken from; not those of which the site sends the
            change itself.
        tested: whether there is also what :func:`read_tested` reads.

    Raises:
        InvalidReply: it cannot be used.
    """
    rest = {name: record for name, record in content.items() if not (tested and name == TEST)}
    arrays, record = _records(rest, **{ARRAYS: ArrayRecord, METRICS: MetricRecord})
    metrics = _part(TrainMetrics, record)
    _examples(metrics.num_examples, num_examples)
    vectors, largest, change = _model(arrays, layout, sent)
    return Trained(vectors, metrics, largest, change)


def write_trained(
    vectors: Mapping[str, Tensor], metrics: TrainMetrics, tested: TestMetrics | None = None
) -> RecordDict:
    """The content of a reply to an order to train."""
    test = {TEST: MetricRecord(tested.named())} if tested else {}
    return RecordDict({ARRAYS: pack(vectors), METRICS: MetricRecord(metrics.named()), **test})


def _few(means: list[float] | None, expected: int) -> None:
    if means is not None and len(means) != expected:
        raise InvalidReply(f"it reports {len(means)} means, {expected} are expected")


@_border
def read_tested(
    content: RecordDict, num_examples: int, models: int = 1, beside: bool = False, means: int = 0
) -> TestMetrics:
    """Read a site's test of the mean prediction of ``models`` models.

    Args:
        content: of the reply.
        num_examples: how many the site has to test on.
        models: how many there are.
        beside: whether it stands in the reply to a training, or in a reply of its own.
        means: how many the task has.

    Raises:
        InvalidReply: it cannot be used.
    """
    records = (
        {name: record for name, record in content.items() if name == TEST} if beside else content
    )
    [record] = _records(records, **{TEST if beside else METRICS: MetricRecord})
    metrics = _part(TestMetrics, record)
    _examples(metrics.num_examples, num_examples)
    _few(metrics.means, means)
    several = (metrics.accuracy_vote, metrics.accuracy_single)
    if models == 1 and several != (None, None):
        raise InvalidReply(
            "accuracy-vote and accuracy-single belong to a test of several models, "
            f"this one is of {models}"
        )
    return metrics


def write_tested(metrics: TestMetrics) -> RecordDict:
    """The content of a reply to an order to test."""
    return RecordDict({METRICS: MetricRecord(metrics.named())})


@_border
def read_offer(
    content: RecordDict,
    order: PeerOrder,
    layout: Layout,
    num_examples: int,
    num_tests: int,
    readers: Collection[int],
    model: bool,
    means: int = 0,
) -> Offer:
    """Read a peer's reply to an order.

    Args:
        content: of the reply.
        order: that it answers.
        layout: of a model.
        num_examples: of the training part, as the site said at first.
        num_tests: of the test part, as the site said at first.
        readers: whom it may address.
        model: whether its model is expected; a flaw in it costs no more than the model.
        means: how many a test has.

    Raises:
        InvalidReply: it cannot be used.
    """
    rest = {name: record for name, record in content.items() if not (model and name == MODEL)}
    arrays, record, config = _records(
        rest, **{ARRAYS: ArrayRecord, METRICS: MetricRecord, CONFIG: ConfigRecord}
    )
    metrics, notes = _part(StepMetrics, record), _part(StepNotes, config)
    _examples(metrics.num_examples, num_examples)
    if (metrics.test_examples is not None) != order.test:
        raise InvalidReply(f"it {'left out the' if order.test else 'reports a'} test")
    if order.test:
        _examples(metrics.test_examples, num_tests, "test-examples")
        _few(metrics.test_means, means)
    if strangers := set(notes.broken) - set(order.neighbours):
        raise InvalidReply(f"broken names {_shown(sorted(strangers))}, no neighbours of it")
    if (notes.nonce is None) != (order.listeners is None):
        raise InvalidReply(
            "it tells no nonce"
            if notes.nonce is None
            else "it tells a nonce, and nothing is sealed"
        )
    _payloads(arrays, [] if order.last else [OFFER, *(f"{TO}{reader}" for reader in readers)])
    made, flaw = None, ""
    if model:
        try:
            [last] = _records({MODEL: content.get(MODEL)}, **{MODEL: ArrayRecord})
            made = _model(last, layout, {})[0]
        except Exception as error:
            flaw = _cause(error)
    return Offer(arrays, metrics, notes, made, flaw)


def _payloads(arrays: ArrayRecord, known: Collection[str]) -> None:
    """Check arrays for peers: names, types, and that their bytes are what they are said to be."""
    for name, array in arrays.items():
        if not ARRAY_NAME.fullmatch(name) or name.partition("/")[0] not in known:
            raise InvalidReply(f"it offers {_shown(name)}, which nobody expects")
        if array.dtype not in NUMBERS:
            raise InvalidReply(
                f"{name} is {_shown(array.dtype)}; allowed: {', '.join(sorted(NUMBERS))}"
            )
        _whole(name, array, array.dtype, tuple(array.shape))


@_border
def read_card(content: RecordDict) -> SiteCard:
    """Read a site's card: who it is and what it holds.

    Raises:
        InvalidReply: it cannot be used.
    """
    [record] = _records(content, **{CONFIG: ConfigRecord})
    return _part(SiteCard, record)


def write_card(card: SiteCard) -> RecordDict:
    """The content of a reply with a site's card."""
    return RecordDict({CONFIG: ConfigRecord(card.named())})
