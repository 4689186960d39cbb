"""A site's memory on its own disk: a SuperNode that is started anew goes on where the one before it was killed.

Flower keeps ``context.state`` in the SuperNode's memory alone. Where ``--node-config 'state="/srv/state"'`` names a folder, what a
run made this site remember is written there before the site answers, read where Flower remembers nothing of that run, and deleted
after the run's last step. It is as secret as the site's model and, with ``trust-on-first-use``, holds its private key.
"""

import os
from logging import INFO
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.logger import log
from flwr.common.serde import context_from_proto, context_to_proto
from flwr.proto.message_pb2 import Context as SavedContext

from strategies.records import config_of


def keep_on_disk(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Flower mod: ``context.state`` outlives the SuperNode.

    Raises:
        ValueError: the folder cannot be written, or a file in it not be read.
    """
    if "state" not in context.node_config:
        return call_next(message, context)
    folder = Path(str(context.node_config["state"]))
    file = folder / f"{context.run_id}-{context.node_id}.state"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("this user must not write there")
        if not context.state and file.exists():
            context.state = context_from_proto(SavedContext.FromString(file.read_bytes())).state
            log(INFO, "this site goes on with what it remembers in %s", file)
    except Exception as error:
        raise ValueError(f"--node-config state = {str(folder)!r}: {error}") from None
    reply = call_next(message, context)
    if config_of(message).get("last"):
        file.unlink(missing_ok=True)
    elif context.state:
        partial = file.with_suffix(".partial")
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as target:
            target.write(context_to_proto(context).SerializeToString())
        partial.replace(file)
    return reply
