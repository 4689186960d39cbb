"""Replies as Flower's Grid hands them over: announced first, sent afterwards."""

import time
from collections.abc import Iterable, Iterator
from threading import Event
from typing import cast

import pytest
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from configuration.flower import ObjectPushError, TaskIdentity
from server_app import exchange as module
from server_app.exchange import GONE, MOST_PULLS, TOO_LATE, exchange

NOBODY = 99


class Announced:
    """The part of a Grid that a mailbox uses.

    All replies are announced, and whoever asks for one that is not there yet waits.

    Args:
        slow: nodes whose replies take until ``sent``.
    """

    def __init__(self, slow: Iterable[int]) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.slow, self.sent, self.asked_for = set(slow), Event(), Event()
        self.under_way = 0

    def get_node_ids(self) -> Iterable[int]:
        return []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self.messages = {str(message.metadata.dst_node_id): message for message in messages}
        return [identity if identity != str(NOBODY) else "" for identity in self.messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        [identity] = message_ids
        if identity not in self.messages:
            return []
        if int(identity) in self.slow:
            self.under_way += 1
            self.asked_for.set()
            assert self.sent.wait(60)
        return [Message(RecordDict(), reply_to=self.messages[identity])]

    def exchange(
        self, nodes: Iterable[int], timeout_s: float = 60
    ) -> Iterator[tuple[int, Message]]:
        return exchange(
            cast(Grid, self), [Message(RecordDict(), node, "train") for node in nodes], timeout_s
        )


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.2)


def test_a_reply_that_takes_long_to_send_keeps_no_other_waiting() -> None:
    grid = Announced(slow=[1])
    arrivals = grid.exchange([1, 2, 3])
    assert [next(arrivals)[0], next(arrivals)[0]] == [2, 3]
    grid.sent.set()
    assert [node for node, _ in arrivals] == [1]


def test_a_reply_that_is_never_sent_whole_is_too_late() -> None:
    *others, (node, reply) = Announced(slow=[1]).exchange([1, 2, 3], timeout_s=0.5)
    assert [other for other, _ in others] == [2, 3]
    assert (node, reply.error.code) == (1, TOO_LATE)


def test_a_reply_that_is_there_in_time_is_not_too_late_because_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grid = Announced(slow=[2])
    pull = grid.pull_messages
    # The reply of 1 is announced while the mailbox waits for that of 2, for longer than both have.
    monkeypatch.setattr(
        grid,
        "pull_messages",
        lambda ids: [] if ids == ["1"] and not grid.asked_for.is_set() else pull(ids),
    )
    assert [(node, reply.has_error()) for node, reply in grid.exchange([1, 2], timeout_s=0.1)] == [
        (1, False),
        (2, True),
    ]


def test_few_replies_are_in_memory_at_once() -> None:
    grid = Announced(slow=range(1, 31))
    arrivals = grid.exchange(range(1, 32))
    with pytest.MonkeyPatch.context() as patch:
        # The first round of questions is over.
        patch.setattr(time, "sleep", lambda _: grid.sent.set())
        first = next(arrivals)
    assert grid.under_way == MOST_PULLS
    assert sorted([first[0], *(node for node, _ in arrivals)]) == list(range(1, 32))


def test_a_message_that_flower_did_not_take_is_answered_too() -> None:
    found = dict(Announced(slow=[]).exchange([1, NOBODY, 2]))
    assert found.keys() == {1, 2, NOBODY}
    assert found[NOBODY].error.code in GONE
    assert found[NOBODY].error.reason == "Flower did not take the message for it"


def test_messages_that_flower_drops_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Announced(slow=[])
    monkeypatch.setattr(grid, "push_messages", lambda _: ["1"])
    with pytest.raises(RuntimeError, match="did not take 1 of 2 messages"):
        list(grid.exchange([1, 2]))


@pytest.mark.parametrize("kills", [1, module.PUSHES - 1, module.PUSHES])
def test_messages_that_a_killed_superlink_has_not_confirmed_are_pushed_anew(
    kills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Announced(slow=[])
    push, pushed = grid.push_messages, []

    def killed(messages: Iterable[Message]) -> Iterable[str]:
        pushed.append(list(messages))
        if len(pushed) <= kills:
            raise ObjectPushError("object", 1, "session")
        return push(pushed[-1])

    monkeypatch.setattr(grid, "push_messages", killed)
    if kills == module.PUSHES:
        with pytest.raises(ObjectPushError):
            list(grid.exchange([1, 2]))
    else:
        assert sorted(node for node, _ in grid.exchange([1, 2])) == [1, 2]
        assert all(again[0] is pushed[0][0] for again in pushed)  # the same, for Flower too


def test_what_goes_wrong_while_a_reply_comes_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Announced(slow=[])

    def fails(_: Iterable[str]) -> Iterable[Message]:
        raise ConnectionError("the SuperLink is gone")

    monkeypatch.setattr(grid, "pull_messages", fails)
    with pytest.raises(ConnectionError, match="the SuperLink is gone"):
        list(grid.exchange([1]))
