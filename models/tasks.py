"""What a network is trained to do: its loss, its decisions, and the means behind its metrics.

Everything that a site reports of a test is a mean over its examples, so that the mean over sites by
their examples is that of all examples; metrics that are no means themselves (mean IoU, F1, RMSE)
are made of such means, of each site and of all.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # a target that does not count, as in torch's cross_entropy
BINS = 15  # of confidence, in the calibration error
MEAN = "mean/"  # before the number of a mean that is no metric yet


class Targets(NamedTuple):
    """What a network's outputs stand for.

    Attributes:
        names: of the classes, labels or numbers; what is predicted.
        deviations: of numbers, over all sites: networks learn them with mean 0 and deviation 1.
        token_bytes: mean bytes of a token.
        details: whether the metrics of each class are wanted.
    """

    names: tuple[str, ...]
    deviations: tuple[float, ...] = ()
    token_bytes: float = 1.0
    details: bool = False


class Task(NamedTuple):
    """A task; one's own is ``training.task = "package.module:TASK"`` (see ``examples/my_task.py``).

    Attributes:
        target: what belongs to an example: ``class`` (y [n] int64), ``labels`` (y [n, labels], 0 or
            1), ``numbers`` (y [n, numbers] float32, standardised), ``tokens`` (y [n, context]
            int64, and so is x), ``map`` (y [n, height, width] int64).
        losses: outputs and y to the loss of each example, [n].
        headline: the metric by which runs are compared.
        pooled: outputs of several models [k, n, ...] to those of their mean prediction, [n, ...].
        decide: outputs to what is compared with y, for the accuracy; None where nothing is decided.
        means: outputs and y to sums over examples, [s], whose means ``metrics`` gets; None for
            none.
        metrics: the mean loss, those means (none where a site keeps them to itself) and targets to
            further metrics by name.
        larger: whether more of the headline is better.
        only_details: whether ``means`` serve the metrics of each class only.
    """

    target: Literal["class", "labels", "numbers", "tokens", "map"]
    losses: Callable[[Tensor, Tensor], Tensor]
    headline: str = "loss"
    pooled: Callable[[Tensor], Tensor] = partial(torch.mean, dim=0)
    decide: Callable[[Tensor], Tensor] | None = None
    means: Callable[[Tensor, Tensor], Tensor] | None = None
    metrics: Callable[[float, list[float], Targets], dict[str, float]] = (
        lambda loss, means, targets: {}
    )
    larger: bool = False
    only_details: bool = False

    def output(self, shape: Sequence[int], num_outputs: int) -> tuple[int, ...]:
        """The shape of a network's output for an example of ``shape``."""
        match self.target:
            case "tokens":
                return (*shape, num_outputs)
            case "map":
                return (num_outputs, *shape[1:])
        return (num_outputs,)

    def num_means(self, shape: Sequence[int], num_outputs: int, details: bool) -> int:
        """How many means belong to a test on examples of ``shape``."""
        if (means := self.measures(details)) is None:
            return 0
        match self.target:
            case "class":
                y = torch.zeros(1, dtype=torch.int64)
            case "labels" | "numbers":
                y = torch.zeros(1, num_outputs)
            case "tokens":
                y = torch.zeros(1, *shape, dtype=torch.int64)
            case "map":
                y = torch.zeros(1, *shape[1:], dtype=torch.int64)
        return means(torch.zeros(1, *self.output(shape, num_outputs)), y).numel()

    def measures(self, details: bool) -> Callable[[Tensor, Tensor], Tensor] | None:
        """The function of the means, or None where none are wanted."""
        return self.means if details or not self.only_details else None

    def measured(self, found: Mapping[str, float], targets: Targets) -> dict[str, float]:
        """What sites reported, with metrics in the place of the means that they are made of.

        It is the report of one site, or the mean over sites. Of the metrics only such as are
        numbers: a site may keep the loss to itself, or report anything.
        """
        means = [value for name, value in found.items() if name.startswith(MEAN)]
        known = {name: value for name, value in found.items() if not name.startswith(MEAN)}
        made = (
            self.metrics(known.get("loss", math.nan), means, targets)
            if "loss" in known or means
            else {}
        )
        return known | {name: value for name, value in made.items() if math.isfinite(value)}


def numbers(found: Mapping[str, float | list[float]]) -> dict[str, float]:
    """What a test found as numbers by name, its ``means`` with a name each."""
    single = {name: float(value) for name, value in found.items() if not isinstance(value, list)}
    means = found.get("means", [])
    return single | {
        f"{MEAN}{number}": value
        for number, value in enumerate(means if isinstance(means, list) else [])
    }


def right(decided: Tensor, y: Tensor) -> Tensor:
    """The share of right decisions of each example, [n]."""
    counts, hits = y != IGNORED, decided == y
    n = len(y)
    return (hits & counts).reshape(n, -1).sum(1).float() / counts.reshape(n, -1).sum(1).clamp(min=1)


def _mean_probability(outputs: Tensor, dim: int) -> Tensor:
    """Logits of several models to logarithms of their mean probabilities."""
    return outputs.log_softmax(dim).logsumexp(0) - math.log(len(outputs))


def _cross_entropy(outputs: Tensor, y: Tensor, dim: int) -> Tensor:
    """The mean over the parts of each example that count, [n]."""
    each = F.cross_entropy(outputs.movedim(dim, 1), y, ignore_index=IGNORED, reduction="none")
    if y.dim() == 1:
        return each
    return each.flatten(1).sum(1) / (y != IGNORED).flatten(1).sum(1).clamp(min=1)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """The ratio of two numbers; NaN where the second is 0."""
    return torch.where(whole > 0, part / whole, torch.nan)


def _named(kind: str, names: Sequence[str], values: Tensor) -> dict[str, float]:
    """A metric of each class, but for classes that do not occur."""
    return {
        f"{kind}/{name}": value
        for name, value in zip(names, values.tolist(), strict=True)
        if not math.isnan(value)
    }


# Classification.


def _class_means(outputs: Tensor, y: Tensor) -> Tensor:
    """Sums over examples, of each class and of each bin of confidence.

    Of each class: examples, predictions, right ones; of each bin of confidence: examples,
    confidence, right ones.
    """
    outputs, y = outputs.cpu().double(), y.cpu()
    probabilities, size = outputs.softmax(1), outputs.shape[1]
    confidence, decided = probabilities.max(1)
    hits = (decided == y).double()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    classes = [
        torch.bincount(y, minlength=size),
        torch.bincount(decided, minlength=size),
        torch.bincount(y, hits, size),
    ]
    calibration = [
        torch.bincount(bins, weights, BINS) for weights in (torch.ones_like(hits), confidence, hits)
    ]
    return torch.cat([each.double() for each in (*classes, *calibration)])


def _class_metrics(_: float, means: list[float], targets: Targets) -> dict[str, float]:
    """The expected calibration error, and recall and precision of each class.

    Source of the error: Guo et al., "On Calibration of Modern Neural Networks", 2017, equation 3.
    """
    if not means:
        return {}
    size = len(targets.names)
    real, predicted, hits = torch.tensor(means[: 3 * size]).view(3, size)
    _, confidence, accuracy = torch.tensor(means[3 * size :]).view(3, BINS)
    found = {"calibration-error": float((confidence - accuracy).abs().sum())}
    found |= _named("recall", targets.names, _ratio(hits, real))
    return found | _named("precision", targets.names, _ratio(hits, predicted))


# Several labels at once.


def _label_losses(outputs: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, y.float(), reduction="none").mean(1)


def _pooled_labels(outputs: Tensor) -> Tensor:
    return torch.logit(outputs.sigmoid().mean(0), 1e-7)


def _label_means(outputs: Tensor, y: Tensor) -> Tensor:
    """The means of each label: given, predicted, both."""
    decided, given = outputs > 0, y > 0
    return torch.cat([each.sum(0) for each in (given, decided, decided & given)])


def _label_metrics(_: float, means: list[float], targets: Targets) -> dict[str, float]:
    if not means:
        return {}
    given, decided, both = torch.tensor(means).view(3, -1)
    f1 = _ratio(2 * both, given + decided)
    found = {
        "f1-micro": float(_ratio(2 * both.sum(), (given + decided).sum())),
        "f1-macro": float(f1.nanmean()),
    }
    found = {name: value for name, value in found.items() if not math.isnan(value)}
    return found | (_named("f1", targets.names, f1) if targets.details else {})


# Numbers.


def _squares(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs - y).square().mean(1)


def _number_means(outputs: Tensor, y: Tensor) -> Tensor:
    """The means of each number: absolute error, squared error, square."""
    outputs, y = outputs.cpu().double(), y.cpu().double()
    error = outputs - y
    return torch.cat([error.abs().sum(0), error.square().sum(0), y.square().sum(0)])


def _number_metrics(loss: float, means: list[float], targets: Targets) -> dict[str, float]:
    """RMSE, MAE and R² of numbers to predict.

    Of one number in its own unit; of several RMSE in deviations. R² is against the mean over all
    sites.
    """
    one = len(targets.names) == 1
    found = {"rmse": math.sqrt(loss) * (targets.deviations[0] if one else 1)}
    if not means:
        return found
    absolute, squared, power = torch.tensor(means).view(3, -1)
    deviations = torch.tensor(targets.deviations)
    found |= {"mae": float(absolute[0] * deviations[0])} if one else {}
    if not math.isnan(r2 := float((1 - _ratio(squared, power)).nanmean())):
        found["r2"] = r2
    if targets.details and not one:
        found |= _named("rmse", targets.names, squared.sqrt() * deviations) | _named(
            "mae", targets.names, absolute * deviations
        )
    return found


# Language.


def _language_metrics(loss: float, _: list[float], targets: Targets) -> dict[str, float]:
    return {
        "bits-per-byte": loss / math.log(2) / targets.token_bytes,
        "perplexity": math.exp(min(loss, 700.0)),
    }


# Dense prediction.


def _map_means(outputs: Tensor, y: Tensor) -> Tensor:
    """The means of each class: pixels in intersection and union of truth and prediction."""
    size, counts = outputs.shape[1], (y != IGNORED).cpu()
    real, decided = y.cpu()[counts], outputs.argmax(1).cpu()[counts]
    both = torch.bincount(real[real == decided], minlength=size)
    return torch.cat(
        [
            both,
            torch.bincount(real, minlength=size) + torch.bincount(decided, minlength=size) - both,
        ]
    ).double()


def _map_metrics(_: float, means: list[float], targets: Targets) -> dict[str, float]:
    if not means:
        return {}
    both, either = torch.tensor(means).view(2, -1)
    each = _ratio(both, either)
    return {"mean-iou": float(each.nanmean())} | (
        _named("iou", targets.names, each) if targets.details else {}
    )


TASKS = {
    "classification": Task(
        "class",
        partial(_cross_entropy, dim=1),
        "accuracy",
        partial(_mean_probability, dim=2),
        partial(torch.argmax, dim=1),
        _class_means,
        _class_metrics,
        larger=True,
        only_details=True,
    ),
    "multi-label": Task(
        "labels",
        _label_losses,
        "f1-micro",
        _pooled_labels,
        lambda outputs: (outputs > 0).byte(),
        _label_means,
        _label_metrics,
        larger=True,
    ),
    "regression": Task("numbers", _squares, "rmse", means=_number_means, metrics=_number_metrics),
    "language": Task(
        "tokens",
        partial(_cross_entropy, dim=-1),
        "bits-per-byte",
        partial(_mean_probability, dim=-1),
        partial(torch.argmax, dim=-1),
        metrics=_language_metrics,
    ),
    "segmentation": Task(
        "map",
        partial(_cross_entropy, dim=1),
        "mean-iou",
        partial(_mean_probability, dim=2),
        partial(torch.argmax, dim=1),
        _map_means,
        _map_metrics,
        larger=True,
    ),
}
