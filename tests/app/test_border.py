"""Whatever a site answers, the run goes on without it, as if it had said that it failed.

Generated answers: honest ones changed in one to three places. ``BORDER_CASES=10000`` tries as many.
"""

import logging
import math
import os
from collections import defaultdict
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from configuration.config import Config, configuration
from tests.app.stubs import SITES, SMALL, Answer, Outcome, outcome

CASES = int(os.environ.get("BORDER_CASES", "300"))
BAD = 1  # the site whose answers are changed
RUNS: dict[str, dict[str, Any]] = {
    "co-learning": {},
    "scaffold": {},
    "local": {},
    "ensemble": {},
    "Krum": {},
    "FedMedian": {},
    "FedAdam": {},
    "FedAvgM": {},
    "FedTrimmedAvg": {},
    "gsgm": {"gsgm": {"schedule": "list"}},
    "gsgm, refill": {"strategy": "gsgm", "gsgm": {"schedule": "refill"}},
    "gsgm, local": {"strategy": "gsgm", "gsgm": {"schedule": "local", "base": "adam"}},
    "dc-asgd-a": {},
    "fedasync": {},
    "fedbuff": {"fedbuff": {"buffer_size": 2}},
    "d-psgd": {},
    "n-saddle": {},
    "co-learning, qsgd": {"wire": {"codec": "qsgd"}},
    "scaffold, bf16": {"wire": {"down_codec": "bf16"}},
    "FedMedian, sign": {"wire": {"codec": "sign", "error_feedback": "deep-squeeze"}},
    "fedbuff, top-k": {"wire": {"codec": "top-k", "error_feedback": "deep-squeeze"}},
    "co-learning, median": {"robust": {"mean": "median"}},
    "scaffold, krum": {"robust": {"mean": "krum"}},
    "FedAdam, krum": {"robust": {"mean": "krum"}},
    "fedbuff, trimmed": {"robust": {"mean": "trimmed-mean"}},
    "gsgm, median": {"robust": {"mean": "median"}},
    "d-psgd, clipped": {"robust": {"mean": "clipped"}},
    "dmsgd, sealed": {"strategy": "dmsgd", "wire": {"sealing": "trust-on-first-use"}},
}


@cache
def config_of_run(name: str) -> Config:
    return configuration(**SMALL | {"strategy": name.partition(",")[0]} | RUNS[name])


def changed(name: str, kind: str, at: int, answer: Answer) -> Outcome:
    """A run in which the bad site's answer number ``at`` of a kind is another."""
    count = 0

    def spoil(site: int, message: Message, content: RecordDict) -> Answer:
        nonlocal count
        if site != BAD or message.metadata.message_type != kind:
            return content
        count += 1
        return answer if count - 1 == at else content

    return outcome(config_of_run(name), spoil)


@cache
def failing(name: str, kind: str, at: int) -> Outcome:
    """A run in which the site says that it failed."""
    return changed(name, kind, at, Error(2, "ValueError: boom"))


@cache
def answers(name: str) -> dict[str, list[RecordDict]]:
    """What the site answers in a run in which nothing goes wrong, by kind."""
    found: dict[str, list[RecordDict]] = defaultdict(list)

    def collect(site: int, message: Message, content: RecordDict) -> Answer:
        if site == BAD:
            found[message.metadata.message_type].append(content)
        return content

    assert outcome(config_of_run(name), collect).error is None
    return found


# --- changes --------------------------------------------------------------------------------------

TEXTS = [
    "",
    "[/]",
    "[/foo]",
    "$x_$",
    r"$\foo$",
    "=cmd|' /C calc'!A0",
    "\x1b[31m",
    "a\nb",
    "x" * 10**5,
    "\u202e",
    "\0",
    "Bern",
]
NUMBERS: list[Any] = [
    0,
    -1,
    1,
    3,
    10**9,
    10**15,
    2**63 - 1,
    0.5,
    -0.5,
    1e300,
    1e-300,
    float("nan"),
    float("inf"),
    float("-inf"),
]
LISTS: list[Any] = [[], [1], [-1], [0.5], [float("nan")], [2**40] * 3, list(range(2000))]
METRICS = st.sampled_from([1, 3, 4, 8, 9, *NUMBERS, *LISTS])
VALUES = st.sampled_from(
    [
        *NUMBERS,
        *LISTS,
        *TEXTS,
        True,
        False,
        b"",
        b"\0" * 32,
        ["a"],
        ["a"] * 101,
        ["", "\n"],
        [b"x"],
        [True],
    ]
)
DTYPES = [
    "f4",
    "f8",
    "f2",
    ">f4",
    "i1",
    "i4",
    "i8",
    "u1",
    "u2",
    "u8",
    "c8",
    "c16",
    "?",
    "O",
    "U4",
    "S4",
    "M8[s]",
    "m8[s]",
    "V3",
]


@st.composite
def arrays(draw: st.DrawFn, like: Array | None) -> Array:
    """Any array, or one that is not what it is said to be."""
    if like is not None and draw(st.booleans()):
        return draw(near(like))
    shape = draw(
        st.sampled_from([(14,), (4,), (14, 1)]) | st.lists(st.integers(0, 5), max_size=3).map(tuple)
    )
    kind = draw(st.sampled_from([*DTYPES, "record"]))
    values = np.zeros(shape, dtype=[("a", "<f4"), ("b", "<i2")] if kind == "record" else kind)
    stream = BytesIO()
    np.save(stream, np.asfortranarray(values) if draw(st.booleans()) else values, allow_pickle=True)
    dtype = draw(st.sampled_from([str(values.dtype), "float32", "bfloat16", "", "float32\n"]))
    claimed = draw(st.sampled_from([shape, (14,), (), (-1,), (10**12,)]))
    stype = draw(st.sampled_from(["numpy.ndarray"] * 5 + ["torch.Tensor", ""]))
    return Array(dtype, claimed, stype, stream.getvalue())


@st.composite
def near(draw: st.DrawFn, like: Array) -> Array:
    """An honest array with a few bytes or numbers changed."""
    data = bytearray(like.data)
    what = draw(
        st.sampled_from(["cut", "longer", "header", "number", "numbers", "numbers", "random"])
    )
    if what == "cut":
        del data[draw(st.integers(0, max(0, len(data) - 1))) :]
    elif what == "longer":
        data += draw(st.binary(min_size=1, max_size=9))
    elif what == "header" and data:
        data[draw(st.integers(0, min(127, len(data) - 1)))] ^= draw(st.integers(1, 255))
    elif what == "random":
        data = bytearray(draw(st.binary(max_size=300)))
    elif like.dtype == "float32" and len(data) > 132:
        values = [math.nan, math.inf, 5e6, -1e30] if what == "number" else [4e6, -1e5]
        value = np.float32(draw(st.sampled_from(values))).tobytes()
        for place in range(128, 132 if what == "number" else len(data) - 3, 4):
            data[place : place + 4] = value
    return Array(like.dtype, tuple(like.shape), like.stype, bytes(data))


NAMES = st.sampled_from(
    [
        "x",
        "stats",
        "loss",
        "weight",
        "model",
        "arrays",
        "config",
        "metrics",
        "offer/0.values",
        "to-9/key",
        "",
        "é",
    ]
)


def change_record(draw: st.DrawFn, record: Any) -> None:
    """Leave out, add or replace something in a record."""
    names, what = list(record), draw(st.sampled_from(["set", "set", "set", "drop", "add"]))
    if what == "drop" and names:
        del record[draw(st.sampled_from(names))]
        return
    name = draw(NAMES if what == "add" or not names else st.sampled_from(names))
    if isinstance(record, ArrayRecord):
        record[name] = draw(arrays(record.get(name)))
    else:
        record[name] = draw(METRICS if isinstance(record, MetricRecord) else VALUES)


def change_content(draw: st.DrawFn, content: RecordDict) -> None:
    """Leave out, add or replace a record, or something in one."""
    what, names = (
        draw(st.sampled_from(["in", "in", "in", "in", "in", "in", "drop", "add", "replace"])),
        list(content),
    )
    if what == "in":
        if names:
            change_record(draw, content[draw(st.sampled_from(names))])
        return
    if what == "drop":
        if names:
            del content[draw(st.sampled_from(names))]
        return
    name = draw(NAMES if what == "add" or not names else st.sampled_from(names))
    content.pop(name, None)  # else Flower says that it is replaced
    other: list[Any] = [ArrayRecord(), MetricRecord({"a": 1}), ConfigRecord({"a": 1})]
    content[name] = draw(st.sampled_from(other))


def copied(content: RecordDict) -> RecordDict:
    return RecordDict({name: type(record)(dict(record)) for name, record in content.items()})  # type: ignore[arg-type]


# --- an opinion of its own on what cannot be taken ------------------------------------------------


def bad_number(key: str, value: Any, honest: Any) -> bool:
    if type(value) not in (int, float) or not math.isfinite(value) or not 0 <= value <= 1e30:
        return True
    if "examples" in key or key == "samples":
        return type(value) is not int or (key != "samples" and value != honest)
    return "accuracy" in key and value > 1


def bad_array(array: Array, honest: Array | None) -> bool:
    """Not what it is said to be; or, of a model, of another kind, not finite or far away."""
    try:
        stream = BytesIO(array.data)
        values = np.load(stream, allow_pickle=False)
        wrong = stream.read(1) != b"" or (values.dtype.name, values.shape) != (
            array.dtype,
            tuple(array.shape),
        )
        wrong |= (
            array.stype != "numpy.ndarray"
            or values.dtype.byteorder == ">"
            or not values.flags.c_contiguous
        )
    except Exception:
        return True
    if wrong or honest is None:
        return wrong or values.dtype.kind not in "fiu"
    if (array.dtype, tuple(array.shape)) != (honest.dtype, tuple(honest.shape)):
        return True
    return not bool((np.abs(values - np.load(BytesIO(honest.data))) < 1e3).all())


def bad_arrays(kind: str, record: ArrayRecord, honest: ArrayRecord) -> bool:
    if kind == "train":
        return set(record) != set(honest) or any(
            bad_array(record[name], honest[name]) for name in honest
        )
    return not set(record) <= {*honest, "offer/0.values"} or any(
        bad_array(array, None) for array in record.values()
    )


def bad_metrics(kind: str, record: MetricRecord, honest: MetricRecord) -> bool:
    missing, more = set(honest) - set(record), set(record) - set(honest)
    may_be_left_out = {
        "loss",
        "accuracy",
        "accuracy-vote",
        "accuracy-single",
        "test-loss",
        "test-accuracy",
        "disagreement",
    }
    may_be_left_out |= {"lr-first", "lr-last"} if kind.startswith("train.") else set()
    may_be_there = (
        {"loss", "lr-first", "lr-last", "disagreement"} if kind.startswith("train.") else set()
    )
    return (
        not missing <= may_be_left_out
        or not more <= may_be_there
        or any(bad_number(key, value, honest.get(key)) for key, value in record.items())
    )


def bad_notes(record: ConfigRecord, honest: ConfigRecord) -> bool:
    if set(record) != set(honest):
        return True
    lists = {"refused": str, "broken": int}
    whole = all(
        isinstance(found := record[key], list) and all(type(each) is kind for each in found)
        for key, kind in lists.items()
    )
    return not whole or not all(type(record[key]) is bool for key in ("reset", "lost"))


def bad_counts(card: dict[str, Any]) -> bool:
    return (
        len(card["counts"]) != len(card["classes"])
        or any(type(count) is not int or count < 0 for count in card["counts"])
        or sum(card["counts"]) != card["train"] + card["test"]
    )


def bad_card(record: ConfigRecord, honest: ConfigRecord) -> bool:
    if {*record, "counts"} != set(honest) or any(
        type(record[key]) is not type(honest[key]) for key in record
    ):
        return True
    card: dict[str, Any] = {"counts": None, **record}
    texts = [card["name"], *card["classes"]]
    return (
        not all(
            isinstance(text, str) and 0 < len(text) <= 64 and text.isprintable() for text in texts
        )
        or not all(1 <= card[key] <= 10**12 for key in ("train", "test"))
        or card["code"] != honest["code"]
        or card["shape"] != honest["shape"]
        or (card["counts"] is not None and bad_counts(card))
    )


def cannot_be_taken(kind: str, answer: RecordDict, honest: RecordDict) -> bool:
    """Whether an answer must be refused whole.

    A peer's last model, and what was tested before it trained, are another matter.
    """
    names = [name for name in honest if name not in ("model", "test")]
    if set(answer) - {"model", "test"} != set(names) or any(
        type(answer[name]) is not type(honest[name]) for name in names
    ):
        return True
    if any(name in answer and name not in honest for name in ("model", "test")):
        return True
    found = False
    for name in names:
        record: Any = answer[name]
        usual: Any = honest[name]
        if isinstance(usual, ArrayRecord):
            found |= bad_arrays(kind, record, usual)
        elif isinstance(usual, MetricRecord):
            found |= bad_metrics(kind, record, usual)
        else:
            found |= (bad_card if kind == "query.site" else bad_notes)(record, usual)
    return found


# --- what must hold -------------------------------------------------------------------------------


class Listening(logging.Handler):
    """A handler that collects what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture(scope="module")
def listening() -> Any:
    listening, logger = Listening(), logging.getLogger("flwr")
    logger.addHandler(listening)
    yield listening
    logger.removeHandler(listening)


def check_named(lines: list[str], refused: bool) -> None:
    """What is refused is logged in a short printable line that names the site and a cause."""
    for line in lines:
        assert line.isprintable()
        assert len(line) < 700
    if refused:
        named = [line for line in lines if "site 1" in line or "node 1001" in line]
        assert any(len(line.partition(": ")[2]) > 10 for line in named), lines


@settings(
    max_examples=CASES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(st.data())
def test_run_goes_on_as_if_the_site_had_failed(listening: Listening, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(RUNS)))
    kind = data.draw(st.sampled_from(sorted(answers(name))))
    at = data.draw(st.integers(0, len(answers(name)[kind]) - 1))
    answer = copied(answers(name)[kind][at])
    for _ in range(data.draw(st.integers(1, 3))):
        change_content(data.draw, answer)  # type: ignore[arg-type]
    listening.lines.clear()
    found = changed(name, kind, at, answer)
    must = cannot_be_taken(kind, answer, answers(name)[kind][at])
    refused = bool(found.refused) or BAD not in [site.number for site in found.federation.sites]
    event("refused" if refused else "taken")
    assert refused or not must
    lines = list(listening.lines)
    if kind == "query.site":
        check_discovery(found, name, answer, lines)
        return
    assert found.error is None, found.error
    of_model = [event for event in found.refused if event.phase == "mean of the models"]
    check_named(lines, refused=bool(found.refused))
    assert {event.site.number for event in found.refused} <= {BAD}
    assert len(found.refused) <= 1
    assert {event.by for event in found.refused_by} <= {f"site {BAD}"}
    of_test = [event for event in found.refused if event.phase == "test"]
    if kind == "train" and of_test:  # costs no more than the test
        assert found.model() == changed(name, kind, at, answers(name)[kind][at]).model()
    elif found.refused and not of_model:
        assert found.model() == failing(name, kind, at).model()
    elif of_model:
        assert np.isnan(found.model_of(BAD)).all()


def check_discovery(found: Outcome, name: str, answer: RecordDict, lines: list[str]) -> None:
    """The site is left out, or what it says is possible.

    Or it gives itself the number of another site, and neither of the two is believed.
    """
    assert found.error is None, found.error
    numbers = [site.number for site in found.federation.sites]
    check_named(lines, refused=BAD not in numbers)
    if len(numbers) == SITES - 1 and BAD not in numbers:
        assert found.model() == failing(name, "query.site", 0).model()
    elif len(numbers) < SITES:
        assert answer["config"]["site"] not in numbers


def test_made_up_sites_run_every_driver() -> None:
    """The runs above would go on even if every honest answer were wrong and left out."""
    for name in RUNS:
        found = outcome(config_of_run(name))
        assert found.error is None
        assert found.refused == []
        assert set(found.metrics["site"]) >= {"0", "1", "2", "3", "4"}
