"""A grid in the calling process: the real ServerApp and ClientApp, no Ray, no network.

The seed of the laboratory, and what the tests of the app run on.
"""

import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

FIRST_NODE = 1000  # node ids differ from site numbers, so that mixing them up fails


class InProcessGrid(Grid):
    """Answers each message at once, one after the other, in the order in which they were sent.

    Args:
        client_app: called directly with each message.
        num_sites: nodes of the grid.
        run_config: the run configuration of every site.
        tamper: called with a site's number, the message and the reply; what it returns is delivered instead, None is lost.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_sites: int,
        run_config: Mapping[str, Any],
        tamper: Callable[[int, Message, Message], Message | None] | None = None,
    ) -> None:
        # A Message asks the running task for its identity; there is no task here, so this one is made up.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self._run = Run.create_empty(run_id=1)
        self._client_app, self._tamper = client_app, tamper
        self._replies: dict[str, Message] = {}
        self._contexts = {
            FIRST_NODE + site: Context(
                run_id=1,
                node_id=FIRST_NODE + site,
                node_config={"partition-id": site, "num-partitions": num_sites},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for site in range(num_sites)
        }

    def set_run(self, run: Run) -> None:
        """Not needed: there is one run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run, of which nothing is known."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message; ``Message(...)`` does the same."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All sites, always."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver messages and keep the replies."""
        return [self._deliver(message) for message in messages]

    def _deliver(self, message: Message) -> str:
        node = message.metadata.dst_node_id
        identity = message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
        try:
            reply: Message | None = self._client_app(message=message, context=self._contexts[node])
        except Exception as error:  # as Flower does for an app that raises
            reply = Message(Error(2, f"{type(error)}:<'{error}'>"), reply_to=message)
        assert reply is not None
        if self._tamper:
            reply = self._tamper(node - FIRST_NODE, message, reply)
        if reply is not None:
            self._replies[identity] = reply
        return identity

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are there."""
        return [self._replies.pop(identity) for identity in message_ids if identity in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Both at once."""
        return self.pull_messages(self.push_messages(messages))


def run_in_process(
    server_app: ServerApp,
    client_app: ClientApp,
    num_sites: int,
    run_config: Mapping[str, Any],
    tamper: Callable[[int, Message, Message], Message | None] | None = None,
) -> None:
    """Run an app in this process.

    Raises:
        Exception: whatever the ServerApp raises.
    """
    grid = InProcessGrid(client_app, num_sites, run_config, tamper)
    server_app(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(run_config)))
