"""Losses and metrics of every task, against PyTorch and scikit-learn; they add up over sites."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn
from torch import Tensor
from torch.nn import functional as F

from models.tasks import IGNORED, TASKS, Targets, numbers, right
from strategies.averaging.mean import weighted_mean

NAMES = ("a", "b", "c")
DETAILS = Targets(NAMES, (2.0, 3.0, 0.5), details=True)


def examples(task: str, n: int = 60) -> tuple[Tensor, Tensor]:
    """Outputs and y of a network that is right more often than not."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    match task:
        case "classification":
            y = torch.randint(0, 3, (n,), generator=generator)
            return normal(n, 3) + 1.5 * F.one_hot(y, 3), y
        case "multi-label":
            y = torch.randint(0, 2, (n, 3), generator=generator, dtype=torch.uint8)
            return normal(n, 3) + 2.0 * y - 1, y
        case "regression":
            y = normal(n, 3)
            return y + 0.3 * normal(n, 3), y
        case "language":
            y = torch.randint(0, 5, (n, 4), generator=generator)
            return normal(n, 4, 5) + F.one_hot(y, 5), y
    y = torch.randint(0, 3, (n, 2, 4), generator=generator)
    outputs = normal(n, 3, 2, 4) + F.one_hot(y, 3).movedim(3, 1)
    y[::3, 0, :2] = IGNORED
    return outputs, y


def reported(task: str, outputs: Tensor, y: Tensor) -> dict[str, Any]:
    """What a site reports."""
    found, n, chosen = dict[str, Any](), len(y), TASKS[task]
    found["loss"] = chosen.losses(outputs, y).mean().item()
    if chosen.decide:
        found["accuracy"] = right(chosen.decide(outputs), y).mean().item()
    if chosen.means:
        found["means"] = (chosen.means(outputs, y).double() / n).tolist()
    return found | {"num-examples": float(n)}


def measured(task: str, targets: Targets = DETAILS) -> dict[str, float]:
    return TASKS[task].measured(numbers(reported(task, *examples(task))), targets)


@pytest.mark.parametrize("task", TASKS)
def test_metrics_of_sites_together_are_those_of_all_examples(task: str) -> None:
    outputs, y = examples(task)
    parts = [
        numbers(reported(task, *part))
        for part in zip(outputs.split([7, 20, 33]), y.split([7, 20, 33]), strict=True)
    ]
    together = TASKS[task].measured(weighted_mean(parts, "num-examples"), DETAILS)
    assert together == pytest.approx(measured(task), rel=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_a_site_that_keeps_its_means_or_loss_to_itself_breaks_nothing(task: str) -> None:
    found = numbers(reported(task, *examples(task)) | {"means": []})
    less = TASKS[task].measured(found, DETAILS)
    assert less.items() <= measured(task).items()
    del found["loss"]
    assert TASKS[task].measured(found, DETAILS) == found


@pytest.mark.parametrize("task", TASKS)
def test_number_of_means_is_known_beforehand(task: str) -> None:
    outputs, y = examples(task)
    shape = {"language": (4,), "segmentation": (1, 2, 4)}.get(task, (9,))
    assert TASKS[task].output(shape, outputs.shape[-1 if task == "language" else 1]) == tuple(
        outputs.shape[1:]
    )
    wanted = len(reported(task, outputs, y).get("means", []))
    assert TASKS[task].num_means(shape, 3, details=True) == wanted
    assert TASKS[task].num_means(shape, 3, details=False) == (
        0 if task == "classification" else wanted
    )


def test_classification_by_class() -> None:
    outputs, y = examples("classification")
    found, decided = measured("classification"), outputs.argmax(1)
    assert found["loss"] == pytest.approx(F.cross_entropy(outputs, y).item(), rel=1e-6)
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(y, decided))
    for kind, score in (("recall", sklearn.recall_score), ("precision", sklearn.precision_score)):
        assert [found[f"{kind}/{name}"] for name in NAMES] == pytest.approx(
            score(y, decided, average=None).tolist(), rel=1e-6
        )


def test_calibration_error_of_known_confidences() -> None:
    """Of 10 examples that are 0.9 sure, 6 are right: |0.9 - 0.6|.

    Of 10 that are 0.65 sure, 8 are: |0.65 - 0.8|.
    """
    y = torch.zeros(20, dtype=torch.int64)
    confident = torch.tensor([0.9] * 10 + [0.65] * 10)
    wrong = torch.tensor([False] * 6 + [True] * 4 + [False] * 8 + [True] * 2)
    first = torch.where(wrong, 1 - confident, confident)
    outputs = torch.stack([first, 1 - first], 1).log()
    found = TASKS["classification"].measured(
        numbers(reported("classification", outputs, y)), Targets(("a", "b"), details=True)
    )
    assert found["calibration-error"] == pytest.approx(0.5 * 0.3 + 0.5 * 0.15, rel=1e-5)
    assert "precision/b" in found
    assert "recall/b" not in found  # there is none


def test_several_labels() -> None:
    outputs, y = examples("multi-label")
    found, decided = measured("multi-label"), outputs > 0
    assert found["loss"] == pytest.approx(
        F.binary_cross_entropy_with_logits(outputs, y.float()).item(), rel=1e-6
    )
    assert found["accuracy"] == pytest.approx((decided == y).float().mean().item(), rel=1e-6)
    for average in ("micro", "macro"):
        assert found[f"f1-{average}"] == pytest.approx(
            sklearn.f1_score(y, decided, average=average), rel=1e-6
        )
    assert [found[f"f1/{name}"] for name in NAMES] == pytest.approx(
        sklearn.f1_score(y, decided, average=None).tolist(), rel=1e-6
    )


def test_numbers() -> None:
    outputs, y = examples("regression")
    found = measured("regression")
    assert found["loss"] == pytest.approx(sklearn.mean_squared_error(y, outputs), rel=1e-6)
    assert found["rmse"] == pytest.approx(math.sqrt(found["loss"]))
    # In their own units, and against the mean of all sites, which is 0 in standardised ones.
    deviations = np.array(DETAILS.deviations)
    each = np.sqrt(sklearn.mean_squared_error(y, outputs, multioutput="raw_values")) * deviations
    assert [found[f"rmse/{name}"] for name in NAMES] == pytest.approx(each.tolist(), rel=1e-5)
    each = sklearn.mean_absolute_error(y, outputs, multioutput="raw_values") * deviations
    assert [found[f"mae/{name}"] for name in NAMES] == pytest.approx(each.tolist(), rel=1e-5)
    error = (outputs - y).square().sum(0) / y.square().sum(0)
    assert found["r2"] == pytest.approx((1 - error).mean().item(), rel=1e-5)


def test_one_number_is_told_in_its_own_unit() -> None:
    outputs, y = (each[:, :1] for each in examples("regression"))
    found = TASKS["regression"].measured(
        numbers(reported("regression", outputs, y)), Targets(("pressure",), (20.0,))
    )
    error = (20 * (outputs - y)).double()
    assert found["rmse"] == pytest.approx(error.square().mean().sqrt().item(), rel=1e-5)
    assert found["mae"] == pytest.approx(error.abs().mean().item(), rel=1e-5)


def test_language() -> None:
    outputs, y = examples("language")
    loss = F.cross_entropy(outputs.flatten(0, 1), y.flatten()).item()
    found = measured("language", Targets(("token",), token_bytes=4.0))
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["bits-per-byte"] == pytest.approx(loss / math.log(2) / 4, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_maps() -> None:
    """The loss is the mean over examples of the mean over their pixels that count."""
    outputs, y = examples("segmentation")
    found = measured("segmentation")
    each = [
        F.cross_entropy(one[None], target[None], ignore_index=IGNORED).item()
        for one, target in zip(outputs, y, strict=True)
    ]
    assert found["loss"] == pytest.approx(np.mean(each), rel=1e-5)
    counts = y != IGNORED
    scores = sklearn.jaccard_score(y[counts], outputs.argmax(1)[counts], average=None)
    assert [found[f"iou/{name}"] for name in NAMES] == pytest.approx(scores.tolist(), rel=1e-6)
    assert found["mean-iou"] == pytest.approx(scores.mean(), rel=1e-6)


@pytest.mark.parametrize("task", ["classification", "multi-label", "language", "segmentation"])
def test_models_together_predict_their_mean_probability(task: str) -> None:
    outputs, _ = examples(task)
    several = torch.stack([outputs, outputs.flip(0), 2 * outputs])
    if task == "multi-label":
        torch.testing.assert_close(TASKS[task].pooled(several).sigmoid(), several.sigmoid().mean(0))
        return
    dim = {"language": 2}.get(task, 1)
    torch.testing.assert_close(
        TASKS[task].pooled(several).softmax(dim), several.softmax(dim + 1).mean(0)
    )


def test_models_together_predict_their_mean_number() -> None:
    outputs, _ = examples("regression")
    torch.testing.assert_close(
        TASKS["regression"].pooled(torch.stack([outputs, 3 * outputs])), 2 * outputs
    )


def test_metrics_of_means_need_no_loss_and_are_numbers() -> None:
    """A site's policy may withhold the loss alone.

    What another site reports must not make metrics infinite.
    """
    found = numbers(reported("multi-label", *examples("multi-label")))
    del found["loss"]
    assert (
        TASKS["multi-label"].measured(found, DETAILS)["f1-micro"]
        == measured("multi-label")["f1-micro"]
    )
    for task in ("multi-label", "regression", "segmentation"):
        for value in (0.0, 1e30):
            made_up = {
                name: value for name in numbers(reported(task, *examples(task))) if name != "loss"
            }
            assert all(map(math.isfinite, TASKS[task].measured(made_up, DETAILS).values()))
