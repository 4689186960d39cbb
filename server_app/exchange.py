"""Messages to sites and their replies, as they come."""

import time
from collections.abc import Iterable, Iterator

from flwr.app import Error, Message
from flwr.serverapp import Grid

FIRST_WAIT_S, LONGEST_WAIT_S = 0.005, 0.25
TOO_LATE = -1  # an error code of ours, beside Flower's, which count from 0


def exchange(grid: Grid, messages: Iterable[Message], timeout_s: float) -> Iterator[tuple[int, Message]]:
    """Send messages and yield, for each, the node it went to and its reply, in the order of arrival.

    Flower's ``send_and_receive`` waits for all replies and looks for them every three seconds; here each one can be worked on
    while the others are on their way. A node that has not answered after ``timeout_s`` seconds yields an error reply, so there is
    one reply a message, always.
    """
    sent = list(messages)
    for message in sent:
        message.metadata.ttl = timeout_s
    waiting = dict(zip(grid.push_messages(sent), sent, strict=True))
    deadline = time.monotonic() + timeout_s
    wait = FIRST_WAIT_S
    while waiting:
        arrived = False
        for identity in list(waiting):
            # One at a time: a grid hands over all replies that are there at once, each as large as a model.
            for reply in grid.pull_messages([identity]):
                # Replies that Flower makes up itself name node 1 as their source: the message they answer tells the node.
                arrived = True
                yield waiting.pop(identity).metadata.dst_node_id, reply
        if arrived:
            wait = FIRST_WAIT_S
            continue
        if time.monotonic() >= deadline:
            for message in waiting.values():
                late = Error(TOO_LATE, f"no answer within timeout-s = {timeout_s:g}")
                yield message.metadata.dst_node_id, Message(late, reply_to=message)
            return
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT_S)


def why(reply: Message) -> str:
    """What went wrong at the site, in a line."""
    reason = (reply.error.reason or "no reason given").strip()
    return reason.splitlines()[-1] if "\n" in reason else reason
