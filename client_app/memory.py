"""What a site remembers: in Flower's context from message to message, and on its own disk.

Flower keeps ``context.state`` in the SuperNode's memory alone. Where ``--node-config 'state="/srv/state"'`` names a folder, what a
run made this site remember is written there before the site answers, read where Flower remembers nothing of that run, and deleted
after the run's last step: a SuperNode that is restarted goes on where the one before it was killed. It is as secret as the site's
model and, with ``trust-on-first-use``, holds its private key.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from logging import INFO
from pathlib import Path
from typing import Any, TypeVar

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.logger import log
from torch import Tensor

from client_app import letter
from strategies.peer.state import PeerState
from strategies.protocol import Agreed
from strategies.records import config_of, pack, unpack
from strategies.saving import flatten, restore

TENSORS, NUMBERS, RUN, SAVED = "peer", "peer-numbers", "peer-run", "peer-saved"  # the records in the context's state
RULE, MOMENTS, LOST = "rule", "moments", "lost"
T = TypeVar("T", bound=tuple[Any, ...])
Gather = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
Deal = Callable[[Callable[[], dict[str, Tensor]]], dict[str, Tensor]]


def run_of(context: Context, agreed: Agreed) -> dict[str, str]:
    """What must be the same in all messages of a run: the run itself, its configuration, and what the sites agreed on."""
    return {
        "run id": str(context.run_id),
        "run configuration": _digest(context.run_config),
        "classes and moments": _digest(agreed._asdict()),
    }


def _digest(value: Mapping[str, Any]) -> str:
    return sha256(json.dumps(dict(value), sort_keys=True).encode()).hexdigest()


def recall(context: Context, algorithm: type, device: torch.device) -> PeerState | None:
    """What a peer remembers, its algorithm's state of the type ``algorithm``; None before its first step."""
    tensors, numbers = context.state.get(TENSORS), context.state.get(NUMBERS)
    if not isinstance(tensors, ArrayRecord) or not isinstance(numbers, ConfigRecord):
        return None
    parts = {name: unpack(array).to(device) for name, array in tensors.items()}
    return restore(PeerState, {**parts, **numbers}, algorithm=algorithm)


def check_run(context: Context, run: Mapping[str, str]) -> None:
    """Drop what is remembered of another run, which Flower keeps where runs are of one series.

    Raises:
        ValueError: it is of this run, but something else has changed: a server that lets a site show what it kept to itself.
    """
    known = context.state.get(RUN)
    if isinstance(known, ConfigRecord) and known["run id"] == run["run id"]:
        if changed := [name for name in run if known[name] != run[name]]:
            raise ValueError(f"{' and '.join(changed)}: another one than in this run's first step; refused")
    elif TENSORS in context.state:
        log(INFO, "this site forgets what it remembers of another run")
        for name in (TENSORS, NUMBERS, RUN, SAVED):
            context.state.pop(name, None)


def remember(context: Context, run: Mapping[str, str], records: tuple[ArrayRecord, ConfigRecord]) -> None:
    """Put what a peer remembers into the context."""
    context.state[TENSORS], context.state[NUMBERS] = records
    context.state[RUN] = ConfigRecord(dict(run))


def written(state: PeerState) -> tuple[tuple[ArrayRecord, ConfigRecord], dict[int, Array]]:
    """A state as records; and the arrays of its tensors by their ``id``, so that what is sent too need not be copied twice."""
    tensors, numbers = flatten(state)
    arrays = {id(tensor): array for tensor, array in zip(tensors.values(), pack(tensors).values(), strict=True)}
    record = ArrayRecord({name: arrays[id(tensor)] for name, tensor in tensors.items()})
    return (record, ConfigRecord(dict(numbers))), arrays


def remembered(context: Context, name: str, like: T, deal: Deal = lambda read: read()) -> T:
    """What this site remembers under a name in this run: a NamedTuple of tensors like ``like``, which is what it begins with.

    ``deal`` makes of its vectors what this process needs of them.
    """
    vectors = deal(partial(_vectors, context, name))
    if not vectors:
        return like
    return type(like)(*(vectors[field].to(part.device) for field, part in zip(like._fields, like, strict=True)))  # type: ignore[attr-defined]


def _vectors(context: Context, name: str) -> dict[str, Tensor]:
    record, known = context.state.get(name), context.state.get(f"{name}-run")
    if not isinstance(record, ArrayRecord) or not isinstance(known, ConfigRecord) or known.get("run") != context.run_id:
        return {}  # Flower keeps a context from run to run of a series
    return {field: unpack(array) for field, array in record.items()}


def keep(context: Context, name: str, memory: Any, gather: Gather = dict) -> None:
    """Remember a NamedTuple of tensors. ``gather`` undoes what ``deal`` did.

    Raises:
        TypeError: it is none.
    """
    if not hasattr(memory, "_asdict"):
        raise TypeError(f"what a site remembers is a NamedTuple of tensors; the method's is {type(memory).__name__}")
    context.state[name] = pack(gather(memory._asdict()))
    context.state[f"{name}-run"] = ConfigRecord({"run": context.run_id})


def recall_moments(context: Context, optimizers: Sequence[torch.optim.Optimizer], deal: Deal) -> None:
    """The optimizers go on with the moments of this site's last order in this run; with none before the first."""
    states = _states(optimizers)
    for name, moment in deal(partial(_vectors, context, MOMENTS)).items():
        number, _, field = name.partition(".")
        state, parameter = states[int(number)]
        # A copy: what a message holds must not be written.
        state[field] = moment.clone().to(parameter.device)


def remember_moments(context: Context, optimizers: Sequence[torch.optim.Optimizer], gather: Gather) -> None:
    """Keep the optimizers' moments for this site's next order."""
    moments = {
        f"{number}.{field}": value.float()
        for number, (state, _) in enumerate(_states(optimizers))
        for field, value in state.items()
        if isinstance(value, Tensor)
    }
    context.state[MOMENTS] = pack(gather(moments))
    context.state[f"{MOMENTS}-run"] = ConfigRecord({"run": context.run_id})


def _states(optimizers: Sequence[torch.optim.Optimizer]) -> list[tuple[dict[str, Any], Tensor]]:
    """What they remember of each parameter, and the parameter."""
    return [
        (optimizer.state[parameter], parameter)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


def keep_on_disk(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Flower mod: ``context.state`` outlives the SuperNode.

    Raises:
        ValueError: the folder cannot be written, or a file in it not be read.
    """
    if "state" not in context.node_config:
        return call_next(message, context)
    file = restore_from_disk(context)
    reply = call_next(message, context)
    fields: Any = config_of(message)
    if message.metadata.message_type == "train.peer" and fields.get("last") and fields["server-round"] > 0:
        file.unlink(missing_ok=True)
    elif context.state:
        write_whole(file, letter.to_bytes({}, context.state))  # of a protocol buffer 2 GiB are the most
    return reply


def restore_from_disk(context: Context) -> Path:
    """The file in which a run's memory is kept; what is there is put into an empty ``context.state``.

    Raises:
        ValueError: the folder cannot be written, or a file in it not be read.
    """
    folder = Path(str(context.node_config["state"]))
    file = folder / f"{context.run_id}-{context.node_id}.state"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("this user must not write there")
        if not context.state and file.exists():
            context.state = letter.from_bytes(file.read_bytes())[1]
            log(INFO, "this site goes on with what it remembers in %s", file)
    except Exception as error:
        raise ValueError(f"state = {str(folder)!r}: {file.name}: {error}") from None
    return file


def write_whole(file: Path, data: bytes) -> None:
    """Write a file for its owner only, whole or not at all."""
    partial = file.with_suffix(".partial")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as target:
        target.write(data)
        target.flush()
        os.fsync(target.fileno())
    partial.replace(file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name, too, outlives a power cut
    finally:
        os.close(folder)
