"""DC-ASGD: a stale gradient is corrected to first order for how far the model moved since.

    g = delta + (lambda / lr) delta . delta . (x - base)        "." elementwise
    x = x - eta s(staleness) g

constant (``dc-asgd-c``): lambda as given. Adaptive (``dc-asgd-a``), with G = delta / lr:
    lambda / sqrt(m + 1e-7),   m = 0.95 m + 0.05 G . G

Source: Zheng et al., "Asynchronous Stochastic Gradient Descent with Delay Compensation", ICML 2017.
Differs: one ``m``, not one a worker. Special case: lambda = 0 is ASGD.
"""

from strategies.asynchronous.descent import descent
from strategies.keys import DescentKeys, NotNegative
from strategies.method import ArrivalPlan, Method, Run


class ConstantKeys(DescentKeys):
    """The keys of DC-ASGD-c."""

    compensation: NotNegative = 0.04
    """lambda"""


class AdaptiveKeys(DescentKeys):
    """The keys of DC-ASGD-a."""

    compensation: NotNegative = 2.0
    """lambda_0"""


def constant(keys: ConstantKeys, run: Run) -> ArrivalPlan:
    """Compensate with a constant lambda."""
    rule = descent(eta=keys.server_lr, weight=keys.weight(), compensation=keys.compensation)
    return ArrivalPlan(rule, steps=keys.local_steps)


def adaptive(keys: AdaptiveKeys, run: Run) -> ArrivalPlan:
    """Compensate with a lambda that adapts to the gradients."""
    rule = descent(
        eta=keys.server_lr, weight=keys.weight(), compensation=keys.compensation, adaptive=True
    )
    return ArrivalPlan(rule, steps=keys.local_steps)


CONSTANT = Method("dc-asgd-c", ConstantKeys, constant)
ADAPTIVE = Method("dc-asgd-a", AdaptiveKeys, adaptive)
