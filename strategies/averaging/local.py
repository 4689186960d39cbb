"""Local training: sites train and are tested alone, the yardstick for learning together.

x_k' = what site k made of x_k
"""

from strategies.keys import Positive, decaying
from strategies.method import AlonePlan, Method, Section


class Keys(Section):
    """The keys of local training."""

    local_epochs: Positive = 2
    """local epochs from test to test"""


METHOD = Method("local", Keys, lambda keys, run: AlonePlan(decaying(keys.local_epochs, run), False))
