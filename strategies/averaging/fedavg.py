"""FedAvg: the server's next model is the mean of the models that sites return.

    x' = sum_k s_k x_k / sum_k s_k      s_k = 1/K (equal) or n_k/n (samples)

over the sites k that answered.

Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017, algorithm 1.
Differs: equal shares are offered; the learning rate decays once over the whole run. The paper's
``C`` is ``sampling.fraction``, and its sample the same whatever the machine.
Special cases: one site keeps what it returns; the mean of K identical models is that model (to
2^-40 K).
"""

from typing import NamedTuple

from torch import Tensor

from strategies.keys import RoundKeys, decaying
from strategies.method import Mean, Method, RoundPlan, Run


class Average(NamedTuple):
    """FedAvg's state: the model."""

    x: Tensor


class Keys(RoundKeys):
    """The keys of FedAvg: those of every method in rounds."""


def plan(keys: RoundKeys, run: Run, *, pooled: bool = False) -> RoundPlan[Average]:
    """Train for local epochs, and average."""
    instruct = decaying(keys.local_epochs, run)

    def absorb(_: Average, mean: Mean) -> Average:
        return Average(mean.x)

    return RoundPlan(
        Average,
        lambda _, start: instruct(start),
        absorb,
        weighting=keys.weighting,
        pooled=pooled,
    )


METHOD = Method("fedavg", Keys, plan)
