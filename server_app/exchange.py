"""Messages to sites and their replies, as they come; and the time, which a simulation keeps itself."""

import time
from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

from flwr.app import Error, Message
from flwr.serverapp import Grid

FIRST_WAIT_S, LONGEST_WAIT_S = 0.005, 0.25
TOO_LATE = -1  # an error code of ours, beside Flower's, which count from 0


@runtime_checkable
class Clock(Protocol):
    """Time in seconds, as the server sees it. A grid that simulates time is its own clock."""

    def now(self) -> float:
        """Seconds since whenever."""

    def wait(self, poll_s: float, limit_s: float) -> None:
        """Until something may have changed, at most ``limit_s``; a clock that cannot know looks again after ``poll_s``."""


class _WallClock:
    def now(self) -> float:
        return time.monotonic()

    def wait(self, poll_s: float, limit_s: float) -> None:
        time.sleep(max(0.0, min(poll_s, limit_s)))


def clock_of(grid: Grid) -> Clock:
    """The clock that runs where the grid's sites are."""
    return grid if isinstance(grid, Clock) else _WallClock()


def exchange(grid: Grid, messages: Iterable[Message], timeout_s: float) -> Iterator[tuple[int, Message]]:
    """Send messages and yield, for each, the node it went to and its reply, in the order of arrival.

    Flower's ``send_and_receive`` waits for all replies and looks for them every three seconds; here each one can be worked on
    while the others are on their way. A node that has not answered after ``timeout_s`` seconds yields an error reply, so there is
    one reply a message, always.
    """
    clock = clock_of(grid)
    sent = list(messages)
    for message in sent:
        message.metadata.ttl = timeout_s
    waiting = dict(zip(grid.push_messages(sent), sent, strict=True))
    deadline = clock.now() + timeout_s
    poll = FIRST_WAIT_S
    while waiting:
        arrived = False
        for identity in list(waiting):
            # One at a time: a grid hands over all replies that are there at once, each as large as a model.
            for reply in grid.pull_messages([identity]):
                # Replies that Flower makes up itself name node 1 as their source: the message they answer tells the node.
                arrived = True
                yield waiting.pop(identity).metadata.dst_node_id, reply
        if arrived:
            poll = FIRST_WAIT_S
            continue
        if clock.now() >= deadline:
            for message in waiting.values():
                late = Error(TOO_LATE, f"no answer within timeout-s = {timeout_s:g}")
                yield message.metadata.dst_node_id, Message(late, reply_to=message)
            return
        clock.wait(poll, deadline - clock.now())
        poll = min(2 * poll, LONGEST_WAIT_S)


def why(reply: Message) -> str:
    """What went wrong at the site, in a line."""
    reason = (reply.error.reason or "no reason given").strip()
    return reason.splitlines()[-1] if "\n" in reason else reason
