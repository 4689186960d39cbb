"""Vectors on the wire."""

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from strategies.records import X, num_bytes, pack, unpack
from tests.conftest import RunApp


def test_vector_survives_bit_for_bit() -> None:
    x = torch.tensor([0.0, -0.0, 1e-45, 3.4e38, float("nan"), 0.1])
    assert torch.equal(unpack(pack({X: x})[X]).view(torch.int32), x.view(torch.int32))


def test_matrix_survives() -> None:
    x = torch.randn(3, 5)
    assert torch.equal(unpack(pack({X: x})[X]), x)


def test_unpack_shares_the_message_memory() -> None:
    array = pack({X: torch.randn(100)})[X]
    assert unpack(array).data_ptr() == unpack(array).data_ptr()


def test_unpack_agrees_with_flower() -> None:
    array = pack({X: torch.randn(7, 3)})[X]
    assert (unpack(array).numpy() == array.numpy()).all()


@pytest.mark.parametrize("shape", [(7, 3), (1,), (5,)])
def test_pack_makes_what_flower_makes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert pack({X: x})[X] == Array(x.numpy())
    assert pack({X: x[:, None].mT})[X].numpy().tolist() == x[:, None].mT.tolist()  # not contiguous


def test_empty_vectors_are_left_out() -> None:
    assert list(pack({"x": torch.ones(2), "stats": torch.empty(0)})) == ["x"]


def test_garbage_is_an_error() -> None:
    with pytest.raises(ValueError, match="magic string"):
        unpack(Array("float32", (2,), "numpy.ndarray", b"not an array"))


def test_bytes_are_those_of_the_records(run_app: RunApp) -> None:
    run_app(epochs=1)  # gives this process a run to make messages in
    arrays, metrics, config = (
        pack({X: torch.zeros(1000)}),
        MetricRecord({"loss": 1.0}),
        ConfigRecord({"a": "b" * 50}),
    )
    message = Message(
        RecordDict({"arrays": arrays, "metrics": metrics, "config": config}), 1, "train"
    )
    expected = len(arrays[X].data) + len(metrics.deflate()) + len(config.deflate())
    assert num_bytes(message) == expected
    assert 4000 < len(arrays[X].data) < 4200
    assert num_bytes(Message(RecordDict({"arrays": ArrayRecord()}), 1, "train")) == 0
