"""From a strategy's name to the strategy."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from flwr.serverapp.strategy import Strategy

from strategies.asynchronous.adaptive import adaptive
from strategies.asynchronous.descent import descent
from strategies.asynchronous.fedasync import fedasync
from strategies.asynchronous.fedbuff import fedbuff
from strategies.asynchronous.rule import ServerRule, Weight, constant, hinge, polynomial
from strategies.averaging.alone import Alone
from strategies.averaging.average import Averaging, weighted_metrics
from strategies.averaging.co_learning import CoLearning
from strategies.averaging.shipped import Shipped
from strategies.config import CROSS, Config, shipped_strategies, strategy_arguments
from strategies.method import ArrivalPlan, Neighbourhood, PeerPlan, Schedule
from strategies.peer.algorithm import PeerAlgorithm
from strategies.peer.dmsgd import dmsgd, growth
from strategies.peer.dsgd import dsgd
from strategies.peer.gradient_tracking import gradient_tracking
from strategies.peer.qgm import qgm
from strategies.randomness import derive
from strategies.topology import Topology, TopologyError, topology


def server_rule(config: Config) -> ServerRule[Any]:
    """What an arrival does to the model, of an asynchronous strategy."""
    weight: Weight = {
        "constant": constant,
        "polynomial": polynomial(config.staleness_exponent),
        "hinge": hinge(config.staleness_exponent, config.staleness_border),
    }[config.staleness]
    match config.strategy:
        case "fedasync":
            return fedasync(alpha=config.mixing_rate, weight=weight)
        case "fedbuff":
            return fedbuff(eta=config.server_lr, size=config.buffer_size, weight=polynomial(config.staleness_exponent))
    base = config.base_optimizer if config.strategy == "gsgm" else config.strategy
    window = config.window if config.strategy == "gsgm" else 1
    beta = config.server_momentum if config.strategy in ("gsgm", "asgd-momentum") else 0.0
    if base in ("adam", "rmsprop"):
        adam = base == "adam"
        return adaptive(
            eta=config.server_lr,
            beta=beta if adam else 0.0,
            beta_2=0.999 if adam else 0.99,
            window=window,
            weight=weight,
            correct=adam,
        )
    strengths = {"dc-asgd-c": config.compensation, "dc-asgd-a": config.compensation_adaptive}
    return descent(
        eta=config.server_lr,
        beta=beta,
        window=window,
        weight=weight,
        compensation=strengths.get(base, 0.0),
        adaptive=base == "dc-asgd-a",
    )


def arrival_plan(config: Config) -> ArrivalPlan:
    """What an asynchronous run executes."""
    schedule = Schedule()
    if config.strategy == "gsgm":
        kind: Any = "list" if config.schedule == "white-list" else config.schedule
        schedule = Schedule(kind, config.slack)
    proximal = config.proximal_mu if config.strategy == "fedasync" else 0.0
    least = config.buffer_size if config.strategy == "fedbuff" else 1
    return ArrivalPlan(server_rule(config), schedule, config.local_steps, proximal, least)


def peer_algorithm(config: Config) -> PeerAlgorithm[Any]:
    """What a peer does, of a strategy without a server."""
    beta, nesterov = config.momentum, config.nesterov
    match config.strategy:
        case "d-psgd" | "cdsgd":
            return dsgd(beta=0.0, nesterov=False, adapt_first=config.strategy == "d-psgd")
        case "cdmsgd" | "ngm" | "n-saddle":
            return dsgd(beta=beta, nesterov=nesterov, adapt_first=False)
        case "dsgdm" | "dfedsam":
            return dsgd(beta=beta, nesterov=nesterov, adapt_first=True)
        case "dmsgd":
            return dmsgd(beta=beta, omega=config.momentum_consensus_weight, velocity=config.momentum_form == "velocity")
        case "qgm" | "q-saddle":
            return qgm(beta=beta, mu=config.quasi_global_decay, nesterov=nesterov)
        case "gradient-tracking":
            return gradient_tracking(adapt_first=True)
    raise ValueError(f"{config.strategy} is no strategy of peers")


def peer_plan(config: Config) -> PeerPlan:
    """What a run of peers executes."""
    at: Any = config.cross_gradients if config.strategy in CROSS else "own"
    gradient = Neighbourhood(at, config.sam_radius, config.cross_perturbation)
    return PeerPlan(peer_algorithm(config), gradient, config.local_steps)


def peer_topology(config: Config) -> Topology:
    """Who exchanges with whom: site k is peer k.

    Raises:
        TopologyError: they cannot be connected as asked, or would never agree.
    """
    found = topology(
        config.topology,
        config.num_sites,
        weights=config.mixing,
        lazy=config.lazy,
        degree=config.degree,
        stride=config.stride,
        edges=config.edges,
        seed=derive(config.seed, "topology"),
    )
    if config.strategy == "dmsgd" and config.momentum_form == "position":
        mixing = [torch.lerp(torch.eye(len(w), dtype=w.dtype), w, config.averaging_rate) for w in found.matrices]
        omega = config.momentum_consensus_weight
        factor = growth(mixing, beta=config.momentum, omega=omega)
        if factor > 1 + 1e-6:
            raise TopologyError(
                f"topology = {config.topology!r}, momentum = {config.momentum:g}, momentum-consensus-weight = {omega:g}: "
                f"disagreement grows by {factor:.3g} an exchange in dmsgd's position form; lazy = true, momentum-form = 'velocity' "
                "or a smaller momentum may help"
            )
    return found


def round_strategy(config: Config, num_examples: Mapping[int, int]) -> Strategy:
    """The strategy of a run in rounds.

    Args:
        config: the run.
        num_examples: training examples of each node that takes part, in the order of the sites.
    """
    total = sum(num_examples.values())
    shares = {node: 1 / len(num_examples) if config.weighting == "equal" else n / total for node, n in num_examples.items()}
    match config.strategy:
        case "co-learning":
            return CoLearning(
                shares,
                lr=config.lr,
                envelope=config.lr_envelope,
                local_epochs=config.local_epochs,
                max_local_epochs=config.max_local_epochs,
                epsilon=config.epsilon,
            )
        case "fedavg" | "centralized":
            return Averaging(shares)
        case "local" | "ensemble":
            rows = {node: row for row, node in enumerate(num_examples)}
            return Alone(rows, ensemble=config.strategy == "ensemble")
    build = shipped_strategies()[config.strategy]
    arguments = {
        "min_train_nodes": 1,
        "min_evaluate_nodes": 1,
        "min_available_nodes": 1,
        "train_loss_key": "loss",
        "train_metrics_aggr_fn": weighted_metrics,
        "evaluate_metrics_aggr_fn": weighted_metrics,
    }
    known = inspect.signature(build).parameters
    arguments = {key: value for key, value in arguments.items() if key in known}
    return Shipped(build(**arguments, **strategy_arguments(config.strategy, config.strategy_arguments)), shares)
