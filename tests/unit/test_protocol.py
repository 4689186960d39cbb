"""What crosses the wire: values survive the way.

What no site may send is refused in one short line.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from configuration.flower import TaskIdentity
from strategies.method import LocalTraining
from strategies.protocol import (
    Agreed,
    InvalidReply,
    Layout,
    Order,
    PeerOrder,
    SiteCard,
    Started,
    StepMetrics,
    StepNotes,
    TestMetrics,
    TrainMetrics,
    printable,
    read_card,
    read_offer,
    read_order,
    read_peer_order,
    read_tested,
    read_trained,
    write_card,
    write_order,
    write_peer_order,
    write_tested,
    write_trained,
)
from strategies.records import pack

SIZE, STATS = 6, 4
LAYOUT = Layout({"x": SIZE, "stats": STATS}, torch.tensor([False, False, True, True]))
MODEL = {"x": torch.arange(SIZE) / 4, "stats": torch.ones(STATS)}
SENT = {"x": torch.zeros(SIZE), "stats": torch.zeros(STATS)}
TRAINED = TrainMetrics(loss=0.5, lr_first=0.1, lr_last=0.05, num_examples=7, samples=14)
TESTED = TestMetrics(loss=0.5, accuracy=0.25, num_examples=3)
CARD = SiteCard(
    site=1,
    sites=3,
    name="Bern",
    classes=["a", "b"],
    columns=[],
    shape=[1, 8, 8],
    train=7,
    test=3,
    notes=[],
    code="x",
    counts=[4, 6],
)
TABLE = CARD.model_copy(
    update={
        "columns": ["age"],
        "shape": [1],
        "known": [7.0],
        "mean": [0.5],
        "variance": [0.1],
        "counts": None,
    }
)
PEER = PeerOrder(3, Agreed(("a", "b")), {0: 0.25, 2: 0.25}, True, False, False, False, 0.5)


def reply_with(content: RecordDict | Error) -> Message:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    return Message(content, reply_to=Message(RecordDict(), 1001, "train"))


def trained(content: RecordDict) -> Any:
    return read_trained(reply_with(content), LAYOUT, 7, SENT)


def with_x(array: Array) -> RecordDict:
    content = write_trained(MODEL, TRAINED)
    content.array_records["arrays"]["x"] = array
    return content


def with_metric(key: str, value: Any) -> RecordDict:
    content = write_trained(MODEL, TRAINED)
    content.metric_records["metrics"][key] = value
    return content


def reason_invalid(read: Callable[[], Any], longest: int = 300) -> str:
    with pytest.raises(InvalidReply) as refused:
        read()
    text = str(refused.value)
    assert text.isprintable()
    assert len(text) <= longest
    return text


# --- what survives --------------------------------------------------------------------------------


def test_training_survives_and_is_measured() -> None:
    found = trained(write_trained(MODEL, TRAINED))
    assert found.metrics == TRAINED
    assert all(torch.equal(found.vectors[name], vector) for name, vector in MODEL.items())
    assert found.largest == 1.25
    assert found.change == pytest.approx({"x": float(MODEL["x"].norm()), "stats": 2.0})


def test_change_is_taken_from_what_was_sent() -> None:
    moved = {"x": MODEL["x"] + 3, "stats": MODEL["stats"]}
    found = read_trained(reply_with(write_trained(moved, TRAINED)), LAYOUT, 7, {"x": MODEL["x"]})
    assert found.change == pytest.approx({"x": 3 * SIZE**0.5, "stats": 2.0})


def test_test_and_card_survive() -> None:
    assert read_tested(reply_with(write_tested(TESTED)), 3) == TESTED
    assert read_card(reply_with(write_card(CARD))) == CARD
    assert read_card(reply_with(write_card(TABLE))) == TABLE
    assert TABLE.moments == ((7.0,), (0.5,), (0.1,))


numbers = st.floats(0, 1, allow_nan=False)
agreed = st.builds(
    Agreed,
    st.tuples(st.text(), st.text()),
    st.sampled_from([(), ((1.0, 2.0), (0.0, -1.0), (3.0, 1.0))]),
    st.none() | st.builds(Started, st.integers(0, 2**64 - 1), st.integers(0, 99)),
)
locals_ = st.builds(
    lambda lr, cycle, amount, proximal, *switches: LocalTraining(
        lr, cycle, amount.get("epochs", 0), amount.get("steps", 0), proximal, *switches
    ),
    numbers,
    st.tuples(numbers, numbers),
    st.builds(dict, epochs=st.integers(1, 9)) | st.builds(dict, steps=st.integers(1, 9)),
    numbers,
    *[st.booleans()] * 3,
)


@given(st.builds(Order, st.integers(0, 9), agreed, st.none() | locals_))
def test_orders_survive(order: Order) -> None:
    assert read_order(write_order(order)) == order


@given(
    st.builds(
        PeerOrder,
        st.integers(0, 9),
        agreed,
        st.dictionaries(st.integers(0, 9), numbers),
        *[st.booleans()] * 4,
        numbers,
        st.none() | st.lists(st.integers(0, 9)).map(tuple),
        *[
            st.dictionaries(st.integers(0, 9), st.binary(min_size=size, max_size=size))
            for size in (32, 16)
        ],
    )
)
def test_orders_to_peers_survive(order: PeerOrder) -> None:
    assert read_peer_order(write_peer_order(order)) == order


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (RecordDict(), "the reply holds the records [], ['arrays', 'metrics'] are expected"),
        (
            RecordDict({**write_trained(MODEL, TRAINED), "more": MetricRecord()}),
            "['arrays', 'metrics', 'more'], ",
        ),
        (
            RecordDict({"arrays": MetricRecord(), "metrics": MetricRecord()}),
            "arrays is MetricRecord, ArrayRecord is expected",
        ),
        (with_metric("loss", -1.0), "loss is -1.0: must be greater than or equal to 0"),
        (with_metric("loss", 1e300), "loss is 1e+300: must be less than or equal to 1000"),
        (with_metric("lr-first", float("inf")), "lr-first is inf: must be "),
        (with_metric("num-examples", 7.0), "num-examples is 7.0: must be a valid integer"),
        (with_metric("num-examples", 8), "num-examples is 8, at first the site said 7"),
        (
            with_metric("samples", list(range(99))),
            "samples is [0, 1, 2, 3, 4, 5, ...]: must be a valid integer",
        ),
        (with_metric("\nloss\x1b[31m", 1.0), r"'\nloss\x1b[31m' is unknown"),
        (RecordDict({"arrays": pack(MODEL), "metrics": MetricRecord()}), "lr-first is missing"),
        (
            write_trained({"x": MODEL["x"]}, TRAINED),
            "the reply holds the arrays ['x'], ['stats', 'x'] are expected",
        ),
        (
            write_trained(MODEL | {"y": MODEL["x"]}, TRAINED),
            "the reply holds the arrays ['stats', 'x', 'y'], ",
        ),
        (
            write_trained(MODEL | {"x": torch.zeros(2, 3)}, TRAINED),
            "x is 'float32' of shape (2, 3), float32 of shape (6,)",
        ),
        (
            write_trained(MODEL | {"x": torch.zeros(6).double()}, TRAINED),
            "x is 'float64' of shape (6,), float32 of shape (6,)",
        ),
        (
            write_trained(MODEL | {"x": torch.full((6,), 5e6)}, TRAINED),
            "the model diverged: it holds 5e+06",
        ),
        (
            write_trained(MODEL | {"stats": torch.full((4,), -5e6)}, TRAINED),
            "stats holds a variance below 0",
        ),
        (
            write_trained(MODEL | {"stats": torch.tensor([-1.0, 0, 0, -0.01])}, TRAINED),
            "stats holds a variance below 0",
        ),
        (
            write_trained(MODEL | {"stats": torch.tensor([-9e6, 0, 0, 0])}, TRAINED),
            "the model diverged: it holds 9e+06",
        ),
        (
            write_trained(MODEL | {"stats": torch.full((4,), torch.nan)}, TRAINED),
            "the model holds NaN or infinite values",
        ),
    ],
)
def test_training_that_is_refused(content: RecordDict, reason: str) -> None:
    assert reason in reason_invalid(lambda: trained(content))


def test_mean_below_zero_is_no_variance() -> None:
    assert trained(write_trained(MODEL | {"stats": torch.tensor([-1.0, -2.0, 0, 0])}, TRAINED))


ODD = [
    np.arange(6),
    np.arange(6, dtype=np.float64),
    np.arange(6, dtype=">f4"),
    np.arange(6, dtype=np.float16),
    np.arange(6, dtype=np.uint16),
    np.arange(6, dtype=np.complex64),
    np.zeros(6, dtype=bool),
    np.zeros(6, dtype="datetime64[s]"),
    np.zeros(6, dtype="<U4"),
    np.zeros(6, dtype=[("a", "<f4")]),
    np.asfortranarray(np.zeros((2, 3), np.float32)),
    np.zeros((), np.float32),
    np.zeros(0, np.float32),
]


@pytest.mark.parametrize("data", ODD, ids=lambda data: f"{data.dtype.str}{data.shape}")
def test_bytes_are_what_they_are_said_to_be(data: Any) -> None:
    array = Array("float32", (SIZE,), "numpy.ndarray", Array(data).data)
    assert reason_invalid(lambda: trained(with_x(array))).endswith(
        " bytes that are not float32 of shape (6,)"
    )


def test_data_of_another_length_or_kind_are_refused() -> None:
    whole = Array(np.zeros(SIZE, np.float32))
    for data in (
        whole.data[:-1],
        whole.data + b"\0",
        b"",
        b"\x93NUMPY",
        whole.data.replace(b"(6,)", b"((("),
    ):
        assert "bytes that are not" in reason_invalid(
            partial(trained, with_x(Array("float32", (SIZE,), "numpy.ndarray", data)))
        )
    assert "x is a 'torch.Tensor'" in reason_invalid(
        lambda: trained(with_x(Array("float32", (SIZE,), "torch.Tensor", whole.data)))
    )


def test_what_goes_wrong_while_reading_is_an_invalid_reply() -> None:
    strange: Any = Array("float32", (SIZE,), "numpy.ndarray", b"")
    strange.data = None
    assert reason_invalid(lambda: trained(with_x(strange))).startswith("cannot be read: TypeError")


def test_error_of_a_site_is_one_short_printable_line() -> None:
    reason = reason_invalid(
        lambda: trained_error("Traceback\n  File x\nValueError: boom \x1b[31m" + "x" * 10**6), 500
    )
    assert reason.startswith("ValueError: boom ?[31mxxx")
    assert reason_invalid(lambda: trained_error("")) == "no reason given"


def trained_error(reason: str) -> Any:
    return read_trained(reply_with(Error(2, reason)), LAYOUT, 7, SENT)


@pytest.mark.parametrize(
    ("changes", "models", "reason"),
    [
        ({"accuracy": 1.5}, 1, "accuracy is 1.5: must be less than or equal to 1"),
        ({"accuracy": float("nan")}, 1, "accuracy is nan: must be a finite number"),
        ({"num-examples": 4}, 1, "num-examples is 4, at first the site said 3"),
        (
            {"accuracy-vote": 0.5, "accuracy-single": 0.5},
            1,
            "belong to a test of several models, this one is of 1",
        ),
    ],
)
def test_test_that_is_refused(changes: dict[str, Any], models: int, reason: str) -> None:
    content = RecordDict({"metrics": MetricRecord(TESTED.named() | changes)})
    assert reason in reason_invalid(lambda: read_tested(reply_with(content), 3, models))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"site": -1}, "site is -1: must be greater than or equal to 0"),
        ({"train": 0}, "train is 0: must be greater than or equal to 1"),
        (
            {"train": 10**15},
            "train is 1000000000000000: must be less than or equal to 1000000000000",
        ),
        ({"test": -3}, "test is -3"),
        ({"train": True}, "train is True: must be a valid integer"),
        ({"name": "x" * 10**5}, "name is 'xxxxxxxx"),
        ({"name": ""}, "name is ''"),
        ({"name": "a\nb"}, r"name is 'a\nb': must be printable"),
        ({"name": "\x1b[31m"}, "must be printable"),
        ({"classes": []}, "classes is []"),
        (
            {"classes": [str(n) for n in range(101)]},
            "classes is ['0', '1', '2', '3', '4', '5', ...]",
        ),
        ({"classes": ["x" * 65, "b"]}, "classes.0 is 'xxx"),
        ({"classes": ["a", "a"]}, "classes must differ"),
        ({"shape": []}, "shape is []"),
        ({"shape": [1, 0]}, "shape.1 is 0"),
        ({"shape": [2**30]}, "shape.0 is 1073741824"),
        ({"counts": [4, 7]}, "counts must be those of the classes, train + test in all"),
        ({"counts": [11, -1]}, "counts.1 is -1"),
        ({"counts": [10]}, "counts must be those of the classes"),
        (
            {"known": [1.0], "mean": [1.0], "variance": [1.0]},
            "known, mean and variance must be those of the columns",
        ),
        (
            {"columns": ["age"], "shape": [1]},
            "known, mean and variance must be those of the columns",
        ),
        ({"public-key": b"short"}, "public-key is b'short'"),
        ({"nonce": b"short"}, "nonce is b'short'"),
        ({"nonce": 16}, "nonce is 16: must be a valid bytes"),
        ({"columns": ["a\nb"]}, r"columns.0 is 'a\nb': must be printable"),
        ({"more": 1}, "'more' is unknown"),
    ],
)
def test_card_that_is_refused(changes: dict[str, Any], reason: str) -> None:
    assert reason in reason_invalid(
        lambda: read_card(reply_with(RecordDict({"config": ConfigRecord(CARD.named() | changes)})))
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mean": [float("nan")]}, "mean.0 is nan"),
        ({"variance": [-1.0]}, "variance.0 is -1.0"),
        ({"variance": [1.0, 1.0]}, "known, mean and variance go together"),
        ({"shape": [2]}, "shape must be that of the columns"),
    ],
)
def test_card_of_a_table_that_is_refused(changes: dict[str, Any], reason: str) -> None:
    assert reason in reason_invalid(
        lambda: read_card(reply_with(RecordDict({"config": ConfigRecord(TABLE.named() | changes)})))
    )


STEP = StepMetrics(
    num_examples=7,
    samples=14,
    loss=1.0,
    lr_first=0.1,
    lr_last=0.1,
    test_loss=1.0,
    test_accuracy=0.5,
    test_examples=3,
)
NOTES = StepNotes(refused=[], broken=[2], reset=False, lost=False)
SEALED = PEER._replace(listeners=(2,))


def offered(
    arrays: dict[str, Array] | None = None,
    metrics: dict[str, Any] | None = None,
    notes: dict[str, Any] | None = None,
    order: PeerOrder = PEER,
    model: ArrayRecord | None = None,
) -> Any:
    found = {
        "offer/0.values": Array(np.zeros(9, np.float32)),
        "to-2/key": Array(np.zeros(5, np.uint8)),
    }
    content = RecordDict(
        {
            "arrays": ArrayRecord(found if arrays is None else arrays),
            "metrics": MetricRecord(STEP.named() | (metrics or {})),
            "config": ConfigRecord(NOTES.named() | (notes or {})),
        }
    )
    if model is not None:
        content["model"] = model
    return read_offer(reply_with(content), order, LAYOUT, 7, 3, {0, 1, 2}, model is not None)


def test_offer_tells_a_nonce_where_it_is_sealed() -> None:
    assert (
        offered(order=SEALED, notes={"nonce": b"0123456789abcdef"}).notes.nonce
        == b"0123456789abcdef"
    )


def test_offer_survives() -> None:
    found = offered()
    assert (found.metrics, found.notes) == (STEP, NOTES)
    assert sorted(found.arrays) == ["offer/0.values", "to-2/key"]
    assert (found.model, found.flaw) == (None, "")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"arrays": {"to-7/key": Array(np.zeros(5, np.uint8))}},
            "it offers 'to-7/key', which nobody expects",
        ),
        (
            {"arrays": {"offer": Array(np.zeros(5, np.uint8))}},
            "it offers 'offer', which nobody expects",
        ),
        ({"arrays": {"offer/../x": Array(np.zeros(5, np.uint8))}}, "it offers 'offer/../x'"),
        (
            {"arrays": {"offer/values": Array(np.zeros(5, complex))}},
            "offer/values is 'complex128'; allowed: float16",
        ),
        (
            {"arrays": {"offer/values": Array("float32", (9,), "numpy.ndarray", b"zzz")}},
            "offer/values holds 3 bytes",
        ),
        (
            {"arrays": {"offer/values": Array("float32", (10**18,), "numpy.ndarray", b"")}},
            "offer/values holds 0 bytes",
        ),
        ({"order": PEER._replace(last=True)}, "it offers 'offer/0.values'"),
        ({"order": PEER._replace(test=False)}, "it reports a test"),
        ({"metrics": {"test-examples": 4}}, "test-examples is 4, at first the site said 3"),
        ({"metrics": {"test-accuracy": 2.0}}, "test-accuracy is 2.0"),
        ({"metrics": {"disagreement": float("nan")}}, "disagreement is nan"),
        ({"notes": {"refused": 5}}, "refused is 5: must be a valid list"),
        ({"notes": {"broken": True}}, "broken is True: must be a valid list"),
        ({"notes": {"broken": [3]}}, "broken names [3], no neighbours of it"),
        ({"notes": {"reset": 1}}, "reset is 1: must be a valid boolean"),
        ({"notes": {"more": 1}}, "'more' is unknown"),
        ({"notes": {"nonce": bytes(16)}}, "it tells a nonce, and nothing is sealed"),
        ({"order": SEALED}, "it tells no nonce"),
        ({"order": SEALED, "notes": {"nonce": bytes(17)}}, "nonce is b'\\x00"),
        (
            {"order": SEALED, "notes": {"nonce": "0" * 16}},
            "nonce is '0000000000000000': must be a valid bytes",
        ),
    ],
)
def test_offer_that_is_refused(changes: dict[str, Any], reason: str) -> None:
    assert reason in reason_invalid(lambda: offered(**changes))


@pytest.mark.parametrize("left_out", ["lr-first", "lr-last", "test-examples"])
def test_what_belongs_together_comes_together(left_out: str) -> None:
    metrics = {key: value for key, value in STEP.named().items() if key != left_out}
    content = RecordDict(
        {
            "arrays": ArrayRecord(),
            "metrics": MetricRecord(metrics),
            "config": ConfigRecord(NOTES.named()),
        }
    )
    reason = reason_invalid(lambda: read_offer(reply_with(content), PEER, LAYOUT, 7, 3, {0}, False))
    assert "go together" in reason or "goes with test-examples" in reason


def test_test_beside_training_is_read_by_itself() -> None:
    content = write_trained(MODEL, TRAINED, TESTED)
    assert read_trained(reply_with(content), LAYOUT, 7, {}, True).metrics == TRAINED
    assert read_tested(reply_with(content), 3, beside=True) == TESTED
    assert "records" in reason_invalid(lambda: read_trained(reply_with(content), LAYOUT, 7, {}))
    assert "records" in reason_invalid(
        lambda: read_tested(reply_with(write_trained(MODEL, TRAINED)), 3, beside=True)
    )


@pytest.mark.parametrize("kept", ["loss", "accuracy"])
def test_site_may_keep_a_metric_to_itself(kept: str) -> None:
    metrics = {key: value for key, value in TESTED.named().items() if key != kept}
    found = read_tested(reply_with(RecordDict({"metrics": MetricRecord(metrics)})), 3)
    assert found.named() == metrics


def test_flaw_in_the_last_model_costs_the_model_only() -> None:
    found = offered(model=pack(MODEL))
    assert found.flaw == ""
    assert all(torch.equal(found.model[name], vector) for name, vector in MODEL.items())
    for wrong, flaw in (
        (pack({"x": MODEL["x"]}), "the reply holds the arrays ['x']"),
        (pack(MODEL | {"x": MODEL["x"] * torch.nan}), "the model holds NaN"),
        (ArrayRecord(), "the reply holds the arrays []"),
    ):
        found = offered(model=wrong)
        assert flaw in found.flaw
        assert found.model is None
        assert found.metrics == STEP


def test_model_that_nobody_asked_for_is_refused() -> None:
    content = RecordDict(
        {
            "arrays": ArrayRecord(),
            "metrics": MetricRecord(STEP.named()),
            "config": ConfigRecord(NOTES.named()),
            "model": pack(MODEL),
        }
    )
    assert "the records" in reason_invalid(
        lambda: read_offer(reply_with(content), PEER, LAYOUT, 7, 3, {0}, False)
    )


def test_text_of_a_site_is_shortened_to_one_printable_line() -> None:
    assert printable("a\nb\x1b[31m\u202e") == "a?b?[31m?"
    assert printable("x" * 100, 10) == "xxxxxxxxx…"
    assert printable("x" * 10, 10) == "x" * 10


def test_means_of_a_task_of_ones_own_may_be_below_0() -> None:
    metrics = TestMetrics(loss=1.0, means=[-0.5], num_examples=4)
    assert read_tested(reply_with(write_tested(metrics)), 4, means=1) == metrics
