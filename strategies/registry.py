"""From a strategy's name to the strategy."""

import inspect
from collections.abc import Mapping

from flwr.serverapp.strategy import Strategy

from strategies.averaging.alone import Alone
from strategies.averaging.average import Averaging, weighted_metrics
from strategies.averaging.co_learning import CoLearning
from strategies.averaging.shipped import Shipped
from strategies.config import Config, shipped_strategies, strategy_arguments


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
