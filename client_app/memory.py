"""What a site remembers: in Flower's context from message to message, and on its own disk.

Flower keeps ``context.state`` in the SuperNode's memory alone. Where
``--node-config 'state="/srv/state"'`` names a folder, what a run made this site remember is written
there before the site answers, read where Flower remembers nothing of that run, and deleted with the
next run, or a month, after the run's last step: a SuperNode that is restarted goes on where the one
before it was killed. What was remembered before the last message is kept, too, for a server that is
killed before it wrote the answer down. All this is as secret as the site's model and, with
``trust-on-first-use``, holds its private key.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from hashlib import sha256
from logging import INFO
from pathlib import Path
from typing import Any, TypeVar

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from torch import Tensor

from client_app import framing
from client_app.site import SiteId, config_of_site
from configuration.config import Config, identity
from configuration.files import SITES, write_whole
from configuration.flower import ClientAppCallable, log
from strategies.method import ArrivalPlan
from strategies.peer.state import PeerState
from strategies.protocol import Agreed, Started
from strategies.records import config_of, pack, unpack
from strategies.saving import flatten, restore

# The records in the context's state.
TENSORS, NUMBERS, RUN, SAVED = "peer", "peer-numbers", "peer-run", "peer-saved"
RULE, MOMENTS, LOST, DONE = "rule", "moments", "lost", "done"
# What the names of files end with: the newest memory, that before the last message, that after a
# peer's last step.
STATE, BEFORE, ENDED = ".state", ".before", ".ended"
T = TypeVar("T", bound=tuple[Any, ...])
Gather = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
Scatter = Callable[[Callable[[], dict[str, Tensor]]], dict[str, Tensor]]


def run_of(context: Context, agreed: Agreed) -> dict[str, str]:
    """What must be the same in all messages of a run.

    That is the run itself, its configuration, and what the sites agreed on.
    """
    return {
        "run id": str(context.run_id),
        "run configuration": _digest(identity(context.run_config)),
        "classes and moments": _digest({"classes": agreed.classes, "moments": agreed.moments}),
    }


def _digest(value: Mapping[str, Any]) -> str:
    return sha256(json.dumps(dict(value), sort_keys=True).encode()).hexdigest()


def load_peer_state(context: Context, algorithm: type, device: torch.device) -> PeerState | None:
    """The state of a peer; None before its first step.

    ``algorithm`` is the type of its algorithm's state.
    """
    tensors, numbers = context.state.get(TENSORS), context.state.get(NUMBERS)
    if not isinstance(tensors, ArrayRecord) or not isinstance(numbers, ConfigRecord):
        return None
    parts = {name: unpack(array).to(device) for name, array in tensors.items()}
    return restore(PeerState, {**parts, **numbers}, algorithm=algorithm)


def check_run(context: Context, run: Mapping[str, str]) -> None:
    """Drop what is remembered of another run, which Flower keeps where runs are of one series.

    Raises:
        ValueError: it is of this run, but something else has changed: that would be a server that
            lets a site reveal what it kept to itself.
    """
    known = context.state.get(RUN)
    if isinstance(known, ConfigRecord) and known["run id"] == run["run id"]:
        if changed := [name for name in run if known[name] != run[name]]:
            raise ValueError(
                f"{' and '.join(changed)}: another one than in this run's first step; refused"
            )
    elif TENSORS in context.state:
        log(INFO, "this site forgets what it remembers of another run")
        for name in (TENSORS, NUMBERS, RUN, SAVED):
            context.state.pop(name, None)


def store_peer_state(
    context: Context, run: Mapping[str, str], records: tuple[ArrayRecord, ConfigRecord]
) -> None:
    """Put the state of a peer into the context."""
    context.state[TENSORS], context.state[NUMBERS] = records
    context.state[RUN] = ConfigRecord(dict(run))


def state_records(state: PeerState) -> tuple[tuple[ArrayRecord, ConfigRecord], dict[int, Array]]:
    """A peer's state as records; and the arrays of its tensors by the tensors' ``id``.

    A tensor that is also sent need not be packed twice.
    """
    tensors, numbers = flatten(state)
    arrays = {
        id(tensor): array
        for tensor, array in zip(tensors.values(), pack(tensors).values(), strict=True)
    }
    record = ArrayRecord({name: arrays[id(tensor)] for name, tensor in tensors.items()})
    return (record, ConfigRecord(dict(numbers))), arrays


def load(context: Context, name: str, like: T, scatter: Scatter = lambda read: read()) -> T:
    """The NamedTuple of tensors that this run stored under a name; before the first, ``like``.

    ``scatter`` makes of its vectors what this process needs of them.
    """
    vectors = scatter(partial(_vectors, context, name))
    if not vectors:
        return like
    return type(like)(
        *(vectors[field].to(part.device) for field, part in zip(like._fields, like, strict=True))  # type: ignore[attr-defined]
    )


def _vectors(context: Context, name: str) -> dict[str, Tensor]:
    record, known = context.state.get(name), context.state.get(f"{name}-run")
    if (
        not isinstance(record, ArrayRecord)
        or not isinstance(known, ConfigRecord)
        or known.get("run") != context.run_id
    ):
        return {}  # Flower keeps a context from run to run of a series
    return {field: unpack(array) for field, array in record.items()}


def store(context: Context, name: str, memory: Any, gather: Gather = dict) -> None:
    """Store a NamedTuple of tensors. ``gather`` undoes what ``scatter`` did.

    Raises:
        TypeError: it is none.
    """
    if not hasattr(memory, "_asdict"):
        raise TypeError(
            "what a site remembers is a NamedTuple of tensors; "
            f"the method's is {type(memory).__name__}"
        )
    context.state[name] = pack(gather(memory._asdict()))
    context.state[f"{name}-run"] = ConfigRecord({"run": context.run_id})


def load_moments(
    context: Context, optimizers: Sequence[torch.optim.Optimizer], scatter: Scatter
) -> None:
    """Give the optimizers the moments of this site's last order in this run, if there was one."""
    states = _states(optimizers)
    for name, moment in scatter(partial(_vectors, context, MOMENTS)).items():
        number, _, field = name.partition(".")
        state, parameter = states[int(number)]
        # A copy: what a message holds must not be written.
        state[field] = moment.clone().to(parameter.device)


def store_moments(
    context: Context, optimizers: Sequence[torch.optim.Optimizer], gather: Gather
) -> None:
    """Store the optimizers' moments for this site's next order."""
    moments = {
        f"{number}.{field}": value.float()
        for number, (state, _) in enumerate(_states(optimizers))
        for field, value in state.items()
        if isinstance(value, Tensor)
    }
    context.state[MOMENTS] = pack(gather(moments))
    context.state[f"{MOMENTS}-run"] = ConfigRecord({"run": context.run_id})


def _states(optimizers: Sequence[torch.optim.Optimizer]) -> list[tuple[dict[str, Any], Tensor]]:
    """Each parameter's state in its optimizer, and the parameter."""
    return [
        (optimizer.state[parameter], parameter)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


def restore_run_id(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Flower mod: a resumed run has the number of its first start, by which sites know it."""
    if (started := Started.of(config_of(message))) is None:
        return call_next(message, context)
    resumed, context.run_id = context.run_id, started.run
    try:
        return call_next(message, context)
    finally:
        context.run_id = resumed


def save_to_disk(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Flower mod: save ``context.state`` on disk, where it outlives the SuperNode.

    Raises:
        ValueError: the folder cannot be written, or a file in it not be read.
    """
    if (file := restore_from_disk(message, context)) is None:
        return call_next(message, context)
    reply = call_next(message, context)
    fields: Any = config_of(message)
    kind = message.metadata.message_type
    trained = kind.startswith("train")
    if reply.has_error() or not context.state or (DONE in context.state and not trained):
        return reply  # the state is as before: in a discovery, keys are made the first time
    number, started = (fields["server-round"], fields.get("started", 0)) if trained else (-1, 0)
    context.state[DONE] = ConfigRecord({"number": number, "started": started})
    with suppress(FileNotFoundError):
        file.replace(file.with_suffix(BEFORE))
    write_whole(
        file, framing.to_bytes({}, context.state)
    )  # of a protocol buffer 2 GiB are the most
    if kind == "train.peer" and fields.get("last") and number > 0:
        file.replace(file.with_suffix(ENDED))
    return reply


def restore_from_disk(message: Message, context: Context) -> Path | None:
    """Find the file of a run's memory, and read it into ``context.state`` if that is empty.

    A server asks again for what it had not written down when it was killed, and for a round that
    too few other sites answered: a site that has done that goes back to what it remembered before,
    and does it once more.

    Returns:
        the file in which the memory is kept; None where it is not kept on disk.

    Raises:
        ValueError: the folder cannot be written, or a file in it not be read.
    """
    if (folder := _folder(context)) is None:
        return None
    file = folder / f"{context.run_id}-{SiteId.of(context).number}{STATE}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("this user must not write there")
        ended, before = file.with_suffix(ENDED), file.with_suffix(BEFORE)
        if not context.state:
            _delete_ended(folder, file)
            # Where there is only the last one, this process was killed while it wrote.
            known = next((each for each in (ended, file, before) if each.exists()), None)
            context.state = _read(known) if known else RecordDict()
        if _was_done(context.state, message, config_of_site(context)):
            context.state = _read(before) if before.exists() else RecordDict()
            for each in (ended, file):
                each.unlink(missing_ok=True)
            if before.exists():
                before.replace(file)
    except Exception as error:
        raise ValueError(f"state = {str(folder)!r}: {file.name}: {error}") from None
    return file


def _folder(context: Context) -> Path | None:
    """The folder of a run's memory on disk, or None.

    In a simulation that is among the results, if it keeps checkpoints and the path of the results
    is absolute.
    """
    if "state" in context.node_config:
        return Path(str(context.node_config["state"]))
    results = config_of_site(context).results
    folder = Path(results.folder).expanduser()
    return (
        folder / SITES
        if SiteId.of(context).num_sites and results.checkpoint_minutes and folder.is_absolute()
        else None
    )


def _read(file: Path) -> RecordDict:
    log(INFO, "this site goes on with what it remembers in %s", file)
    return framing.from_bytes(file.read_bytes())[1]


def _was_done(state: RecordDict, message: Message, config: Config) -> bool:
    """Whether this site has already done what a server asks for."""
    done, asked = state.get(DONE), config_of(message)
    number, started = asked.get("server-round"), asked.get("started", 0)
    if not (
        isinstance(done, ConfigRecord) and isinstance(number, int) and isinstance(started, int)
    ):
        return False
    last, before = int(done["number"]), int(done["started"])  # type: ignore[arg-type]
    # The same round twice; in an asynchronous run, a site trains a model again as long as there is
    # no newer one.
    if before == started:
        return (
            number == last
            and message.metadata.message_type == "train"
            and not isinstance(config.plan, ArrivalPlan)
        )
    return before < started and number <= last


def _delete_ended(folder: Path, file: Path) -> None:
    """Delete what other runs left that have ended, for which nobody asks any more.

    While the last answer was on its way, the server might have asked again.
    """
    for ended in folder.glob(f"*-{file.stem.partition('-')[2]}{ENDED}"):
        if ended.stem != file.stem:
            ended.unlink(missing_ok=True)
            ended.with_suffix(BEFORE).unlink(missing_ok=True)
