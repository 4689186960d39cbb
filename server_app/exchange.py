"""Messages to sites and their replies, as they arrive; and the clock, virtual in a simulation."""

import math
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from logging import WARNING
from threading import Thread
from typing import NamedTuple, Protocol, runtime_checkable

from flwr.app import ArrayRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from configuration.flower import ObjectPushError, log
from strategies.records import num_bytes

FIRST_WAIT_S, LONGEST_WAIT_S = 0.005, 0.25
# How long one reply is waited for before others are looked for while it comes: so many seconds,
# and the time that one as large as its message takes from the SuperLink at so many bytes a second
# (Flower needs three times its memory).
PATIENCE_S = 0.5
BYTES_A_S = 10e6
PUSHES = 5  # of the same messages, each to a SuperLink that was killed since the one before
MOST_PULLS = 8  # replies that come: as many models may be in memory
LOOK_EVERY_S = 10.0
LONGEST_RETRY_S = 60.0  # from one attempt to the next, where too few sites are here
TOO_LATE = -1  # an error code of ours, beside Flower's, which count from 0
# Errors of a site that is silent or gone and may be back any time: ours, and Flower's for a message
# that is over, a site that is not connected, a ClientApp that stopped. Other errors would come
# again at once.
GONE = (TOO_LATE, 3, 5, 8)


def gone(reply: Message) -> bool:
    """Whether the reply says that the site is silent or gone."""
    return reply.has_error() and reply.error.code in GONE


@runtime_checkable
class Clock(Protocol):
    """Time in seconds, as the server sees it. A grid that simulates time is its own clock."""

    def now(self) -> float:
        """Seconds since a fixed, unknown moment."""

    def wait(self, poll_s: float, limit_s: float) -> None:
        """Wait until something may have changed, at most ``limit_s``.

        A clock that cannot know returns after ``poll_s``.
        """


class _WallClock:
    def now(self) -> float:
        return time.monotonic()

    def wait(self, poll_s: float, limit_s: float) -> None:
        time.sleep(max(0.0, min(poll_s, limit_s)))


def wait_as_long_again(clock: Clock, since: float, limit_s: float) -> None:
    """Wait for sites as long as it lasts already: each attempt is work for those that are here."""
    clock.wait(min(max(LONGEST_WAIT_S, clock.now() - since), LONGEST_RETRY_S), limit_s)


def clock_of(grid: Grid) -> Clock:
    """The clock that runs where the grid's sites are."""
    return grid if isinstance(grid, Clock) else _WallClock()


class _Waiting(NamedTuple):
    """A message under way, without its arrays.

    Sites that work on different models would otherwise keep all of these in memory.
    """

    message: Message
    deadline: float
    patience_s: float


class Mailbox:
    """Messages under way.

    Each is answered once: by its site, or, when its time is over, by an error made here.

    Flower's ``send_and_receive`` waits for all replies and looks for them every three seconds; here
    each one can be worked on while the others are on their way.

    Args:
        grid: the way to the sites.
        timeout_s: seconds a site has to answer.
        on_connected: called every now and then with the nodes that are connected.
    """

    def __init__(
        self,
        grid: Grid,
        timeout_s: float,
        on_connected: Callable[[set[int]], None] = lambda connected: None,
    ) -> None:
        self._grid, self._timeout_s, self._on_connected = grid, timeout_s, on_connected
        self._clock = clock_of(grid)
        self._virtual = isinstance(grid, Clock)  # looked up once: it takes long
        self._waiting: dict[str, _Waiting] = {}
        self._pulls: dict[str, Future[list[Message]]] = {}
        self._poll, self._looked = FIRST_WAIT_S, -math.inf

    def __len__(self) -> int:
        return len(self._waiting)

    def send(self, messages: Iterable[Message]) -> None:
        """Send messages."""
        sent = list(messages)
        for message in sent:
            message.metadata.ttl = self._timeout_s
        deadline = self._clock.now() + self._timeout_s
        waiting = [
            (_without_arrays(message), PATIENCE_S + num_bytes(message) / BYTES_A_S)
            for message in sent
        ]
        identities = self._push(sent)
        if len(identities) != len(sent):
            raise RuntimeError(
                f"Flower did not take {len(sent) - len(identities)} of {len(sent)} messages: "
                "too large or too old"
            )
        for identity, (message, patience) in zip(identities, waiting, strict=True):
            # Without an identity it was not taken, its node having gone: nobody will answer.
            until = deadline if identity else -math.inf
            self._waiting[identity or uuid.uuid4().hex] = _Waiting(message, until, patience)

    def _push(self, messages: list[Message]) -> list[str]:
        """Push them, anew where a SuperLink was killed before it said that it had the last object.

        Flower closes a push with that object, and fails when it is sent again. A message that is
        pushed anew is for Flower the one that it has.
        """
        for _ in range(PUSHES - 1):
            try:
                return list(self._grid.push_messages(messages))
            except ObjectPushError as error:
                log(WARNING, "messages are pushed anew: %s", error)
        return list(self._grid.push_messages(messages))

    def receive(self, *, once: bool = False) -> Iterator[tuple[Message, Message]]:
        """Wait for replies; yield each message, without its arrays, with its reply, as they arrive.

        Replies are not stored here once they are yielded. With ``once``, return after the first
        wait, even with nothing: the caller has other things to do.
        """
        while self._waiting:
            arrived, now = False, self._clock.now()
            for identity in list(self._waiting):
                if replies := self._pull(identity):
                    # Replies that Flower makes up itself name node 1 as their source: the
                    # message says who was asked.
                    arrived = True
                    yield self._waiting.pop(identity).message, replies.pop(0)
            if arrived:
                self._poll = FIRST_WAIT_S
                return
            late = [
                identity for identity, waiting in self._waiting.items() if waiting.deadline <= now
            ]
            for identity in late:
                message, deadline, _ = self._waiting.pop(identity)
                self._pulls.pop(identity, None)
                taken = deadline > -math.inf
                reason = (
                    f"no answer within timeout-s = {self._timeout_s:g}"
                    if taken
                    else "Flower did not take the message for it"
                )
                yield message, Message(Error(TOO_LATE, reason), reply_to=message)
            if late:
                return
            if now >= self._looked + LOOK_EVERY_S:
                self._looked = now
                self._on_connected(set(self._grid.get_node_ids()))
            self._clock.wait(
                self._poll, min(waiting.deadline for waiting in self._waiting.values()) - now
            )
            self._poll = min(2 * self._poll, LONGEST_WAIT_S)
            if once:
                return

    def _pull(self, identity: str) -> list[Message]:
        """The reply to a message, if it is there.

        One at a time: a grid would return all replies that are there at once, each as large as a
        model. But Flower announces a reply before it is sent and then waits for it, for minutes if
        the site's link is slow or the site has died: such a reply is received in a thread of its
        own, beside a few others.
        """
        if self._virtual:
            return list(self._grid.pull_messages([identity]))
        pull = self._pulls.get(identity)
        if pull is None:
            if len(self._pulls) == MOST_PULLS:
                return []
            pull = self._pulls[identity] = Future()
            Thread(target=_pull_into, args=(pull, self._grid, identity), daemon=True).start()
            wait([pull], self._waiting[identity].patience_s / len(self._pulls))
        if not pull.done():
            return []
        return self._pulls.pop(identity).result()


def _without_arrays(message: Message) -> Message:
    content = RecordDict(
        {
            name: record
            for name, record in message.content.items()
            if not isinstance(record, ArrayRecord)
        }
    )
    return Message(metadata=message.metadata, content=content)  # type: ignore[call-overload,no-any-return]


def _pull_into(pull: Future[list[Message]], grid: Grid, identity: str) -> None:
    try:
        pull.set_result(list(grid.pull_messages([identity])))
    except BaseException as error:  # whatever it is, whoever waits for the reply must hear of it
        pull.set_exception(error)


def exchange(
    grid: Grid, messages: Iterable[Message], timeout_s: float
) -> Iterator[tuple[int, Message]]:
    """Send messages; yield node and reply of each, exactly once, in the order of arrival."""
    mailbox = Mailbox(grid, timeout_s)
    mailbox.send(messages)
    while mailbox:
        for message, reply in mailbox.receive():
            yield message.metadata.dst_node_id, reply
