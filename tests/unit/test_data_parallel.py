"""Two processes, each with its part of a batch, over gloo."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F

from client_app.training import Gradient, data_parallel, plain, sharpness_aware
from models.flat import FlatModel

pytestmark = pytest.mark.slow
X = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (7,), generator=torch.Generator().manual_seed(2))


def network(norm: str) -> FlatModel:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layer = nn.BatchNorm1d(8) if norm == "batch" else nn.LayerNorm(8)
        return FlatModel(nn.Sequential(nn.Linear(6, 8), layer, nn.ReLU(), nn.Linear(8, 3)))


def gradient_of(model: FlatModel) -> Gradient:
    return plain(model, lambda each: F.cross_entropy(model.network(each[0]), each[1]))


def work(rank: int, folder: str, count: int) -> None:
    """A process: the gradients of batches, with and without BatchNorm.

    Of fewer examples than processes, too.
    """
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count
    )
    found = {}
    for norm, rho, examples in (
        ("layer", 0.0, 7),
        ("layer", 0.1, 7),
        ("layer", 0.0, 1),
        ("batch", 0.1, 7),
    ):
        model = network(norm)
        gradient = sharpness_aware(
            data_parallel(gradient_of(model), rank, count, model.statistics), rho
        )
        loss, g = gradient(model.x, (X[:examples], Y[:examples]))
        found[norm, rho, examples] = (loss.clone(), g.clone(), model.stats)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_parts_are_as_the_whole(tmp_path: Path) -> None:
    spawn(work, (str(tmp_path), 2), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for (norm, rho, examples), (loss, g, stats) in first.items():
        assert all(
            torch.equal(a, b)
            for a, b in zip((loss, g, stats), second[norm, rho, examples], strict=True)
        )
        if norm == "layer":
            model = network(norm)
            whole = sharpness_aware(gradient_of(model), rho)(model.x, (X[:examples], Y[:examples]))
            torch.testing.assert_close((loss, g), whole, rtol=0, atol=1e-6)
    halves = []
    for part in (slice(0, 4), slice(4, 7)):
        model = network("batch")
        gradient_of(model)(model.x, (X[part], Y[part]))
        halves.append(model.stats)
    torch.testing.assert_close(
        first["batch", 0.1, 7][2], halves[0] * 4 / 7 + halves[1] * 3 / 7, rtol=0, atol=1e-6
    )
