"""What :mod:`benchmarks.speed` compares with: plain PyTorch loops, and FedAvg in other frameworks.

All train the same steps on the same splits: the plain loops draw even the batches of the app. Each
imports its own framework only, so that it starts no later than it must.
"""

import copy
import math
import os
import time
from collections.abc import Iterable, Iterator
from functools import cache, partial, reduce
from itertools import chain, count
from operator import add
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from datasets.site import Part, SiteData, select, simulated_splits
from datasets.sources import digits
from models.networks import build
from strategies.randomness import derive

if TYPE_CHECKING:
    from flwr.app import Context, Message, MetricRecord
    from flwr.serverapp import Grid

SEED, SITES, PEERS, BATCH, LR = 1, 10, 8, 32, 0.05
SGD: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-4}  # of FedAvg


class Run(NamedTuple):
    """What a contender did.

    Attributes:
        ends: when its rounds or exchanges ended, in seconds of the clock.
        loss, accuracy: of the last models, over the sites' test examples.
    """

    ends: list[float]
    loss: float
    accuracy: float


@cache
def sites(number: int) -> list[SiteData]:
    """The sites of the app's digits."""
    options: dict[str, Any] = {
        "kind": "iid",
        "alpha": 1.0,
        "classes_per_site": 1,
        "size_ratio": 1.0,
        "iid_fraction": 0.0,
        "test_part": "own",
        "test_fraction": 0.2,
    }
    examples, generator = digits(), np.random.default_rng(derive(SEED, "partition"))
    splits = simulated_splits(examples, number, generator, **options)
    return [select(examples, [split]) for split in splits]


def small_cnn() -> nn.Module:
    """The network of the app."""
    return build("cnn", (1, 8, 8), 10, derive(SEED, "model"))


def prepare(x: Tensor) -> Tensor:
    """Pictures (bytes) as the network takes them."""
    return x.float().div_(63.75).sub_(2)


def batches(part: Part, site: int, number: int) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch of a site, that of the app with this number."""
    generator = torch.Generator().manual_seed(derive(SEED, "order", site, number))
    order = torch.randperm(len(part.y), generator=generator)
    for chosen in order.tensor_split(math.ceil(len(order) / BATCH)):
        yield prepare(part.x[chosen]), part.y[chosen]


def train(network: nn.Module, part: Part, site: int, number: int) -> float:
    """One epoch of SGD; the mean loss."""
    sgd = torch.optim.SGD(network.parameters(), LR, **SGD)
    network.train()
    losses = []
    for x, y in batches(part, site, number):
        sgd.zero_grad()
        loss = F.cross_entropy(network(x), y)
        loss.backward()
        sgd.step()
        losses.append(loss.detach())
    return torch.stack(losses).mean().item()


@torch.no_grad()
def test(network: nn.Module, part: Part) -> tuple[float, float]:
    """Loss and accuracy."""
    network.eval()
    logits = network(prepare(part.x))
    right = logits.argmax(1) == part.y
    return F.cross_entropy(logits, part.y).item(), right.float().mean().item()


def overall(found: Iterable[tuple[float, float]], everybody: list[SiteData]) -> tuple[float, float]:
    """Loss and accuracy over all examples, of those of each site."""
    weights = [len(data.test.y) for data in everybody]
    loss, accuracy = np.average(list(found), axis=0, weights=weights).tolist()
    return loss, accuracy


# Plain loops.


def fedavg(epochs: int) -> Run:
    """FedAvg in a loop, a round an epoch."""
    ends, everybody, network = [], sites(SITES), small_cnn()
    for number in range(epochs):
        sent = copy.deepcopy(network.state_dict())
        total: dict[str, Tensor] = {}
        for site, data in enumerate(everybody):
            network.load_state_dict(sent)
            train(network, data.train, site, number + 1)
            for key, value in network.state_dict().items():
                total[key] = total[key].add_(value) if key in total else value.clone()
        network.load_state_dict({key: value / SITES for key, value in total.items()})
        found = [test(network, data.test) for data in everybody]
        ends.append(time.time())
    return Run(ends, *overall(found, everybody))


def ring(epochs: int) -> Run:
    """D-PSGD on a ring in a loop: the mean of three neighbours, by hand."""
    ends, everybody = [], sites(PEERS)
    networks = [small_cnn() for _ in everybody]
    optimizers = [torch.optim.SGD(network.parameters(), LR) for network in networks]
    streams = [
        chain.from_iterable(map(partial(batches, data.train, peer), count()))
        for peer, data in enumerate(everybody)
    ]
    for _ in range(epochs * math.ceil(len(everybody[0].train.y) / BATCH)):
        for network, sgd, stream in zip(networks, optimizers, streams, strict=True):
            x, y = next(stream)
            sgd.zero_grad()
            F.cross_entropy(network(x), y).backward()
            sgd.step()
        with torch.no_grad():
            before = [[p.clone() for p in network.parameters()] for network in networks]
            for peer, network in enumerate(networks):
                left, right = before[peer - 1], before[(peer + 1) % PEERS]
                for p, a, b, c in zip(network.parameters(), left, before[peer], right, strict=True):
                    p.copy_((a + b + c) / 3)
        ends.append(time.time())
    found = (test(network, data.test) for network, data in zip(networks, everybody, strict=True))
    return Run(ends, *overall(found, everybody))


# Other frameworks.


def flower(epochs: int) -> Run:
    """Flower's own FedAvg on its Ray engine."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    client, server, ends, found = ClientApp(), ServerApp(), list[float](), dict[str, Any]()

    def received(message: "Message") -> tuple[nn.Module, Any]:
        content: Any = message.content
        network = small_cnn()
        network.load_state_dict(content["arrays"].to_torch_state_dict())
        return network, content["config"]

    @client.train()
    def _(message: "Message", context: "Context") -> "Message":
        site = int(context.node_config["partition-id"])
        (network, order), part = received(message), sites(SITES)[site].train
        loss = train(network, part, site, order["server-round"])
        metrics = MetricRecord({"loss": loss, "num-examples": len(part.y)})
        answer = RecordDict({"arrays": ArrayRecord(network.state_dict()), "metrics": metrics})
        return Message(answer, reply_to=message)

    @client.evaluate()
    def _(message: "Message", context: "Context") -> "Message":
        part = sites(SITES)[int(context.node_config["partition-id"])].test
        loss, accuracy = test(received(message)[0], part)
        metrics = MetricRecord({"loss": loss, "accuracy": accuracy, "num-examples": len(part.y)})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    class Timed(FedAvg):
        def aggregate_evaluate(
            self, server_round: int, replies: Iterable[Message]
        ) -> "MetricRecord | None":
            metrics = super().aggregate_evaluate(server_round, replies)
            found.update(metrics or {})
            ends.append(time.time())
            return metrics

    @server.main()
    def _(grid: "Grid", context: "Context") -> None:
        initial = ArrayRecord(small_cnn().state_dict())
        Timed(fraction_train=1.0, fraction_evaluate=1.0).start(grid, initial, num_rounds=epochs)

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, SITES, backend_config=resources)  # type: ignore[arg-type]
    return Run(ends, found["loss"], found["accuracy"])


def pfl_research(epochs: int) -> Run:
    """pfl-research, as it is shipped: a user's batches are the same ones in every round."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.data.sampling import MinimizeReuseUserSampler
    from pfl.hyperparam.base import NNTrainHyperParams
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = small_cnn()

        def loss(self, x: Tensor, y: Tensor) -> Tensor:
            self.train()
            return F.cross_entropy(self.network(prepare(x)), y)

        def metrics(self, x: Tensor, y: Tensor) -> dict[str, Any]:
            loss, accuracy = test(self.network, Part(x, y))
            return {
                "loss": Weighted.from_unweighted(loss, len(y)),
                "accuracy": Weighted.from_unweighted(accuracy, len(y)),
            }

    users = [PyTorchTensorDataset(tuple(data.train)) for data in sites(SITES)]
    tests = [PyTorchTensorDataset(tuple(data.test)) for data in sites(SITES)]
    ends, found = list[float](), dict[str, float]()

    class Tests(TrainingProcessCallback):  # type: ignore[misc]
        def after_central_iteration(
            self, aggregate_metrics: Any, model: Any, *, central_iteration: int
        ) -> tuple[bool, Any]:
            metrics = reduce(add, (model.evaluate(each) for each in tests))
            found.update(metrics.to_simple_dict(to_lowercase=True))
            ends.append(time.time())
            return False, Metrics()

    network = Network()
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=epochs,
            evaluation_frequency=epochs,  # on users' training parts, in the first round only
            train_cohort_size=SITES,
            val_cohort_size=0,
        ),
        SimulatedBackend(
            FederatedDataset(users.__getitem__, MinimizeReuseUserSampler(range(SITES))), None
        ),
        PyTorchModel(
            network, partial(torch.optim.SGD, **SGD), torch.optim.SGD(network.parameters(), lr=1.0)
        ),
        NNTrainHyperParams(local_batch_size=BATCH, local_num_epochs=1, local_learning_rate=LR),
        callbacks=[Tests()],
        send_metrics_to_platform=False,
    )
    return Run(ends, found["loss"], found["accuracy"])


def blazefl(epochs: int) -> Run:
    """BlazeFL's FedAvg with a thread a core; its own trainer would leave out the momentum."""
    from blazefl.contrib import (
        FedAvgBaseServerHandler,
        FedAvgThreadPoolClientTrainer,
        FedAvgUplinkPackage,
    )
    from blazefl.core import deserialize_model, serialize_model

    everybody = sites(SITES)
    users = [TensorDataset(prepare(data.train.x), data.train.y) for data in everybody]
    tests = [TensorDataset(prepare(data.test.x), data.test.y) for data in everybody]

    class Models:
        def select_model(self, model_name: str) -> nn.Module:
            return small_cnn()

    class Dataset:
        def get_dataloader(
            self, type_: Any, cid: int, batch_size: int, generator: torch.Generator
        ) -> DataLoader[Any]:
            return DataLoader(users[cid], batch_size, shuffle=True, generator=generator)

    class Trainer(FedAvgThreadPoolClientTrainer):  # type: ignore[misc]
        def train(
            self, model: nn.Module, model_parameters: Tensor, train_loader: Any, cid: int, **_: Any
        ) -> Any:
            deserialize_model(model, model_parameters)
            model.train()
            sgd = torch.optim.SGD(model.parameters(), self.lr, **SGD)
            for x, y in train_loader:
                loss = F.cross_entropy(model(x), y)
                sgd.zero_grad()
                loss.backward()
                sgd.step()
            return FedAvgUplinkPackage(cid, serialize_model(model), len(train_loader.dataset))

    cores = os.cpu_count() or 1
    handler = FedAvgBaseServerHandler(
        Models(), "cnn", Dataset(), epochs, SITES, 1.0, "cpu", BATCH, SEED
    )
    trainer = Trainer(Models(), "cnn", Dataset(), "cpu", SITES, 1, BATCH, LR, SEED, cores)
    ends = []
    while not handler.if_stop():
        trainer.local_process(handler.downlink_package(), handler.sample_clients())
        for package in trainer.uplink_package():
            handler.load(package)
        found = [
            handler.evaluate(handler.model, DataLoader(part, len(part)), "cpu") for part in tests
        ]
        ends.append(time.time())
    return Run(ends, *overall(found, everybody))
