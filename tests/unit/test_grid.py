"""Virtual time: when a reply arrives, in which order, and what becomes of a site that goes off."""

import math
from typing import Any

import pytest
from flwr.app import Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from server_app.exchange import Clock, clock_of, exchange
from simulation.grid import FIRST_NODE, NOTICED_AFTER_S, VirtualGrid
from simulation.world import World
from strategies.records import num_bytes

SAMPLES = 100

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Count in the site's state how often it trained."""
    count = int(context.state["count"]["n"]) + 1 if "count" in context.state else 1  # type: ignore[arg-type]
    context.state["count"] = MetricRecord({"n": count})
    return Message(
        RecordDict({"metrics": MetricRecord({"samples": SAMPLES, "count": count})}),
        reply_to=message,
    )


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test on as many examples."""
    return Message(
        RecordDict({"metrics": MetricRecord({"num-examples": SAMPLES})}), reply_to=message
    )


def make(num_sites: int = 1, **world: Any) -> VirtualGrid:
    still = {"samples_per_s": 10.0, "latency_ms": 500.0, "bandwidth_mbps": 1e299}
    return VirtualGrid(app, World(**(still | world)).sites(num_sites, 1), {})


def ask(
    grid: VirtualGrid, site: int = 0, kind: str = "train", timeout_s: float = 3600
) -> tuple[float, Message]:
    [(_, reply)] = exchange(grid, [Message(RecordDict(), FIRST_NODE + site, kind)], timeout_s)
    return grid.now(), reply


def count(reply: Message) -> Any:
    return reply.content["metrics"]["count"]


def test_a_grid_that_keeps_time_is_the_clock() -> None:
    grid = make()
    assert isinstance(grid, Clock)
    assert clock_of(grid) is grid


def test_reply_takes_the_way_there_the_work_and_the_way_back() -> None:
    assert ask(make())[0] == pytest.approx(0.5 + SAMPLES / 10 + 0.5)


def test_a_test_costs_a_third_of_training() -> None:
    assert ask(make(), kind="evaluate")[0] == pytest.approx(0.5 + SAMPLES / 30 + 0.5)


def test_bytes_take_the_time_that_the_link_needs() -> None:
    grid = make(bandwidth_mbps=0.001, latency_ms=0)
    message = Message(
        RecordDict({"metrics": MetricRecord({"a": list(range(1000))})}), FIRST_NODE, "train"
    )
    [(_, reply)] = exchange(grid, [message], 1e6)
    assert num_bytes(message) > 1000
    assert grid.now() == pytest.approx(
        (num_bytes(message) + num_bytes(reply)) * 8 / 1000 + SAMPLES / 10
    )


def test_replies_arrive_in_the_order_of_virtual_time() -> None:
    grid = make(4, samples_per_s=[10, 40, 20, 80])
    messages = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
    arrivals = [(node - FIRST_NODE, grid.now()) for node, _ in exchange(grid, messages, 3600)]
    assert arrivals == [(3, 2.25), (1, 3.5), (2, 6), (0, 11)]


def test_site_works_on_one_message_after_the_other() -> None:
    grid = make()
    messages = [Message(RecordDict(), FIRST_NODE, "train") for _ in range(3)]
    assert [(grid.now(), count(reply)) for _, reply in exchange(grid, messages, 3600)] == [
        (11, 1),
        (22, 2),
        (33, 3),
    ]


def test_answer_that_comes_too_late_is_not_delivered() -> None:
    grid = make()
    time, reply = ask(grid, timeout_s=5)
    assert time == 5
    assert "no answer within timeout-s = 5" in str(reply.error.reason)
    assert ask(grid)[0] == 22  # the site worked on to the end, then on the next message
    assert ask(grid, timeout_s=7)[1].metadata.ttl <= 7  # Flower, too, forgets the message then


def test_error_that_flower_makes_up_itself_is_put_down_to_the_site_that_was_asked() -> None:
    def made_up(number: int, message: Message, reply: Message) -> Message:
        error = Message(Error(3, "expired"), reply_to=message)
        error.metadata.__dict__["_src_node_id"] = 1  # as Flower's SuperLink signs
        return error

    grid = VirtualGrid(app, World().sites(2, 1), {}, made_up)
    messages = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
    assert sorted(node for node, _ in exchange(grid, messages, 3600)) == [
        FIRST_NODE,
        FIRST_NODE + 1,
    ]


def test_exception_at_a_site_is_flowers_error() -> None:
    _, reply = ask(make(), kind="query.nothing")
    assert reply.error.code == 2


def test_dead_site_is_noticed_after_flowers_heartbeats() -> None:
    grid = make(2, offline={0: [(3, math.inf)]})
    time, reply = ask(grid)
    assert (time, reply.error.code) == (3 + NOTICED_AFTER_S, 5)
    assert list(grid.get_node_ids()) == [FIRST_NODE + 1]
    assert ask(grid)[0] == time  # from now on it is known at once


def test_site_that_is_back_before_it_was_missed_lost_what_it_did() -> None:
    grid = make(offline={0: [(3, 20)]})
    time, reply = ask(grid, timeout_s=100)
    assert time == 100
    assert "no answer" in str(reply.error.reason)
    time, reply = ask(grid)
    assert (time, count(reply)) == (111, 1)  # its state too


def test_message_to_a_site_that_is_off_waits_for_it() -> None:
    grid = make(offline={0: [(3, 40)]})
    grid.wait(0, 10)
    time, reply = ask(grid)
    assert (time, count(reply)) == (51, 1)


def test_reply_lost_on_the_way_leaves_the_state_it_was_made_with() -> None:
    grid = make(latency_ms=5000, offline={0: [(17, 18)]})  # 5 s there, 10 s of work, 5 s back
    assert ask(grid, timeout_s=50)[1].has_error()
    assert count(ask(grid)[1]) == 2


def test_waiting_ends_when_a_site_comes_back() -> None:
    grid = make(offline={0: [(0, 40)]})
    assert not list(grid.get_node_ids())
    grid.wait(0, 1000)
    assert grid.now() == 40
    assert list(grid.get_node_ids()) == [FIRST_NODE]


def test_flowers_own_send_and_receive_works() -> None:
    grid = make(3, samples_per_s=[10, 20, 1])
    messages = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
    assert len(list(grid.send_and_receive(messages, timeout=20))) == 2
    assert grid.now() == 20
