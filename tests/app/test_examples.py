"""Methods, partitions, codecs and topologies of one's own.

Those of ``examples/`` do in a run what they say.
"""

from pkgutil import resolve_name
from typing import Any

import numpy as np
import pytest
import torch

from models.flat import FlatModel
from models.networks import build
from simulation.laboratory import Run, simulate
from strategies.codecs import codec
from strategies.randomness import derive
from strategies.topology import TopologyError
from tests.conftest import ROOT

SMALL: dict[str, Any] = {"num_sites": 4, "epochs": 1, "model": {"name": "mlp"}, "progress": False}
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def whole(run: Run) -> torch.Tensor:
    """Its model as one vector."""
    return torch.cat([each.flatten() for each in run.model.values()])


def initial(run: Run) -> torch.Tensor:
    """What it started from."""
    return FlatModel(build("mlp", (1, 8, 8), 10, derive(run.config.seed, "model"))).x


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_tested(path: Any) -> None:
    assert len(path.read_text().splitlines()) <= 40
    assert f"def test_{path.stem}_" in (ROOT / "tests/app/test_examples.py").read_text()


def test_my_method_goes_a_part_of_the_way_to_the_mean() -> None:
    fedavg = simulate(strategy="fedavg", fedavg={"local_epochs": 1}, **SMALL)
    own = {"strategy": "examples.my_method:METHOD", **SMALL}
    quarter = simulate(**own, my_method={"local_epochs": 1, "step": 0.25})
    torch.testing.assert_close(whole(quarter), initial(fedavg).lerp(whole(fedavg), 0.25))
    assert torch.equal(
        whole(simulate(**own, my_method={"local_epochs": 1, "step": 1.0})), whole(fedavg)
    )


def test_my_partition_gives_sizes_by_a_power_law_and_classes_by_chance() -> None:
    run = simulate(
        partition={"kind": "examples.my_partition:power_law"},
        co_learning={"local_epochs": 1},
        **SMALL,
    )
    sizes = (run.sites["train"] + run.sites["test"]).to_numpy()
    assert sizes.sum() == 1797
    np.testing.assert_allclose(sizes, 2 + (1797 - 8) * np.array([12, 6, 4, 3]) / 25, atol=1)
    shares = run.sites.iloc[:, 4:].div(sizes, axis=0)
    assert shares.to_numpy().min() > 0.05
    assert shares.to_numpy().max() < 0.16


def test_my_codec_sends_a_byte_a_number_and_rounds() -> None:
    peers: dict[str, Any] = {"strategy": "d-psgd", **SMALL}
    exact, coarse = (
        simulate(**peers, wire={"codec": name})
        for name in ("identity", "examples.my_codec:few_digits")
    )
    d = initial(exact).numel()
    exchanges = int(exact.history["round"].iloc[-1])
    sent = [float(run.metrics["bytes_up"].max()) for run in (exact, coarse)]
    # The models that peers offer; collected at the end, they are whole in both.
    messages = 4 * exchanges
    assert (sent[0] - sent[1]) / messages == pytest.approx(3 * d, rel=0.03)
    assert coarse.summary["loss"] == pytest.approx(exact.summary["loss"], rel=0.1)
    assert coarse.summary["loss"] != exact.summary["loss"]
    own, vector = (
        codec("examples.my_codec:few_digits", [d]),
        torch.randn(d, generator=torch.Generator().manual_seed(1)),
    )
    error = own.decode(own.encode(vector, torch.Generator())) - vector
    assert 0.3 < error.abs().max() / (vector.abs().max() / 127) <= 0.5001


def test_my_topology_links_cities() -> None:
    keys: dict[str, Any] = {
        "strategy": "d-psgd",
        **SMALL,
        "topology": {"name": "examples.my_topology:cities"},
    }
    run = simulate(**(keys | {"num_sites": 6}))
    links = run.metrics.query("split == 'links'")
    senders = [
        set(links[links["metric"] == f"bytes-to-{site}"]["site"].astype(int)) for site in range(6)
    ]
    assert senders == [{1, 2}, {0, 2}, {0, 1, 3}, {2, 4, 5}, {3, 5}, {3, 4}]
    with pytest.raises(
        TopologyError, match="num-sites = 5: 2 cities of equal size need a multiple of it"
    ):
        simulate(**(keys | {"num_sites": 5}))


def test_my_task_costs_less_the_nearer_the_grade_is() -> None:
    graded = simulate(**SMALL | {"epochs": 8}, training={"task": "examples.my_task:GRADES"})
    usual = simulate(**SMALL | {"epochs": 8})
    assert graded.headline == "grades-off"
    assert graded.summary["grades-off"] < 2  # by chance 3.3
    assert graded.summary["loss"] != usual.summary["loss"]
    grades, outputs = resolve_name("examples.my_task:GRADES"), torch.tensor([[0.0, 20.0, 0.0]])
    assert [float(grades.losses(outputs, torch.tensor([y]))) for y in (0, 1, 2)] == pytest.approx(
        [1, 0, 1], abs=1e-6
    )
