"""Local training: where a gradient comes from, and the loop that follows it.

A gradient is a function of a model and a batch, so that plain, proximal and sharpness-aware
training differ in one argument of the same loop, and every strategy can use any of them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from client_app.ranks import all_or_none
from datasets.lazy import Lazy, stream
from datasets.site import Part
from models.flat import FlatModel
from models.networks import hidden_matrices
from models.tasks import Task, right
from strategies.gradients import perturbed

Batch = tuple[Tensor, Tensor]  # x [n, ...], y [n]
EVALUATION_BATCH = 1024


class Gradient(Protocol):
    """The loss [] and the gradient [d] at a model ``x`` [d].

    The gradient may be overwritten by the next call. ``track`` is False where BatchNorm's running
    statistics must stay as they are.
    """

    def __call__(self, x: Tensor, batch: Batch, /, *, track: bool = True) -> tuple[Tensor, Tensor]:
        """The loss and the gradient at ``x`` on a batch."""


class Model(Protocol):
    """What optimizers need of a :class:`FlatModel`, or of several models as rows [n, d]."""

    @property
    def network(self) -> nn.Module:
        """The module."""

    @property
    def x(self) -> Tensor:
        """The parameters."""

    @property
    def grad(self) -> Tensor:
        """Their gradients."""


def plain(model: FlatModel, loss: Callable[[Batch], Tensor]) -> Gradient:
    """The gradient by backpropagation.

    ``loss`` computes the mean loss [] of the network that ``model`` is bound to.
    """
    buffers = model.all_buffers()

    def gradient(x: Tensor, batch: Batch, *, track: bool = True) -> tuple[Tensor, Tensor]:
        saved_x = None if x is model.x else model.x.clone()
        saved_buffers = None if track else [buffer.clone() for buffer in buffers]
        if saved_x is not None:
            model.x.copy_(x)
        value = loss(batch)
        model.backward(value)
        if saved_buffers is not None:
            for buffer, saved in zip(buffers, saved_buffers, strict=True):
                buffer.copy_(saved)
        if saved_x is not None:
            model.x.copy_(saved_x)
        return value.detach(), model.grad

    return gradient


def sharpness_aware(
    base: Gradient, rho: float, norm: Callable[[Tensor], Tensor] = torch.linalg.vector_norm
) -> Gradient:
    """The gradient at the worst point near by.

    That is ``x + rho g / |g|``, where ``g`` is the gradient at ``x`` on the same batch.

    Source: Foret et al., "Sharpness-Aware Minimization", ICLR 2021, equations 2 and 3; one norm
    over all parameters; the second pass leaves BatchNorm statistics alone, as in the authors' code.
    The loss returned is that of the first pass. ``norm`` is the model's own.
    Special case: rho = 0 is the base gradient.
    """
    if rho == 0:
        return base

    def gradient(x: Tensor, batch: Batch, *, track: bool = True) -> tuple[Tensor, Tensor]:
        value, g = base(x, batch, track=track)
        return value, base(perturbed(x, g, rho, norm(g)), batch, track=False)[1]

    return gradient


def accumulated(base: Gradient, size: int) -> Gradient:
    """The gradient over a batch, summed over parts of at most ``size`` examples.

    The memory needed is that of a part. 0: the batch at once.
    """
    if size == 0:
        return base

    def gradient(x: Tensor, batch: Batch, *, track: bool = True) -> tuple[Tensor, Tensor]:
        loss, total = x.new_zeros(()), torch.zeros_like(x)
        for part in zip(batch[0].split(size), batch[1].split(size), strict=True):
            value, g = base(x, part, track=track)
            share = len(part[1]) / len(batch[1])
            loss, total = loss + share * value, total.add_(g, alpha=share)
        return loss, total

    return gradient


def data_parallel(base: Gradient, rank: int, count: int, statistics: Sequence[Tensor]) -> Gradient:
    """The gradient over a batch of which each of ``count`` processes computes its part.

    Loss and gradient are summed over all. BatchNorm normalises each part by itself, as
    DistributedDataParallel does; its running ``statistics`` become the parts' mean.
    """

    def gradient(x: Tensor, batch: Batch, *, track: bool = True) -> tuple[Tensor, Tensor]:
        part = tuple(each.tensor_split(count)[rank] for each in batch)
        share = len(part[1]) / len(batch[1])
        with all_or_none():
            value, g = (
                base(x, (part[0], part[1]), track=track)
                if share
                else (x.new_zeros(()), torch.zeros_like(x))
            )
            kept = [buffer.reshape(-1) for buffer in statistics] if track else []
            together = torch.cat([g, value.reshape(1), *kept]).mul_(share)
            dist.all_reduce(together)
        d = len(g)
        for buffer, mean in zip(
            statistics, together[d + 1 :].split([len(each) for each in kept]), strict=False
        ):
            buffer.copy_(mean.view(buffer.shape))
        return together[d], together[:d]

    return gradient


def proximal(base: Gradient, anchor: Tensor, mu: float) -> Gradient:
    """The gradient of ``f(x) + mu/2 |x - anchor|^2``.

    Source: FedProx, Li et al., MLSys 2020, equation 2.
    Special case: mu = 0 is the base gradient.
    """
    if mu == 0:
        return base

    def gradient(x: Tensor, batch: Batch, *, track: bool = True) -> tuple[Tensor, Tensor]:
        value, g = base(x, batch, track=track)
        return value, g.add_(x - anchor, alpha=mu)

    return gradient


def corrected(base: Gradient, correct: Callable[[Tensor], Tensor]) -> Gradient:
    """A gradient function that corrects the base gradient [d] by ``correct``."""

    def gradient(x: Tensor, batch: Batch, *, track: bool = True) -> tuple[Tensor, Tensor]:
        value, g = base(x, batch, track=track)
        return value, correct(g)

    return gradient


def prepare(x: Tensor) -> Tensor:
    """Examples as the network takes them.

    Tokens are int64; all else is float32, pictures (bytes) from 0..255 to -2..2 at every site.
    """
    if x.dtype == torch.int64:
        return x
    return x.float().div_(63.75).sub_(2) if x.dtype == torch.uint8 else x.float()


def flip_crop(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures [n, c, h, w], each flipped with probability 1/2 and cropped at random.

    Before the crop, which keeps their size, they get a border of an eighth of their height.
    """
    n, _, height, width = x.shape
    pad = max(1, height // 8)
    # Drawn on the CPU, so that every device sees the same numbers.
    draws = torch.randint(0, 2 * pad + 1, (2, n, 1), generator=generator)
    flips = torch.randint(0, 2, (n, 1), generator=generator, dtype=torch.bool)
    rows = draws[0] + torch.arange(height)  # [n, h]
    columns = draws[1] + torch.arange(width)  # [n, w]
    columns = torch.where(flips, columns.flip(1), columns)
    rows, columns = rows.to(x.device), columns.to(x.device)
    padded = F.pad(x, (pad, pad, pad, pad))
    each = torch.arange(n, device=x.device)[:, None, None]
    return (
        padded.movedim(1, 3)[each, rows[:, :, None], columns[:, None, :]].movedim(3, 1).contiguous()
    )


def num_batches(num_examples: int, batch_size: int) -> int:
    """How many batches an epoch has; where sizes must differ, the last are one example smaller."""
    return math.ceil(num_examples / batch_size)


def nth_part(order: Tensor, count: int, number: int) -> Tensor:
    """``order.tensor_split(count)[number]``, without a view of each of the others.

    A large site has many thousands, and may be asked for one batch at a time.
    """
    size, longer = divmod(len(order), count)
    start = number * size + min(number, longer)
    return order[start : start + size + (number < longer)]


def batches(
    part: Part,
    batch_size: int,
    generator: torch.Generator,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None,
) -> Iterator[Batch]:
    """One epoch in random order, an IterableDataset's in its own.

    Its batches are of nearly equal size: none of one example.
    """
    order = torch.randperm(len(part.y), generator=generator)
    if isinstance(part.x, Lazy) and part.x.in_order:
        order = torch.arange(len(part.y))
    count = num_batches(len(order), batch_size)
    for x, y in stream(*part, map(partial(nth_part, order, count), range(count))):
        yield prepare(augment(x, generator) if augment else x), y


def chunks(part: Part, at_once: int = EVALUATION_BATCH) -> Iterator[Batch]:
    """All examples in their order, so many at once as a test takes, as the network takes them."""
    for x, y in stream(*part, torch.arange(len(part.y)).split(at_once)):
        yield prepare(x), y


def optimizers(
    name: str, model: Model, lr: float, momentum: float, nesterov: bool, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Torch's own optimizer over the one vector of the model; ``momentum`` is AdamW's beta1.

    For ``muon`` there are two: Muon (Jordan et al. 2024, with Nesterov momentum) for the hidden
    matrices, scaled so that its updates are as large as AdamW's (Liu et al., "Muon is Scalable for
    LLM Training", arXiv 2502.16982), and AdamW for the rest.
    """
    whole = nn.Parameter(model.x)
    assert whole.data_ptr() == model.x.data_ptr()
    whole.grad = model.grad  # of which those of the parameters are views
    if name != "muon":
        if name == "adamw":
            return [
                torch.optim.AdamW(
                    [whole], lr, (momentum, 0.999), weight_decay=weight_decay, fused=True
                )
            ]
        return [
            torch.optim.SGD(
                [whole], lr, momentum, weight_decay=weight_decay, nesterov=nesterov, fused=True
            )
        ]
    trained = [parameter for parameter in model.network.parameters() if parameter.requires_grad]
    hidden = {
        id(parameter): parameter
        for parameter in hidden_matrices(model.network)
        if parameter.requires_grad
    }
    # Kernels: a row for each output.
    matrices = [nn.Parameter(parameter.detach().flatten(1)) for parameter in hidden.values()]
    for matrix, parameter in zip(matrices, hidden.values(), strict=True):
        assert parameter.grad is not None  # a view into model.grad
        matrix.grad = parameter.grad.flatten(1)
    found: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            matrices,
            lr,
            weight_decay,
            momentum,
            nesterov=momentum > 0,
            adjust_lr_fn="match_rms_adamw",
        )
    ]
    if rest := [parameter for parameter in trained if id(parameter) not in hidden]:
        found.append(
            torch.optim.AdamW(rest, lr, (momentum, 0.999), weight_decay=weight_decay, fused=True)
        )
    return found


def train(
    model: FlatModel,
    gradient: Gradient,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Iterable[Batch],
    rate: Callable[[int], float],
    clip_norm: float,
) -> tuple[float, int]:
    """Follow the gradient from batch to batch.

    Args:
        model: trained in place.
        gradient: at ``model.x``.
        optimizers: together over ``model.x``.
        batches: one after the other, at least one.
        rate: learning rate of batch 0, 1, 2, ...
        clip_norm: the gradient's largest Euclidean norm; 0 for no limit.

    Returns:
        The mean loss over all batches, and how many there were.
    """
    total = torch.zeros((), device=model.x.device)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    whole = nn.Parameter(model.x)
    whole.grad = model.grad  # of which those that the optimizers read are views
    count = 0
    for count, batch in enumerate(batches, 1):
        for group in groups:
            group["lr"] = rate(count - 1)
        value, found = gradient(model.x, batch)
        if found is not model.grad:  # which the optimizer reads
            model.grad.copy_(found)
        if clip_norm:
            nn.utils.clip_grads_with_norm_([whole], clip_norm, model.norm(model.grad))
        for optimizer in optimizers:
            optimizer.step()
        total += value
    return total.item() / count, count


@torch.no_grad()
def evaluate(
    task: Task,
    predict: Callable[[Tensor], Tensor],
    model: FlatModel,
    xs: Tensor,
    statistics: Tensor,
    part: Part,
    *,
    details: bool = False,
    at_once: int = EVALUATION_BATCH,
) -> dict[str, float | list[float]]:
    """Test the mean prediction of one or several models; return means over examples.

    Args:
        task: what is measured.
        predict: examples [n, ...] to outputs [n, ...], by the network that ``model`` is bound to.
        model: left with the last of the models.
        xs: [k, d], the models.
        statistics: [k, b], their BatchNorm statistics.
        part: the examples to test on.
        details: whether what the metrics of each class are made of is wanted.
        at_once: so many examples are computed together.

    Returns:
        ``loss``, where the task decides something ``accuracy``, and ``means``; of several models
        also ``accuracy-vote`` (majority) and ``accuracy-single`` (mean over the models).
    """
    n, k, sums = len(part.y), len(xs), dict[str, Tensor]()
    decide, means = task.decide, task.measures(details)

    def add(name: str, values: Tensor) -> None:
        sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + values.cpu().double()

    model.network.eval()
    for x, y in chunks(part, at_once):
        found = []
        for row, stats in zip(xs, statistics, strict=True):
            if k > 1 or not sums:
                model.load(row, stats)
            found.append(predict(x).float())
        together = torch.stack(found)  # [k, chunk, ...]
        outputs = task.pooled(together) if k > 1 else together[0]
        add("loss", task.losses(outputs, y).sum())
        if decide:
            add("accuracy", right(decide(outputs), y).sum())
        if decide and k > 1:
            each = torch.stack([decide(row) for row in together])
            add("accuracy-vote", right(each.mode(0).values, y).sum())
            add("accuracy-single", torch.stack([right(row, y) for row in each]).mean(0).sum())
        if means:
            add("means", means(outputs, y))
    model.network.train()
    return {name: (total / n).tolist() for name, total in sums.items()}
