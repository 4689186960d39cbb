"""The parts of Flower that it does not promise to keep; all else is of its public API.

They are imported here only, and ``tests/unit/test_flower.py`` says in words which of them changed.
"""

from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.common.config import flatten_dict, parse_config_args
from flwr.common.logger import log
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "ClientAppCallable",
    "Mod",
    "ObjectPushError",
    "Run",
    "TaskIdentity",
    "flatten_dict",
    "log",
    "parse_config_args",
]
