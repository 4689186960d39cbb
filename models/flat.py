"""A network whose parameters are one vector.

The algorithms work on ``x`` [d]; the network works on tensors of many shapes. Both look at the same
memory, so that nothing is copied between a step of training and a step of an algorithm, and an
optimizer sees one tensor instead of a hundred.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor, nn

from models.pretrained import is_frozen

_LARGE = 1 << 24  # elements (64 MB)


class FlatModel:
    """A network bound to two vectors: of its trainable parameters and of their gradients.

    These are ``x`` [d] and ``grad`` [d]. Floating-point buffers (BatchNorm's running statistics)
    are read and written as a vector ``stats`` [b], but for those of layers that are not trained;
    integer buffers are no part of a model. The order of the parts is that of
    ``network.parameters()`` and ``network.buffers()``.

    Attributes:
        network: the module; its parameters are views into ``x``.
        x: [d], float32.
        grad: [d], float32; the parameters' ``.grad`` are views into it.
        sizes: how many elements of ``x`` each parameter has, in their order; what a codec calls
            layers.
        statistics: the parts of ``stats``, as the network holds them.
        buffer_names: theirs.
    """

    def __init__(self, network: nn.Module, device: torch.device | str = "cpu") -> None:
        self.network = network.to(device)
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError("the network has no trainable parameters")
        self.sizes = tuple(parameter.numel() for parameter in parameters)
        self._bind(parameters)
        self._parameters = parameters
        self._pieces: tuple[Tensor, ...] = ()
        # Not views: torch.compile guards badly against buffers that share memory and are written in
        # the forward pass.
        self.buffer_names, self.statistics = _statistics(network)
        self._counters = [
            (buffer, buffer.clone())
            for buffer in network.buffers()
            if not buffer.is_floating_point()
        ]
        self.num_stats = sum(buffer.numel() for buffer in self.statistics)

    def _bind(self, parameters: list[nn.Parameter]) -> None:
        self.x = torch.cat([parameter.detach().reshape(-1) for parameter in parameters]).float()
        for parameter, part in zip(parameters, self.x.split(self.sizes), strict=True):
            parameter.data = part.view(parameter.shape)

    @cached_property
    def grad(self) -> Tensor:
        """The gradient [d], allocated when it is first used: a server needs none."""
        whole = torch.zeros_like(self.x)
        for parameter, part in zip(self._parameters, whole.split(self.sizes), strict=True):
            parameter.grad = part.view(parameter.shape)
        return whole

    def backward(self, loss: Tensor) -> None:
        """Put the gradient of ``loss`` [] into ``grad``.

        ``loss.backward()`` would add to each parameter's ``.grad`` on its own, a kernel a
        parameter; here one moves them all.
        """
        # The pieces are kept until the next call: with nothing of a step left, the allocator of the
        # C library would hand the step's memory back to the system and fetch it again, a tenth of
        # the time of ResNet-20 on a CPU.
        self._pieces = ()
        self._pieces = torch.autograd.grad(loss, self._parameters, materialize_grads=True)
        torch.cat([piece.reshape(-1) for piece in self._pieces], out=self.grad)
        # Large pieces are handed back anyway, and are as much memory as the model.
        if len(self.x) >= _LARGE:
            self._pieces = ()

    def norm(self, vector: Tensor) -> Tensor:
        """The Euclidean norm [] of a vector [d]."""
        found: Tensor = torch.linalg.vector_norm(vector)
        return found

    def scatter(self, read: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """This process's part of the vectors that ``read`` returns: here all of them.

        In :mod:`client_app.sharded` each process gets its shard.
        """
        return dict(read())

    def gather(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole vectors of those that :meth:`scatter` returned: here they are the same."""
        return dict(vectors)

    @property
    def stats(self) -> Tensor:
        """A copy of the floating-point buffers, [b]."""
        if not self.statistics:
            return torch.empty(0, device=self.x.device)
        return torch.cat([buffer.reshape(-1) for buffer in self.statistics]).float()

    def load(self, x: Tensor, stats: Tensor | None = None) -> None:
        """Copy a model into the network; integer buffers go back to where they started.

        Raises:
            ValueError: the vectors are not of this network's size.
        """
        if x.shape != self.x.shape or (stats is not None and stats.shape != (self.num_stats,)):
            got = f"{tuple(x.shape)} and {tuple(stats.shape) if stats is not None else None}"
            raise ValueError(
                f"expected x {tuple(self.x.shape)} and stats ({self.num_stats},), got {got}"
            )
        self.x.copy_(x)
        for counter, start in self._counters:
            counter.copy_(start)
        if stats is not None:
            sizes = [buffer.numel() for buffer in self.statistics]
            for buffer, part in zip(self.statistics, stats.split(sizes), strict=True):
                buffer.copy_(part.view(buffer.shape))

    def state_dict(self, x: Tensor, stats: Tensor) -> dict[str, Tensor]:
        """A model as a state dict of the network, on the CPU, for those who do not use vectors."""
        parts = dict(zip(map(id, self._parameters), x.split(self.sizes), strict=True))
        parts |= dict(
            zip(
                map(id, self.statistics),
                stats.split([each.numel() for each in self.statistics]),
                strict=True,
            )
        )
        parts |= {id(counter): start for counter, start in self._counters}
        return {
            name: parts.get(id(value), value)
            .detach()
            .view(value.shape)
            .to("cpu", value.dtype, copy=True)
            for name, value in self.network.state_dict(keep_vars=True).items()
        }

    @property
    def variances(self) -> Tensor:
        """Which elements of ``stats`` are variances, [b]."""
        marks = [
            torch.full((buffer.numel(),), name.endswith("running_var"))
            for name, buffer in zip(self.buffer_names, self.statistics, strict=True)
        ]
        return torch.cat([torch.empty(0, dtype=torch.bool), *marks])

    def all_buffers(self) -> list[Tensor]:
        """Every buffer of the network, integers too."""
        return list(
            chain.from_iterable(module.buffers(recurse=False) for module in self.network.modules())
        )


def _statistics(network: nn.Module) -> tuple[tuple[str, ...], list[Tensor]]:
    """The floating-point buffers that training changes, by name."""
    still = {
        id(buffer)
        for module in network.modules()
        if is_frozen(module)
        for buffer in module.buffers(recurse=False)
    }
    found = [
        (name, buffer)
        for name, buffer in network.named_buffers()
        if buffer.is_floating_point() and id(buffer) not in still
    ]
    return tuple(name for name, _ in found), [buffer for _, buffer in found]
