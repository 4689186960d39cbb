"""Ensemble: sites train alone; their predictions (probabilities) are averaged, not their models.

Special case: of one site, ``local``.
"""

from strategies.averaging import local
from strategies.keys import decaying
from strategies.method import AlonePlan, Method


class Keys(local.Keys):
    """The keys of an ensemble."""


METHOD = Method(
    "ensemble", Keys, lambda keys, run: AlonePlan(decaying(keys.local_epochs, run), True)
)
