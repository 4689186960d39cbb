"""Two processes, each with its shard of every parameter, over gloo: what one process computes."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F

from client_app import sharded, training
from client_app.sharded import ShardedModel
from models.flat import FlatModel
from models.pretrained import freeze

pytestmark = pytest.mark.slow
GENERATOR = torch.Generator().manual_seed(1)
BATCHES = [(torch.randn(n, 7, generator=GENERATOR), torch.randint(0, 3, (n,), generator=GENERATOR)) for n in (8, 7, 1, 5)]


class Case(NamedTuple):
    """How to train."""

    optimizer: str = "sgd"
    rho: float = 0.0
    micro_batch: int = 0
    proximal: float = 0.0
    trainable: str = "*"
    tied: bool = False


CASES = {
    "plain": Case(),
    "sam": Case(rho=0.1),
    "adamw": Case("adamw", proximal=0.1),
    "micro-batch": Case(rho=0.1, micro_batch=2),
    "trainable": Case("adamw", trainable="3.* 5.bias"),
    "tied": Case(tied=True),
}


def network(case: Case) -> nn.Module:
    """Parameters of 9, 7, 5 and 3 rows: no two processes have equally many."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        inner = nn.Sequential(nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 5))
        found = nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9), nn.ReLU(), inner, nn.ReLU(), nn.Linear(5, 3))
        if case.tied:
            inner[0].weight = nn.Parameter(torch.randn(9, 9))
            found.append(nn.Linear(3, 3))
            found[6].weight = found[5].weight = nn.Parameter(torch.randn(3, 3))
            inner[2] = nn.Linear(9, 3)
        freeze(found, case.trainable)
        return found


def trained(case: Case, model: FlatModel) -> tuple[float, torch.optim.Optimizer]:
    """Some steps of training with everything in use."""
    gradient = training.plain(model, lambda each: F.cross_entropy(model.network(each[0]), each[1]))
    if isinstance(model, ShardedModel):
        gradient = training.accumulated(sharded.sharded(gradient, model), case.micro_batch * model.count)
    gradient = training.sharpness_aware(gradient, case.rho, model.norm)
    gradient = training.proximal(gradient, model.x.clone(), case.proximal)
    step = training.optimizer(case.optimizer, model, 0.1, 0.9, case.optimizer == "sgd", 0.01)
    loss, _ = training.train(model, gradient, step, BATCHES, lambda batch: 0.1, clip_norm=0.5)
    return loss, step


def work(rank: int, folder: str, count: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    sharded.BLOCK = 20  # each layer by itself
    for name, case in CASES.items():
        model = ShardedModel(network(case), torch.device("cpu"))
        loss, step = trained(case, model)
        [whole] = step.param_groups[0]["params"]
        moments = {key: value for key, value in step.state[whole].items() if isinstance(value, Tensor)}
        found = model.gather({"x": model.x, **moments})
        torch.save((loss, found), f"{folder}/{name}-{rank}.pt")
    dist.destroy_process_group()


def test_shards_are_as_the_whole(tmp_path: Path) -> None:
    spawn(work, (str(tmp_path), 2), nprocs=2)
    for name, case in CASES.items():
        model = FlatModel(network(case))
        loss, step = trained(case, model)
        [whole] = step.param_groups[0]["params"]
        expected = {"x": model.x} | {key: value for key, value in step.state[whole].items() if isinstance(value, Tensor)}
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2))
        torch.testing.assert_close(first, (loss, expected), rtol=0, atol=1e-5, msg=lambda said, name=name: f"{name}: {said}")
        assert second == (first[0], {})
