"""Two processes, each with its shard of every parameter, over gloo: what one process computes."""

import gc
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F

from client_app import sharded, training
from client_app.policy import SHARDS
from client_app.sharded import ShardedModel
from models.flat import FlatModel
from models.pretrained import freeze

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SHARDS, reason="torch is older than 2.15"),
]
GENERATOR = torch.Generator().manual_seed(1)
BATCHES = [
    (torch.randn(n, 7, generator=GENERATOR), torch.randint(0, 3, (n,), generator=GENERATOR))
    for n in (8, 7, 1, 5)
]

WIDTH = 300


class Case(NamedTuple):
    """The settings of a training."""

    optimizer: str = "sgd"
    rho: float = 0.0
    micro_batch: int = 0
    proximal: float = 0.0
    trainable: str = "*"
    tied: bool = False
    batch_norm: bool = False


CASES = {
    "plain": Case(),
    "sam": Case(rho=0.1),
    "adamw": Case("adamw", proximal=0.1),
    "micro-batch": Case(rho=0.1, micro_batch=2),
    "trainable": Case("adamw", trainable="3.* 5.bias"),
    "tied": Case(tied=True),
}


def network(case: Case, width: int = 9) -> nn.Module:
    """Parameters of 9, 7, 5 and 3 rows: no two processes have equally many."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        inner = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 5))
        found = nn.Sequential(
            nn.Linear(7, width),
            (nn.BatchNorm1d if case.batch_norm else nn.LayerNorm)(width),
            nn.ReLU(),
            inner,
            nn.ReLU(),
            nn.Linear(5, 3),
        )
        if case.tied:
            inner[0].weight = nn.Parameter(torch.randn(width, width))
            found.append(nn.Linear(3, 3))
            found[6].weight = found[5].weight = nn.Parameter(torch.randn(3, 3))
            inner[2] = nn.Linear(width, 3)
        freeze(found, case.trainable)
        return found


def trained(case: Case, model: FlatModel) -> tuple[float, torch.optim.Optimizer]:
    """Some steps of training with everything in use."""
    gradient = training.plain(model, lambda each: F.cross_entropy(model.network(each[0]), each[1]))
    if case.batch_norm and not isinstance(model, ShardedModel):
        gradient = training.data_parallel(
            gradient, dist.get_rank(), dist.get_world_size(), model.statistics
        )
    if isinstance(model, ShardedModel):
        gradient = training.accumulated(
            sharded.sharded(gradient, model), case.micro_batch * model.count
        )
    gradient = training.sharpness_aware(gradient, case.rho, model.norm)
    gradient = training.proximal(gradient, model.x.clone(), case.proximal)
    [step] = training.optimizers(case.optimizer, model, 0.1, 0.9, case.optimizer == "sgd", 0.01)
    batches = [each for each in BATCHES if len(each[1]) > 4 or not case.batch_norm]
    loss, _ = training.train(model, gradient, [step], batches, lambda batch: 0.1, clip_norm=0.5)
    return loss, step


def storage_of_training() -> int:
    """Bytes of all tensors that are there after some steps of AdamW and were not before."""
    before = storages()
    model = ShardedModel(network(CASES["adamw"], WIDTH), torch.device("cpu"))
    kept = trained(CASES["adamw"], model)
    found = sum(size for address, size in storages().items() if address not in before)
    del kept
    return found


def storages() -> dict[int, int]:
    """Each storage that a tensor has, and its bytes."""
    gc.collect()
    tensors = [
        each
        for each in gc.get_objects()
        if issubclass(type(each), Tensor) and not issubclass(type(each), DTensor)
    ]
    return {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}


def work(rank: int, folder: str, count: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count
    )
    sharded.BLOCK = 20  # each layer by itself
    for name, case in CASES.items():
        model = ShardedModel(network(case), torch.device("cpu"))
        loss, step = trained(case, model)
        [whole] = step.param_groups[0]["params"]
        moments = {
            key: value for key, value in step.state[whole].items() if isinstance(value, Tensor)
        }
        found = model.gather({"x": model.x, **moments})
        torch.save((loss, found), f"{folder}/{name}-{rank}.pt")
    # No Adam: the bias before BatchNorm has rounding errors for a gradient.
    parts = Case(rho=0.1, batch_norm=True)
    whole, model = FlatModel(network(parts)), ShardedModel(network(parts), torch.device("cpu"))
    losses = [trained(parts, each)[0] for each in (whole, model)]
    both = {"x": whole.x, "stats": whole.stats}, model.gather({"x": model.x, "stats": model.stats})
    torch.save((losses, both), f"{folder}/parts-{rank}.pt")
    several = {
        "x": torch.randn(2, len(whole.x)),
        "stats": torch.randn(2, whole.num_stats),
        "step": torch.ones(1),
    }
    scattered = model.scatter(lambda: several if rank == 0 else {})
    back = [
        model.gather({name: each[i] for name, each in scattered.items() if name != "step"})
        for i in range(2)
    ]
    with pytest.raises(ValueError, match=r"expected x \(\d+,\), got \(3,\)"):
        model.scatter(lambda: {"x": torch.zeros(3)})
    torch.save((several, back, scattered["step"]), f"{folder}/scattered-{rank}.pt")
    torch.save(storage_of_training(), f"{folder}/storage-{rank}.pt")
    dist.destroy_process_group()


def test_shards_are_as_the_whole(tmp_path: Path) -> None:
    spawn(work, (str(tmp_path), 2), nprocs=2)
    for name, case in CASES.items():
        model = FlatModel(network(case))
        loss, step = trained(case, model)
        [whole] = step.param_groups[0]["params"]
        expected = {"x": model.x} | {
            key: value for key, value in step.state[whole].items() if isinstance(value, Tensor)
        }
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2))
        assert first[0] == pytest.approx(loss, abs=1e-5), name
        assert first[1].keys() == expected.keys()
        for key, vector in expected.items():
            assert (first[1][key] - vector).abs().max() <= 1e-5, (name, key)
        assert second == (first[0], {})
    for rank in range(2):
        # BatchNorm sees the parts, as without shards.
        losses, (whole, parts) = torch.load(tmp_path / f"parts-{rank}.pt")
        assert losses[1] == pytest.approx(losses[0], abs=1e-5)
        assert all((parts[name] - whole[name]).abs().max() <= 1e-5 for name in parts)
        several, back, step = torch.load(tmp_path / f"scattered-{rank}.pt")
        assert all(
            torch.equal(row[name], several[name][i]) for i, row in enumerate(back) for name in row
        )
        assert (step.tolist(), [len(row) for row in back]) == ([1.0], [0, 0] if rank else [2, 2])
    halves = [torch.load(tmp_path / f"storage-{rank}.pt") for rank in range(2)]
    # Model, gradient and two moments, float32.
    size = 4 * 4 * FlatModel(network(CASES["adamw"], WIDTH)).x.numel()
    assert all(size / 2 <= half < 0.51 * size for half in halves)
