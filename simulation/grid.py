"""A grid in the calling process and in virtual time.

It runs the real ServerApp and ClientApp without Ray, network or waiting.

A discrete-event simulation. A message's answer is computed when the message is sent; when it
arrives is computed from the site's speed, its link and the bytes of the real messages. The clock
stands still while a site or the server computes and jumps to the next event when the server waits.
So a server sees the interleaving that the world makes, whatever the machine does, and the same run
again gives the same history bit for bit. The server's own work takes no virtual time.
"""

import heapq
import math
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flwr.app import Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from configuration.flower import Run, TaskIdentity
from server_app.spool import Waiting
from simulation.world import SiteWorld, World
from strategies.protocol import TEST
from strategies.records import metrics_of, num_bytes

FIRST_NODE = 1000  # node ids differ from site numbers, so that mixing them up fails
# Flower notices that a site is gone after so many seconds without a heartbeat.
NOTICED_AFTER_S = 60.0
RAISED, UNAVAILABLE = 2, 5  # Flower's error codes
IN_MEMORY = 2**28  # bytes of replies that wait
TEST_COST = 1 / 3  # of a forward pass, in forward and backward passes

Tamper = Callable[[int, Message, Message], Message | None]


class Call(NamedTuple):
    """A message that a site answers.

    Attributes:
        message: that it got.
        number: counts messages.
        node: the site's.
        start: when it begins.
        outage: when it next goes off, and is back.
    """

    message: Message
    number: int
    node: int
    start: float
    outage: tuple[float, float] | None


class Fate(NamedTuple):
    """What becomes of an answer.

    Attributes:
        kept: whether the site remembers what it did.
        time: when the server gets it, or hears that the site is gone; None for never.
        lost: whether it is lost.
    """

    kept: bool
    time: float | None
    lost: bool


class _Event(NamedTuple):
    """A reply that arrives at ``time``; events of the same time keep their order."""

    time: float
    number: int
    identity: str
    reply: Callable[[], Message]


class VirtualGrid(Grid):
    """Runs sites in this process; its own clock (:class:`server_app.exchange.Clock`).

    A site works on one message after the other. If it goes off meanwhile, the message is lost, and
    the server gets an error when Flower would notice; if the site is back before that, the server
    waits until its timeout, as with Flower.

    Args:
        client_app: called directly with each message.
        sites: what each site lives in.
        run_config: the run configuration of every site.
        state: the folder in which sites keep what they remember; None for memory only.
        start_s: the time.
        tamper: called with a site's number, the message and the reply; what it returns is delivered
            instead; with None, the reply is lost.

    Attributes:
        contexts: of each node, what its site is configured with and remembers.
    """

    def __init__(
        self,
        client_app: ClientApp,
        sites: list[SiteWorld],
        run_config: Mapping[str, Any],
        tamper: Tamper | None = None,
        state: Path | None = None,
        start_s: float = 0.0,
    ) -> None:
        # A Message asks the running task for its identity; there is none here: this one is made up.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self._run = Run.create_empty(run_id=1)
        self._client_app, self._tamper = client_app, tamper
        self._now = start_s
        self._replies = Waiting(IN_MEMORY)
        self._arriving: list[_Event] = []
        self._arrived: dict[str, Callable[[], Message]] = {}
        self._count = 0
        self._sites = {FIRST_NODE + number: site for number, site in enumerate(sites)}
        self._busy_until = dict.fromkeys(self._sites, 0.0)
        folder: dict[str, Any] = {"state": str(state)} if state else {}
        self.contexts = {
            node: Context(
                run_id=1,
                node_id=node,
                node_config={"partition-id": node - FIRST_NODE, "num-partitions": len(sites)}
                | folder,
                state=RecordDict(),
                # Else sites of a simulation keep what they remember among the results.
                run_config=dict(run_config) | {"results.checkpoint-minutes": 0.0},
            )
            for node in self._sites
        }

    def now(self) -> float:
        """Virtual seconds since the beginning."""
        return self._now

    def wait(self, poll_s: float, limit_s: float) -> None:
        """Jump to the next reply or to the next site that comes back, by at most ``limit_s``."""
        outages = (site.next_outage(self._now) for site in self._sites.values())
        events = [outage[1] for outage in outages if outage and outage[0] <= self._now]
        if self._arriving:
            events.append(self._arriving[0].time)
        self._now = min([self._now + max(0.0, limit_s), *events])

    def set_run(self, run: Run) -> None:
        """Do nothing: there is one run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run, of which Flower's fields are empty."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message; ``Message(...)`` does the same."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The sites that Flower would take to be connected."""
        return [node for node, site in self._sites.items() if not self._missed(site)]

    def _missed(self, site: SiteWorld) -> bool:
        outage = site.next_outage(self._now)
        return (
            outage is not None
            and outage[0] + (NOTICED_AFTER_S if outage[0] > 0 else 0) <= self._now
        )

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages: sites answer at once; replies are stored with their times of arrival."""
        return [self._send(message) for message in messages]

    def _send(self, message: Message) -> str:
        identity = message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
        self._count += 1
        node = message.metadata.dst_node_id
        site, start = self._sites[node], max(self._now, self._busy_until[node])
        outage, noticed = site.next_outage(self._now), math.inf
        if self._missed(site):
            noticed = self._now
        elif start == math.inf:  # it died at work, and nobody knows yet
            assert outage is not None
            noticed = outage[0] + NOTICED_AFTER_S
        else:
            while (outage := site.next_outage(start)) and outage[0] <= start:  # off, unnoticed
                if outage[1] - outage[0] > NOTICED_AFTER_S:
                    noticed = max(start, outage[0] + NOTICED_AFTER_S)
                    break
                start = outage[1]
        call = Call(message, self._count, node, start, outage)
        if noticed < math.inf:
            self._deliver(call, noticed, self._unavailable(message))
        else:
            self._work(call)
        return identity

    def _work(self, call: Call) -> None:
        """A site answers."""
        context = self._context(call.node)
        try:
            reply = self._client_app(message=call.message, context=context)
        except Exception as error:  # as Flower does for an app that raises
            reply = Message(Error(RAISED, f"{type(error)}:<'{error}'>"), reply_to=call.message)
        self._answered(call, context, reply)

    def _context(self, node: int) -> Context:
        """A copy of what the site is configured with and remembers."""
        known = self.contexts[node]
        return Context(
            known.run_id,
            known.node_id,
            known.node_config,
            RecordDict(dict(known.state)),
            known.run_config,
        )

    def _answered(self, call: Call, context: Context, reply: Message) -> None:
        """A site has its reply, and sends it, if it is not off by then."""
        fate = self._fate(call, self._samples(reply), num_bytes(reply))
        if fate.kept:
            self.contexts[call.node] = context
        if fate.time is not None:
            self._deliver(call, fate.time, self._unavailable(call.message) if fate.lost else reply)

    def _fate(self, call: Call, samples: float, size: int) -> Fate:
        """What becomes of an answer of ``size`` bytes, after work on so many ``samples``."""
        site, outage = self._sites[call.node], call.outage
        done = call.start + site.travel_s(num_bytes(call.message)) + samples / site.samples_per_s
        arrival = done + site.travel_s(size)
        if (
            outage and outage[0] < arrival
        ):  # it goes off on the way: what it did is lost, unless it was done and only the reply is
            self._busy_until[call.node] = outage[1]
            noticed = outage[1] - outage[0] > NOTICED_AFTER_S
            return Fate(outage[0] >= done, outage[0] + NOTICED_AFTER_S if noticed else None, True)
        self._busy_until[call.node] = arrival
        return Fate(True, arrival, False)

    def _deliver(self, call: Call, time: float, reply: Message) -> None:
        """Store a reply until it arrives."""
        if self._tamper:
            passed = self._tamper(call.node - FIRST_NODE, call.message, reply)
            if passed is None:
                return
            reply = passed
        if self._in_time(call, time):
            self._store(call, time, self._replies.put(reply))

    def _in_time(self, call: Call, time: float) -> bool:
        return time <= self._now + call.message.metadata.ttl

    def _store(self, call: Call, time: float, reply: Callable[[], Message]) -> None:
        """Store who knows a reply."""
        event = _Event(time, call.number, call.message.metadata.message_id, reply)
        heapq.heappush(self._arriving, event)

    @staticmethod
    def _samples(reply: Message) -> float:
        """The work behind a reply, in examples trained on."""
        if reply.has_error():
            return 0.0
        metrics, beside = metrics_of(reply), reply.content.get(TEST)
        tests: Any = beside.get("num-examples", 0) if isinstance(beside, MetricRecord) else 0
        samples: Any = metrics.get("samples")
        if samples is None:
            samples, tests = 0, metrics.get("num-examples", 0)
        return float(samples) + TEST_COST * float(tests)

    @staticmethod
    def _unavailable(message: Message) -> Message:
        return Message(Error(UNAVAILABLE, "the site is not connected"), reply_to=message)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that have arrived."""
        while self._arriving and self._arriving[0].time <= self._now:
            event = heapq.heappop(self._arriving)
            self._arrived[event.identity] = event.reply
        return [
            self._arrived.pop(identity)() for identity in message_ids if identity in self._arrived
        ]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Both at once: the replies that come within ``timeout`` seconds."""
        waiting, replies = set(self.push_messages(messages)), []
        deadline = self._now + (math.inf if timeout is None else timeout)
        while waiting and self._arriving and self._now < deadline:
            self.wait(0, deadline - self._now)
            arrived = list(self.pull_messages(waiting))
            waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
            replies += arrived
        return replies


def run_in_process(
    server_app: ServerApp,
    client_app: ClientApp,
    num_sites: int,
    run_config: Mapping[str, Any],
    tamper: Tamper | None = None,
) -> None:
    """Run an app in this process, in the world of :class:`World`'s defaults.

    Raises:
        Exception: whatever the ServerApp raises.
    """
    grid = VirtualGrid(client_app, World().sites(num_sites, 0), run_config, tamper)
    server_app(
        grid,
        Context(
            run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(run_config)
        ),
    )
