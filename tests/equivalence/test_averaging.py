"""Averaging strategies: limit cases, closed forms, and Flower's own as a reference."""

import math
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg, Strategy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from client_app import training
from client_app.app import app
from client_app.site import SiteId, site_data
from configuration.config import Config, configuration
from models.flat import FlatModel
from models.networks import build
from simulation.grid import FIRST_NODE, VirtualGrid
from simulation.world import World
from strategies import method
from strategies.averaging import co_learning
from strategies.averaging.adapter import Planned
from strategies.averaging.alone import Alone
from strategies.averaging.average import weighted_metrics
from strategies.averaging.co_learning import next_local_epochs
from strategies.averaging.mean import relative_change
from strategies.averaging.shipped import Shipped
from strategies.randomness import derive
from strategies.records import pack, unpack
from tests.conftest import Run, RunApp, own


def same(one: Run, two: Run) -> bool:
    return all(torch.equal(one.model[name], two.model[name]) for name in one.model)


def distance(one: Run, two: Run) -> float:
    return max((one.model[name] - two.model[name]).abs().max().item() for name in one.model)


# --- runs of the app ------------------------------------------------------------------------------


def test_same_seed_same_model_bit_for_bit_and_another_seed_another(run_app: RunApp) -> None:
    one, two, other = (
        run_app(model={"name": "cnn"}),
        run_app(model={"name": "cnn"}),
        run_app(model={"name": "cnn"}, seed=2),
    )
    assert same(one, two)
    assert one.metrics.drop(columns="seconds").equals(two.metrics.drop(columns="seconds"))
    assert not same(one, other)


def test_ratio_one_and_epsilon_zero_is_fedavg_bit_for_bit(run_app: RunApp) -> None:
    constant = {"epochs": 4, "training.lr-ratio": 1.0}
    co_learning = run_app(strategy="co-learning", co_learning={"epsilon": 0.0}, **constant)
    assert same(co_learning, run_app(strategy="fedavg", **constant))
    assert not same(
        co_learning,
        run_app(
            strategy="co-learning",
            co_learning={"epsilon": 0.0},
            training={"lr_ratio": 0.25},
            epochs=4,
        ),
    )
    assert not same(
        co_learning, run_app(strategy="co-learning", co_learning={"epsilon": 1e5}, **constant)
    )


def test_weighting_by_samples_is_flowers_fedavg(run_app: RunApp) -> None:
    unequal = {"partition.kind": "sizes", "partition.size-ratio": 4.0}
    ours, theirs = (
        run_app(strategy="fedavg", fedavg={"weighting": "samples"}, **unequal),
        run_app(strategy="FedAvg", **unequal),
    )
    assert distance(ours, theirs) < 1e-6  # they add in float32, we in fixed point; two rounds
    assert (
        distance(run_app(strategy="fedavg", fedavg={"weighting": "equal"}, **unequal), theirs)
        > 1e-4
    )


def test_proximal_term_of_weight_zero_is_fedavg_and_of_weight_one_is_not(run_app: RunApp) -> None:
    fedavg = run_app(strategy="FedAvg")
    assert same(run_app(strategy="FedProx", flower={"arguments": "proximal_mu=0.0"}), fedavg)
    near = run_app(strategy="FedProx", flower={"arguments": "proximal_mu=1.0"})
    assert not same(near, fedavg)
    assert near.trace("model-change", "train")[0] < fedavg.trace("model-change", "train")[0]


def test_one_site_is_local_training_with_warm_restarts(run_app: RunApp) -> None:
    """K = 1: the same steps in a plain loop of torch.

    The rate restarts with each of two rounds of two epochs.
    """
    changes = {
        "num-sites": 1,
        "min-sites": 1,
        "epochs": 4,
        "co-learning.local-epochs": 2,
        "model.name": "mlp",
        "co-learning.epsilon": 0.0,
        "training.clip-norm": 0.0,
    }
    run = run_app(**changes)
    config = Config.read(changes)
    data = site_data(config, SiteId(0, 1, ""), tuple("0123456789"), None)
    network = build("mlp", (1, 8, 8), 10, derive(config.seed, "model"))
    for round_number in (1, 2):
        sgd = torch.optim.SGD(network.parameters(), 0.05, 0.9, weight_decay=1e-4)
        order = torch.Generator().manual_seed(derive(config.seed, "order", 0, round_number))
        steps = math.ceil(len(data.train.y) / 32)
        for epoch in range(2):
            for step, (x, y) in enumerate(training.batches(data.train, 32, order, None)):
                sgd.param_groups[0]["lr"] = 0.05 * 0.25 ** ((epoch * steps + step) / (2 * steps))
                sgd.zero_grad()
                torch.nn.functional.cross_entropy(network(x), y).backward()
                sgd.step()
    for name, value in network.state_dict().items():
        # These are 180 steps of float32 in another order.
        torch.testing.assert_close(run.model[name], value, rtol=1e-4, atol=1e-5)


def test_rate_at_both_ends_of_every_round(run_app: RunApp) -> None:
    run = run_app(
        epochs=6,
        co_learning={"local_epochs": 2, "epsilon": 0.0, "lr_envelope": 0.5},
        training={"lr": 0.1, "lr_ratio": 0.25},
    )
    steps = 2 * math.ceil(479 / 32)  # 1,797 digits over 3 sites, less a fifth
    tops = [0.1, 0.05, 0.025]
    assert run.trace("lr-first", "train") == pytest.approx(tops)
    assert run.trace("lr-last", "train") == pytest.approx(
        [top * 0.25 ** (1 - 1 / steps) for top in tops]
    )


def test_rate_of_fedavg_decays_over_the_run_without_restart(run_app: RunApp) -> None:
    run = run_app(
        strategy="fedavg", epochs=4, training={"lr": 0.1, "lr_ratio": 0.01, "lr_steps": "epoch"}
    )
    assert run.trace("lr-first", "train") == pytest.approx(
        [0.1 * 0.01 ** (k / 4) for k in range(4)]
    )


def test_local_epochs_only_double_and_only_after_the_average_stood_still(run_app: RunApp) -> None:
    run = run_app(
        epochs=30,
        co_learning={"local_epochs": 1, "max_local_epochs": 8, "epsilon": 0.08},
        training={"lr": 0.02},
    )
    epochs, changes = run.trace("local-epochs", "train"), run.trace("model-change", "train")
    assert sum(epochs) == 30
    assert max(epochs) > 2  # it did double, more than once
    for before, after, change in zip(
        epochs[:-2], epochs[1:-1], changes, strict=False
    ):  # the last round takes what is left
        assert after == (min(2 * before, 8) if change <= 0.08 else before)


def test_local_epochs_never_exceed_the_cap_or_what_is_left(run_app: RunApp) -> None:
    run = run_app(epochs=9, co_learning={"local_epochs": 1, "max_local_epochs": 3, "epsilon": 1e5})
    assert run.trace("local-epochs", "train") == [1, 2, 3, 3]


def test_sites_alone_do_not_learn_from_each_other(run_app: RunApp) -> None:
    """A site's model is the same whatever the others do, here: whether site 0 answers at all."""
    from safetensors.torch import load_file

    def silenced(site: int, message: Message, reply: Message) -> Message | None:
        return None if site == 0 and message.metadata.message_type == "train" else reply

    alone, silent = run_app(strategy="local"), run_app(silenced, strategy="local")
    for site, equal in ((0, False), (1, True), (2, True)):
        one, two = (load_file(run.folder / f"model-{site}.safetensors") for run in (alone, silent))
        assert all(torch.equal(one[name], two[name]) for name in one) == equal


def test_ensemble_trains_as_local_and_predicts_better(run_app: RunApp) -> None:
    local, ensemble = run_app(strategy="local", epochs=8), run_app(strategy="ensemble", epochs=8)
    assert ensemble.trace("loss", "train") == local.trace("loss", "train")
    assert ensemble.trace("loss")[-1] < local.trace("loss")[-1]
    assert ensemble.trace("accuracy-single")[-1] < ensemble.trace("accuracy")[-1]


def test_centralized_trains_on_everything_once(run_app: RunApp) -> None:
    run = run_app(strategy="centralized")
    assert run.trace("num-examples", "train", "0") == [1437, 1437]
    assert run.trace("num-examples", "test", "0") == [360, 360]
    assert "1" not in set(run.metrics["site"])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_sharpness_aware_training_is_open_to_every_strategy(
    run_app: RunApp, optimizer: str
) -> None:
    plain = run_app(strategy="FedAvgM", training={"optimizer": optimizer, "lr": 0.01})
    assert not same(
        plain,
        run_app(
            strategy="FedAvgM", training={"optimizer": optimizer, "lr": 0.01, "sam_radius": 0.1}
        ),
    )


# --- strategies by themselves ---------------------------------------------------------------------


def replies(vectors: list[dict[str, Tensor]], counts: list[int]) -> list[Message]:
    VirtualGrid(app, World().sites(1, 0), {})  # gives this process a run to make messages in
    made = []
    for site, (vector, count) in enumerate(zip(vectors, counts, strict=True)):
        question = Message(RecordDict(), FIRST_NODE + site, "train")
        metrics = MetricRecord({"loss": float(site), "num-examples": count})
        reply = Message(RecordDict({"arrays": pack(vector), "metrics": metrics}), reply_to=question)
        reply.metadata.__dict__["_src_node_id"] = FIRST_NODE + site
        made.append(reply)
    return made


def vectors(num_sites: int, size: int, stats: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(6)
    return [
        {
            "x": torch.randn(size, generator=generator),
            "stats": torch.rand(stats, generator=generator),
        }
        for _ in range(num_sites)
    ]


def nodes(counts: list[int]) -> dict[int, float]:
    return {FIRST_NODE + site: count / sum(counts) for site, count in enumerate(counts)}


def planned(name: str, shares: dict[int, float]) -> Planned:
    plan = configuration(strategy=name).plan
    assert isinstance(plan, method.RoundPlan)
    return Planned(plan, shares)


def started(strategy: Planned | Shipped | Alone, before: ArrayRecord, num_sites: int) -> None:
    config = ConfigRecord({"local-epochs": 1, "lr": 0.1})
    list(
        strategy.configure_train(
            1, before, config, VirtualGrid(app, World().sites(num_sites, 0), {})
        )
    )


def test_average_is_that_of_flower_and_batch_norm_statistics_are_averaged_too() -> None:
    counts, models = [10, 20, 70], vectors(3, 1000, 8)
    strategy = planned("fedavg", nodes(counts))
    started(strategy, pack(models[0]), 3)
    ours, metrics = strategy.aggregate_train(1, iter(replies(models, counts)))
    theirs, _ = FedAvg().aggregate_train(1, replies(models, counts))
    assert ours is not None
    assert theirs is not None
    assert metrics is not None
    for name in ("x", "stats"):
        torch.testing.assert_close(unpack(ours[name]), unpack(theirs[name]).float())
    assert metrics["loss"] == pytest.approx(0.2 * 1 + 0.7 * 2)
    assert metrics["num-examples"] == 100
    assert metrics["model-change"] == relative_change(unpack(ours["x"]), models[0]["x"])


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(5)))
def test_order_of_replies_changes_neither_model_nor_metrics(order: list[int]) -> None:
    counts, models = [10, 20, 70, 3, 9], vectors(5, 100, 4)
    results = []
    for places in (list(range(5)), order):
        for build_strategy in (
            lambda shares: planned("fedavg", shares),
            lambda shares: Shipped(FedAvg(), shares),
        ):
            strategy = build_strategy(nodes(counts))
            started(strategy, pack(models[0]), 5)
            made = replies(models, counts)
            results.append(strategy.aggregate_train(1, [made[place] for place in places]))
    for one, two in zip(results[:2], results[2:], strict=True):
        assert one[0] is not None
        assert two[0] is not None
        assert all(one[0][name].data == two[0][name].data for name in ("x", "stats"))
    assert results[0][1] == results[2][1]


def test_shipped_strategy_sees_the_model_and_never_the_statistics() -> None:
    """FedMedian takes the median of the models; the statistics beside them are plainly averaged."""
    from flwr.serverapp.strategy import FedMedian

    counts, models = [1, 1, 1], vectors(3, 50, 4)
    strategy = Shipped(FedMedian(), nodes(counts))
    started(strategy, pack(models[0]), 3)
    arrays, _ = strategy.aggregate_train(1, replies(models, counts))
    assert arrays is not None
    stack = {name: torch.stack([model[name] for model in models]) for name in ("x", "stats")}
    torch.testing.assert_close(unpack(arrays["x"]), stack["x"].median(0).values)
    torch.testing.assert_close(unpack(arrays["stats"]), stack["stats"].mean(0))


def test_no_reply_is_no_model() -> None:
    for strategy in (planned("fedavg", {FIRST_NODE: 1.0}), Alone({FIRST_NODE: 0}, ensemble=False)):
        started(strategy, pack(vectors(1, 5, 0)[0]), 1)
        assert strategy.aggregate_train(1, iter(())) == (None, None)


def test_metrics_are_weighted_by_examples() -> None:
    contents = [
        RecordDict({"metrics": MetricRecord({"loss": loss, "num-examples": n})})
        for loss, n in ((1.0, 1), (4.0, 2))
    ]
    assert dict(weighted_metrics(contents, "num-examples")) == {"loss": 3.0, "num-examples": 3.0}


def test_relative_change_is_that_of_the_whole_vector() -> None:
    old, new = torch.randn(2_500_000), torch.randn(2_500_000)  # more than one block
    expected = (
        torch.linalg.vector_norm((new - old).double()) / torch.linalg.vector_norm(old.double())
    ).item()
    assert relative_change(new, old) == pytest.approx(expected, rel=1e-6)
    assert relative_change(old, old) == 0


@given(st.integers(1, 100), st.floats(0, 1), st.floats(0, 1), st.integers(1, 100))
def test_local_epochs_never_shrink_and_grow_only_by_doubling_up_to_the_cap(
    now: int, change: float, epsilon: float, cap: int
) -> None:
    after = next_local_epochs(now, change, epsilon, cap)
    assert after == now or (change <= epsilon and after == min(2 * now, cap) > now)


def test_local_epochs_at_the_borders() -> None:
    assert next_local_epochs(2, 0.05, 0.05, 16) == 4
    assert next_local_epochs(2, 0.0501, 0.05, 16) == 2
    assert next_local_epochs(12, 0.0, 0.05, 16) == 16
    assert next_local_epochs(2, 0.0, 0.0, 16) == 2


def test_co_learning_cycles_from_its_envelope_and_takes_no_more_epochs_than_are_left() -> None:
    keys = co_learning.Keys(local_epochs=2, max_local_epochs=4, epsilon=0.1, lr_envelope=0.5)
    plan = co_learning.plan(keys, method.Run(0.1, 0.0))
    state = plan.init(torch.ones(3))
    assert plan.instruct(state, method.RoundStart(3, 4.0, 32, 10.0)) == method.LocalTraining(
        0.025, (0.0, 1.0), epochs=2
    )
    assert plan.instruct(state, method.RoundStart(1, 31.0, 32, 10.0)).epochs == 1
    still, moved = (
        plan.absorb(state, method.Mean({"x": torch.full((3,), value)}, 1.0))
        for value in (1.05, 1.2)
    )
    assert (still.local_epochs, moved.local_epochs) == (4, 2)
    assert plan.absorb(still, method.Mean({"x": still.x}, 1.0)).local_epochs == 4  # the cap


def test_plan_of_rounds_runs_in_flowers_own_loop_and_inside_its_wrappers() -> None:
    """FedAvg as a plan in ``Strategy.start``, alone and wrapped for differential privacy.

    The wrapper is that for central differential privacy by fixed clipping. With a clipping norm
    that no update reaches and hardly any noise, it changes nothing; with a small one, the model
    moves by at most that norm.
    """
    config = configuration(
        num_sites=2, strategy="fedavg", model={"name": "mlp"}, epochs=2, fedavg={"local_epochs": 1}
    )
    started = FlatModel(build("mlp", (1, 8, 8), 10, 1)).x

    def final(clip: float | None) -> Tensor:
        grid = VirtualGrid(app, World().sites(2, 1), config.flat())
        strategy: Strategy = Planned(config.plan, total=2)  # type: ignore[arg-type]
        if clip is not None:
            strategy = DifferentialPrivacyServerSideFixedClipping(strategy, 1e-9, clip, 2)
        agreed = ConfigRecord({"classes": list("0123456789"), "server-round": 1})
        result = strategy.start(
            grid, pack({"x": started}), 2, train_config=agreed, evaluate_config=agreed
        )
        return unpack(result.arrays["x"]).float()

    alone = final(None)
    assert float((alone - started).norm()) > 0.5
    torch.testing.assert_close(final(1e3), alone, rtol=1e-4, atol=1e-5)
    assert float((final(0.1) - started).norm()) <= 2 * 0.1 + 1e-4  # two rounds


def test_batch_norm_network_trains_averages_and_evaluates(run_app: RunApp) -> None:
    """Torchvision's ResNet-18: sites evaluate the saved model with its averaged statistics."""
    run = run_app(
        model={"name": "torchvision:resnet18"},
        data={"source": "tests.data:few"},
        training={"lr": 0.01},
        num_sites=2,
        epochs=2,
    )
    assert run.trace("loss", "train")[1] < run.trace("loss", "train")[0]
    assert run.model["1.bn1.num_batches_tracked"] == 0  # integer buffers stay where they are
    assert not torch.equal(run.model["1.bn1.running_mean"], torch.zeros(64))
    assert (run.model["1.bn1.running_var"] > 0).all()
    assert reproduced(run, "torchvision:resnet18", "tests.data:few", 2) == pytest.approx(
        run.trace("accuracy")[-1]
    )


def test_batch_norm_statistics_travel_beside_a_strategy_of_flower(run_app: RunApp) -> None:
    common: dict[str, Any] = {
        "model.name": "resnet20",
        "training.clip-norm": 0.0,
        "data.source": "tests.data:few",
    }
    ours, flowers = (
        run_app(
            strategy=name, partition={"kind": "sizes"}, **common, **own(name, weighting="samples")
        )
        for name in ("fedavg", "FedAvg")
    )
    for name, value in ours.model.items():
        # The two differ in the order of summation, for two rounds.
        torch.testing.assert_close(flowers.model[name], value, rtol=1e-4, atol=1e-5)
    assert not torch.equal(ours.model["stem.1.running_mean"], torch.zeros(16))


def test_saved_model_reproduces_the_reported_accuracy(run_app: RunApp) -> None:
    run = run_app(model={"name": "cnn"}, epochs=4)
    assert reproduced(run, "cnn", "digits", 3) == pytest.approx(run.trace("accuracy")[-1])


def reproduced(run: Run, name: str, source: str, num_sites: int) -> float:
    """Accuracy of the saved model on all sites' test parts, without any of the app's evaluation."""
    config = configuration(num_sites=num_sites, data={"source": source})
    network = build(name, (1, 8, 8), 10, 99)
    network.load_state_dict(run.model)
    network.eval()
    right = total = 0
    for site in range(num_sites):
        test = site_data(config, SiteId(site, num_sites, ""), tuple("0123456789"), None).test
        with torch.no_grad():
            right += int((network(training.prepare(test.x)).argmax(1) == test.y).sum())
        total += len(test.y)
    return right / total


def test_flat_model_of_resnet18_has_its_sizes() -> None:
    model = FlatModel(build("torchvision:resnet18", (3, 32, 32), 1000, 1))
    assert (model.x.numel(), model.num_stats) == (11_689_512, 9600)
