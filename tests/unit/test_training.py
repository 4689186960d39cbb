"""Local training: gradients, batches, the loop, evaluation."""

import math
from collections.abc import Iterator
from itertools import chain

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from client_app import training
from client_app.site import network_of
from client_app.training import Batch, Gradient, accumulated, plain, proximal, sharpness_aware
from configuration.config import Config
from datasets.site import Part
from models.flat import FlatModel
from models.tasks import TASKS


def normed() -> FlatModel:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return FlatModel(
            nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        )


def batch(n: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(n, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def gradient_of(model: FlatModel) -> Gradient:
    return plain(model, lambda each: F.cross_entropy(model.network(each[0]), each[1]))


def quadratic(curvature: Tensor) -> Gradient:
    """f(x) = 1/2 x' A x, A diagonal."""

    def gradient(x: Tensor, _: Batch, *, track: bool = True) -> tuple[Tensor, Tensor]:
        return 0.5 * (curvature * x * x).sum(), curvature * x

    return gradient


def test_plain_gradient_is_that_of_autograd() -> None:
    model, (x, y) = normed(), batch()
    value, grad = gradient_of(model)(model.x, (x, y))
    other = normed().network
    expected = F.cross_entropy(other(x), y)
    expected.backward()
    torch.testing.assert_close(value, expected.detach())
    theirs = [parameter.grad for parameter in other.parameters() if parameter.grad is not None]
    torch.testing.assert_close(grad, torch.cat([each.reshape(-1) for each in theirs]))


def test_gradient_elsewhere_leaves_the_model_where_it_is() -> None:
    model = normed()
    before = model.x.clone()
    elsewhere = before + 1
    _, grad = gradient_of(model)(elsewhere, batch())
    grad = grad.clone()
    assert torch.equal(model.x, before)
    model.x.copy_(elsewhere)
    torch.testing.assert_close(gradient_of(model)(model.x, batch())[1], grad)


def test_second_call_starts_from_zero() -> None:
    model = normed()
    gradient = gradient_of(model)
    first = gradient(model.x, batch())[1].clone()
    model.load(model.x.clone(), normed().stats)
    assert torch.equal(gradient(model.x, batch())[1], first)


def test_sam_on_a_quadratic_in_closed_form() -> None:
    """At x = (1, 1) with A = diag(3, 4): g = (3, 4), |g| = 5.

    So the gradient is taken at (1 + 3 rho / 5, 1 + 4 rho / 5).
    """
    curvature = torch.tensor([3.0, 4.0], dtype=torch.float64)
    value, grad = sharpness_aware(quadratic(curvature), 0.5)(
        torch.ones(2, dtype=torch.float64), batch()
    )
    torch.testing.assert_close(grad, curvature * torch.tensor([1.3, 1.4], dtype=torch.float64))
    assert value == 3.5  # the loss at x, not at the perturbed point


def test_sam_with_radius_zero_is_the_base_gradient() -> None:
    base = quadratic(torch.ones(3))
    assert sharpness_aware(base, 0.0) is base


@pytest.mark.parametrize("rho", [0.01, 0.3])
def test_sam_perturbation_has_norm_rho(rho: float) -> None:
    model = normed()
    seen: list[tuple[Tensor, bool]] = []

    def watched(x: Tensor, each: Batch, *, track: bool = True) -> tuple[Tensor, Tensor]:
        seen.append((x.clone(), track))
        return gradient_of(model)(x, each, track=track)

    sharpness_aware(watched, rho)(model.x, batch())
    (first, tracked), (second, also) = seen
    # In float32.
    torch.testing.assert_close(
        torch.linalg.vector_norm(second - first).item(), rho, rtol=1e-4, atol=0
    )
    assert (tracked, also) == (True, False)


def test_sam_at_a_minimum_does_not_divide_by_zero() -> None:
    _, grad = sharpness_aware(quadratic(torch.ones(2)), 0.1)(torch.zeros(2), batch())
    assert grad.tolist() == [0.0, 0.0]


def test_second_pass_of_sam_leaves_batch_norm_statistics_alone() -> None:
    model, other = normed(), normed()
    sharpness_aware(gradient_of(model), 0.5)(model.x, batch())
    gradient_of(other)(other.x, batch())
    assert torch.equal(model.stats, other.stats)
    assert model.network[1].num_batches_tracked == 1  # type: ignore[index]
    assert not torch.equal(model.stats, normed().stats)


@pytest.mark.parametrize("size", [1, 3, 16, 100])
@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_gradient_of_parts_is_that_of_the_batch(size: int, rho: float) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = FlatModel(
            nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))
        )
    loss, whole = sharpness_aware(gradient_of(model), rho)(model.x, batch())
    wanted = loss, whole.clone()  # the next call overwrites it
    found = sharpness_aware(accumulated(gradient_of(model), size), rho)(model.x, batch())
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_proximal_term_pulls_towards_the_anchor() -> None:
    x, anchor = torch.tensor([2.0, 3.0]), torch.tensor([1.0, 5.0])
    _, grad = proximal(quadratic(torch.ones(2)), anchor, 0.1)(x, batch())
    torch.testing.assert_close(grad, torch.tensor([2 + 0.1, 3 - 0.2]))
    base = quadratic(torch.ones(2))
    assert proximal(base, anchor, 0.0) is base


def part(n: int) -> Part:
    return Part(torch.arange(float(n))[:, None], torch.arange(n) % 3)


@pytest.mark.parametrize(("n", "size"), [(10, 3), (33, 32), (32, 32), (5, 100), (65, 32)])
def test_epoch_visits_each_example_once_in_batches_of_nearly_equal_size(n: int, size: int) -> None:
    found = list(training.batches(part(n), size, torch.Generator().manual_seed(1), None))
    assert torch.equal(torch.cat([x for x, _ in found])[:, 0].sort().values, torch.arange(float(n)))
    assert all(torch.equal(x[:, 0].long() % 3, y) for x, y in found)
    sizes = [len(y) for _, y in found]
    assert len(found) == math.ceil(n / size) == training.num_batches(n, size)
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("n", "count"), [(10, 3), (9, 3), (1, 1), (2, 5), (0, 1)])
def test_nth_part_is_that_of_tensor_split(n: int, count: int) -> None:
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    found = [training.nth_part(order, count, number).tolist() for number in range(count)]
    assert found == [each.tolist() for each in order.tensor_split(count)]


def test_epochs_of_one_generator_differ_and_those_of_one_seed_agree() -> None:
    def order(generator: torch.Generator) -> list[float]:
        return torch.cat([x for x, _ in training.batches(part(50), 8, generator, None)])[
            :, 0
        ].tolist()

    one, two = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    first = order(one)
    assert first == order(two)
    assert first != order(one)


def test_pictures_are_scaled_and_features_are_not() -> None:
    assert training.prepare(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-2.0, 2.0]
    assert training.prepare(torch.tensor([0.5], dtype=torch.float16)).tolist() == [0.5]


def test_flip_crop_yields_every_crop_of_the_padded_picture_and_its_mirror() -> None:
    picture = torch.arange(1, 129, dtype=torch.uint8).reshape(1, 2, 8, 8)
    padded = F.pad(picture, (1, 1, 1, 1))[0]
    crops = [padded[:, r : r + 8, c : c + 8] for r in range(3) for c in range(3)]
    allowed = {tuple(crop.flatten().tolist()) for each in crops for crop in (each, each.flip(2))}
    found = training.flip_crop(picture.expand(500, -1, -1, -1), torch.Generator().manual_seed(1))
    assert found.dtype == torch.uint8
    # 18 equally likely outcomes: one of them missing in 500 draws has a probability of
    # 18 (17/18)^500 = 7e-12.
    assert {tuple(each.flatten().tolist()) for each in found} == allowed


@pytest.mark.parametrize("nesterov", [False, True])
def test_loop_is_torchs_own_sgd_with_this_schedule(nesterov: bool) -> None:
    model, reference = normed(), normed().network
    batches = [batch(8), batch(16), batch(12)]
    optimizers = training.optimizers("sgd", model, 0.1, 0.9, nesterov, 0.01)

    def epoch() -> Iterator[Batch]:
        return iter(batches)

    loss, count = training.train(
        model, gradient_of(model), optimizers, chain(epoch(), epoch()), lambda k: 0.1 / (1 + k), 0.5
    )
    plain_sgd = torch.optim.SGD(
        reference.parameters(), 0.1, 0.9, weight_decay=0.01, nesterov=nesterov
    )
    losses = []
    for k, (x, y) in enumerate(batches * 2):
        plain_sgd.param_groups[0]["lr"] = 0.1 / (1 + k)
        plain_sgd.zero_grad()
        value = F.cross_entropy(reference(x), y)
        value.backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        plain_sgd.step()
        losses.append(value.item())
    expected = torch.cat([parameter.detach().reshape(-1) for parameter in reference.parameters()])
    torch.testing.assert_close(model.x, expected)
    assert count == 6
    assert loss == pytest.approx(sum(losses) / 6)


def test_adamw_is_torchs_own() -> None:
    model, reference = normed(), normed().network
    optimizers = training.optimizers("adamw", model, 0.01, 0.8, False, 0.1)
    training.train(model, gradient_of(model), optimizers, [batch()] * 3, lambda _: 0.01, 0.0)
    adamw = torch.optim.AdamW(reference.parameters(), 0.01, (0.8, 0.999), weight_decay=0.1)
    for _ in range(3):
        adamw.zero_grad()
        F.cross_entropy(reference(batch()[0]), batch()[1]).backward()
        adamw.step()
    expected = torch.cat([parameter.detach().reshape(-1) for parameter in reference.parameters()])
    # Where a gradient is nearly 0, as for a bias before BatchNorm, AdamW divides rounding errors by
    # their own size.
    bias = slice(48, 56)
    torch.testing.assert_close(
        torch.cat([model.x[:48], model.x[56:]]), torch.cat([expected[:48], expected[56:]])
    )
    assert model.x[bias].shape == (8,)


def predictor(model: FlatModel) -> tuple[Part, Tensor]:
    data = Part(*batch(50))
    with torch.no_grad():
        model.network.eval()
        return data, model.network(data.x)


def test_evaluation_of_one_model() -> None:
    model = normed()
    data, logits = predictor(model)
    result = training.evaluate(
        TASKS["classification"],
        model.network,
        model,
        model.x[None].clone(),
        model.stats[None],
        data,
    )
    assert result["accuracy"] == (logits.argmax(1) == data.y).sum().item() / 50
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, data.y).item(), rel=1e-5)
    assert result.keys() == {"loss", "accuracy"}
    assert model.network.training


def test_evaluation_takes_no_more_examples_at_once_than_training() -> None:
    """With 1024 windows of language and their logits in memory, micro-batch would save nothing."""
    model, sizes = normed(), list[int]()
    data, _ = predictor(model)

    def predict(x: Tensor) -> Tensor:
        sizes.append(len(x))
        logits: Tensor = model.network(x)
        return logits

    network = network_of(Config.read({"computing.micro-batch": 20}), (1, 8, 8), 10)
    tested = network._replace(model=model, predict=predict).test(
        model.x[None].clone(), model.stats[None], data
    )
    assert tested["loss"] == pytest.approx(
        F.cross_entropy(predictor(model)[1], data.y).item(), rel=1e-5
    )
    assert sizes == [20, 20, 10]


def test_evaluation_of_an_ensemble_averages_probabilities() -> None:
    model = normed()
    xs = torch.stack([model.x + k for k in range(3)])
    statistics = torch.stack([model.stats + k for k in range(3)])
    probabilities = []
    for x, stats in zip(xs, statistics, strict=True):
        model.load(x, stats)
        data, logits = predictor(model)
        probabilities.append(logits.softmax(1))
    mean = torch.stack(probabilities).mean(0)
    result = training.evaluate(TASKS["classification"], model.network, model, xs, statistics, data)
    assert result["accuracy"] == (mean.argmax(1) == data.y).sum().item() / 50
    assert result["loss"] == pytest.approx(F.nll_loss(mean.log(), data.y).item(), rel=1e-5)
    single = [(each.argmax(1) == data.y).float().mean().item() for each in probabilities]
    assert result["accuracy-single"] == pytest.approx(sum(single) / 3)
    votes = torch.stack([each.argmax(1) for each in probabilities]).mode(0).values
    assert result["accuracy-vote"] == (votes == data.y).sum().item() / 50
