"""A network that no single device needs to hold: each process has its shard of it (FSDP2).

The shard is of every parameter, gradient and moment. Vectors [d] of the whole model are for the
wire and for what a run made the site remember. Only rank 0 has them, on the CPU; they are scattered
and gathered parameter by parameter. While a network is built, though, each process has it whole on
its CPU.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from client_app.ranks import all_or_none, broadcast
from client_app.training import Batch, Gradient
from models.flat import FlatModel
from strategies.records import STATS

BLOCK = 2**20  # parameters: fewer are not worth a message of their own


class ShardedModel(FlatModel):
    """A :class:`FlatModel` of several processes.

    ``x`` and ``grad`` [p] are this process's shard, p = d / count and a little: FSDP2 splits each
    parameter by its first dimension into equal parts, the last of which are filled up with zeros.
    These stay zero: their gradient is.

    Attributes:
        share: of the batch, the share of which this process computes the next loss; the backward
            pass weighs the loss by it and sums over all processes.
        sizes: of the whole parameters, as in :class:`FlatModel`.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.rank, self.count, self.share = dist.get_rank(), dist.get_world_size(), 1.0
        mesh = init_device_mesh(device.type, (self.count,))
        for block in (*_blocks(network), network):
            # Not even the root stays whole after a forward pass: it would not see what is loaded.
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
        super().__init__(network, device)

    def _bind(self, parameters: list[nn.Parameter]) -> None:
        # FSDP2 has a tensor for each shard, zeros included; no public function makes them views
        # into one.
        states = [
            module._get_fsdp_state()
            for module in self.network.modules()
            if isinstance(module, FSDPModule)
        ]
        groups: Any = chain.from_iterable(state._fsdp_param_groups for state in states)
        shards = {id(shard.sharded_param): shard for group in groups for shard in group.fsdp_params}
        found = [shards[id(parameter)] for parameter in parameters]
        self.x = torch.cat([shard._sharded_param_data for shard in found])
        self.grad = torch.zeros_like(self.x)
        self._parts = tuple(len(shard._sharded_param_data) for shard in found)
        for shard, part, grad in zip(
            found, self.x.split(self._parts), self.grad.split(self._parts), strict=True
        ):
            parameter, shard._sharded_param_data = shard.sharded_param, part
            shape = parameter._local_tensor.shape
            parameter._local_tensor = part[: shape.numel()].view(shape)
            parameter.grad = DTensor.from_local(
                grad[: shape.numel()].view(shape),
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )

    def backward(self, loss: Tensor) -> None:
        """Put the gradient of ``loss`` [], weighed and summed over all processes, into ``grad``."""
        self.grad.zero_()
        (loss * self.share).backward()

    def norm(self, vector: Tensor) -> Tensor:
        """The Euclidean norm [] of a vector of which each process has its shard [p]."""
        square = super().norm(vector).square()
        with all_or_none():
            dist.all_reduce(square)
        return square.sqrt()

    def scatter(self, read: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """This process's shards [..., p] of the vectors [..., d] that ``read`` gives rank 0.

        Numbers and ``stats`` are not split.

        Raises:
            ValueError: ``read`` does; or a vector is of another size. All processes raise it.
        """
        vectors: dict[str, Tensor] = {}
        failure: Exception | None = None
        if self.rank == 0:
            try:
                vectors = dict(read())
                self._check(vectors)
            except Exception as error:
                failure = error
        described = {
            name: [str(each.dtype).removeprefix("torch."), list(each.shape)]
            for name, each in vectors.items()
        }
        head = (
            None if self.rank else json.dumps([str(failure) if failure else "", described]).encode()
        )
        wrong, shapes = json.loads(broadcast(head, device=self.x.device))
        if wrong:
            raise failure or ValueError(wrong)
        with all_or_none():
            return {
                name: self._scattered(
                    name, torch.Size(shape), getattr(torch, dtype), vectors.get(name)
                )
                for name, (dtype, shape) in shapes.items()
            }

    def gather(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The vectors of which each process has its shard, whole, on the CPU of rank 0.

        The other processes get nothing.
        """
        with all_or_none():
            long = {
                name: name != STATS and each.shape == self.x.shape for name, each in vectors.items()
            }
            found = {
                name: self._gathered(each) if long[name] else each.cpu()
                for name, each in vectors.items()
            }
        return {} if self.rank else found

    def _scattered(
        self, name: str, shape: torch.Size, dtype: torch.dtype, vector: Tensor | None
    ) -> Tensor:
        device = self.x.device
        if name == STATS or shape[-1:] != (sum(self.sizes),):
            found = (
                torch.empty(shape, dtype=dtype, device=device)
                if vector is None
                else vector.to(device, copy=True)
            )
            if found.numel():
                dist.broadcast(found, 0)
            return found
        found = torch.empty(*shape[:-1], len(self.x), device=device)
        rows = found.view(-1, len(self.x))
        wholes = [None] * len(rows) if vector is None else vector.reshape(len(rows), -1)
        for row, whole in zip(rows, wholes, strict=True):
            parts = [None] * len(self.sizes) if whole is None else whole.split(self.sizes)
            for shard, part in zip(row.split(self._parts), parts, strict=True):
                if part is None:
                    dist.scatter(shard, None, 0)
                else:
                    padded = F.pad(
                        part.to(device, torch.float32), (0, self.count * len(shard) - len(part))
                    )
                    dist.scatter(shard, list(padded.split(len(shard))), 0)
        return found

    def _gathered(self, vector: Tensor) -> Tensor:
        whole = torch.empty(0 if self.rank else sum(self.sizes))
        parts = [None] * len(self.sizes) if self.rank else whole.split(self.sizes)
        for shard, part in zip(vector.split(self._parts), parts, strict=True):
            shards = None if part is None else [torch.empty_like(shard) for _ in range(self.count)]
            dist.gather(shard.contiguous(), shards, 0)
            if part is not None and shards is not None:
                part.copy_(torch.cat(shards)[: len(part)])
        return whole

    def _check(self, vectors: Mapping[str, Tensor]) -> None:
        """Check that vectors of the wire are of this network's size."""
        for name, vector in vectors.items():
            expected = self.num_stats if name == STATS else sum(self.sizes)
            if vector.shape[-1:] != (expected,) and (name == STATS or vector.numel() > 1):
                raise ValueError(f"expected {name} ({expected},), got {tuple(vector.shape)}")


def sharded(base: Gradient, model: ShardedModel) -> Gradient:
    """:func:`client_app.training.data_parallel` with a model that sums the gradients itself.

    It does so in the backward pass. All must take part in that: a process without examples computes
    on all of them, and counts for nothing.
    """

    def gradient(x: Tensor, batch: Batch, *, track: bool = True) -> tuple[Tensor, Tensor]:
        part = tuple(each.tensor_split(model.count)[model.rank] for each in batch)
        model.share = len(part[1]) / len(batch[1])
        with all_or_none():
            value, g = base(x, (part[0], part[1]) if model.share else batch, track=track)
            kept = [buffer.reshape(-1) for buffer in model.statistics] if track else []
            summed = torch.cat([value.reshape(1), *kept]).mul_(model.share)
            dist.all_reduce(summed)
        for buffer, mean in zip(
            model.statistics, summed[1:].split([len(each) for each in kept]), strict=False
        ):
            buffer.copy_(mean.view(buffer.shape))
        return summed[0], g

    return gradient


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The parts that are whole one after the other, from the inside out.

    They are elements of lists and sequences, if they are large; but not what shares a parameter
    with the rest, which both need at once.
    """
    names: dict[int, int] = {}
    for _, parameter in network.named_parameters(remove_duplicate=False):
        names[id(parameter)] = names.get(id(parameter), 0) + 1
    taken: set[int] = set()
    for module in reversed(list(network.modules())):
        for element in (
            module.children() if isinstance(module, nn.Sequential | nn.ModuleList) else ()
        ):
            own = [each for each in element.parameters() if id(each) not in taken]
            alone = all(names[id(each)] == 1 for each in own)
            if (
                alone
                and sum(each.numel() for each in own) >= BLOCK
                and not isinstance(element, nn.ModuleList | nn.ModuleDict)
            ):
                taken |= {id(each) for each in own}
                yield element
