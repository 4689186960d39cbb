"""A site's memory on its own disk: a SuperNode that is started anew goes on where the one before it was killed.

Flower keeps ``context.state`` in the SuperNode's memory alone. Where ``--node-config 'state="/srv/site.state"'`` names a file, what
a run made this site remember is written into it before the site answers, and read where Flower remembers nothing of that run. The
file holds the newest run. It is as secret as the site's model and, with ``trust-on-first-use``, holds its private key.
"""

import os
from logging import INFO
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.logger import log
from flwr.common.serde import context_from_proto, context_to_proto
from flwr.proto.message_pb2 import Context as SavedContext


def keep_on_disk(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Flower mod: ``context.state`` outlives the SuperNode.

    Raises:
        ValueError: the file is none of these.
    """
    if "state" not in context.node_config:
        return call_next(message, context)
    path = Path(str(context.node_config["state"]))
    if not context.state and path.exists():
        try:
            saved = context_from_proto(SavedContext.FromString(path.read_bytes()))
        except Exception as error:
            raise ValueError(f"--node-config state = {str(path)!r}: {error}") from None
        if (saved.run_id, saved.node_id) == (context.run_id, context.node_id):
            log(INFO, "this site goes on with what it remembers in %s", path)
            context.state = saved.state
    reply = call_next(message, context)
    if context.state:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(context_to_proto(context).SerializeToString())
        partial.replace(path)
    return reply
