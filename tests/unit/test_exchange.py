"""Replies as Flower's Grid hands them over: announced first, sent afterwards."""

from collections.abc import Iterable
from threading import Event
from typing import Any, cast

import pytest
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from server_app import exchange as module
from server_app.exchange import TOO_LATE, Mailbox, exchange


class Announced:
    """The part of a Grid that a mailbox uses. Every reply is there, but that to "0" takes until ``sent``: who asks for it waits."""

    def __init__(self, sent: Event) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.sent = sent
        self.messages: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self.messages = {str(number): message for number, message in enumerate(messages)}
        return list(self.messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        [identity] = message_ids
        if identity == "0":
            self.sent.wait()
            if not self.messages:
                raise ConnectionError("the SuperLink is gone")
        return [Message(RecordDict(), reply_to=self.messages[identity])]


def asked() -> list[Message]:
    return [Message(RecordDict(), node, "train") for node in (1, 2, 3)]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(module, "PATIENCE_S", 0.01)
    event = Event()
    yield event
    event.set()


def test_a_reply_that_takes_long_to_send_keeps_no_other_waiting(sent: Event) -> None:
    grid = cast(Grid, Announced(sent))
    arrivals = exchange(grid, asked(), 60)
    assert [next(arrivals)[0], next(arrivals)[0]] == [2, 3]
    sent.set()
    assert next(arrivals)[0] == 1


def test_a_reply_that_is_never_sent_whole_is_too_late(sent: Event) -> None:
    grid = cast(Grid, Announced(sent))
    *others, (node, reply) = exchange(grid, asked(), 0.2)
    assert [other for other, _ in others] == [2, 3]
    assert (node, reply.error.code) == (1, TOO_LATE)


def test_what_goes_wrong_while_a_reply_comes_is_raised(sent: Event) -> None:
    grid = Announced(sent)
    mailbox = Mailbox(cast(Grid, grid), 60)
    mailbox.send(asked()[:1])
    grid.messages = {}
    sent.set()
    with pytest.raises(ConnectionError, match="SuperLink"):
        list(mailbox.receive())
