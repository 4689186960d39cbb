"""The strategies that Flower ships, by class name, as methods: Krum, FedAdam, FedProx, ...

All that average arrays; not those of trees, nor wrappers of another strategy. Their records stay
Flower's, see :mod:`strategies.averaging.shipped`.
"""

import inspect
import math
from collections.abc import Callable
from functools import cache, partial

import flwr.serverapp.strategy as shipped

from strategies.averaging.average import weighted_metrics
from strategies.keys import RoundKeys, decaying
from strategies.method import ForeignPlan, Method, Run

# Arguments that are ours to give.
OURS = {"self", "weighted_by_key", "arrayrecord_key", "configrecord_key", "train_loss_key"}
GIVEN = {
    "min_train_nodes": 1,
    "min_evaluate_nodes": 1,
    "min_available_nodes": 1,
    "train_loss_key": "loss",
    "train_metrics_aggr_fn": weighted_metrics,
    "evaluate_metrics_aggr_fn": weighted_metrics,
    # Of FedAdagrad, FedAdam and FedYogi: with Flower's 0.1 the first of them does not learn.
    "eta": 0.01,
}


# These look at single models, or at what each says of its loss.
NOT_AVERAGING = {"Bulyan", "FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "QFedAvg"}


class Keys(RoundKeys):
    """The keys of every strategy of Flower."""

    arguments: str = ""
    (
        'the strategy\'s own, such as "eta=0.02 beta_1=0.9" (eta is 0.01 by default); '
        "weighting is of BatchNorm statistics"
    )


def arguments_of(name: str, text: str) -> dict[str, int | float]:
    """Arguments of the strategy ``name``, read from ``"eta=0.1 beta_1=0.9"``.

    Raises:
        ValueError: an unknown argument or one that comes twice, a value that is no number from 0
            on, or a required one left out.
    """
    where = f"flower.arguments = {text!r}"
    parameters = {
        key: parameter
        for key, parameter in inspect.signature(_classes()[name]).parameters.items()
        if key not in OURS
        and not key.endswith(("_fn", "_rule"))
        and not key.startswith(("fraction_", "min_"))
    }
    found: dict[str, int | float] = {}
    for item in text.split():
        key, _, value = item.partition("=")
        if key not in parameters or key in found:
            wrong = "is given twice" if key in found else "is unknown"
            raise ValueError(
                f"{where}: argument {key!r} of {name} {wrong}; "
                f"allowed: {', '.join(parameters) or 'none'}"
            )
        try:
            found[key] = int(value) if value.lstrip("+-").isdigit() else float(value)
        except ValueError:
            raise ValueError(f"{where}: {value!r} is not a number") from None
        if not 0 <= found[key] < math.inf:
            raise ValueError(f"{where}: {value!r} is negative or not finite")
    required = [
        key for key, parameter in parameters.items() if parameter.default is parameter.empty
    ]
    if missing := [key for key in required if key not in found]:
        raise ValueError(f"{where}: {name} needs {' '.join(f'{key}=...' for key in missing)}")
    return found


@cache
def _classes() -> dict[str, type[shipped.Strategy]]:
    return {
        name: found
        for name in shipped.__all__
        if inspect.isclass(found := getattr(shipped, name))
        and issubclass(found, shipped.FedAvg)
        and not name.startswith("FedXgb")
    }


def _plan(name: str, keys: Keys, run: Run) -> ForeignPlan:
    build = _classes()[name]
    given = {
        key: value for key, value in GIVEN.items() if key in inspect.signature(build).parameters
    }
    make: Callable[[], shipped.Strategy] = partial(
        build, **given | arguments_of(name, keys.arguments)
    )
    try:
        _ = keys.arguments and make()
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"flower.arguments = {keys.arguments!r}: {name} refuses it: {error}"
        ) from error
    return ForeignPlan(
        make,
        decaying(keys.local_epochs, run),
        keys.weighting,
        "train_loss_key" in given,
        name not in NOT_AVERAGING,
    )


METHODS = tuple(Method(name, Keys, partial(_plan, name), section="flower") for name in _classes())
