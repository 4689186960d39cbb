"""Four peers on a ring: the real ClientApp, and messages that no relay sends."""

from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from client_app.app import app as client_app
from client_app.memory import load_peer_state
from client_app.peer import peer_of
from configuration.config import Config, configuration
from configuration.flower import TaskIdentity
from strategies.peer.state import PeerState
from strategies.records import arrays_of, config_of, pack

SITES = range(4)
COMMON: dict[str, Any] = {"strategy": "d-psgd", "num_sites": 4, "epochs": 4, "model.name": "mlp"}


class Sites:
    """Four peers on a ring, and somebody who sends them what he likes.

    Args:
        node: what ``--node-config`` holds besides Flower's own; or all of it, for each site.
        changes: of the run's configuration.

    Attributes:
        contexts: what each site remembers.
        offered: of each step, what each site offered.
        nonces: that the sites told last.
    """

    def __init__(
        self, node: dict[str, Any] | list[dict[str, Any]] | None = None, **changes: Any
    ) -> None:
        self.config = configuration(**(COMMON | changes))
        # Flower's messages need one.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = (1, 1, 1)
        self.offered: dict[int, dict[int, ArrayRecord]] = {}
        self.nodes = (
            node
            if isinstance(node, list)
            else [{"partition-id": site, "num-partitions": 4} | (node or {}) for site in SITES]
        )
        self.contexts = [self.context(site, self.config) for site in SITES]
        self.public: dict[str, Any] = {}
        self.nonces: dict[str, Any] = {}
        if self.config.wire.sealing != "off":
            cards = [config_of(self.ask(site, "query.site", {})) for site in SITES]
            self.public = {
                f"key-{site}": card["public-key"]
                for site, card in enumerate(cards)
                if "public-key" in card
            }

    def context(self, site: int, config: Config, run: int = 1) -> Context:
        """The context of a site that remembers nothing."""
        return Context(run, 1000 + site, dict(self.nodes[site]), RecordDict(), dict(config.flat()))

    def fields(self, site: int, step: int, **changes: Any) -> dict[str, Any]:
        """The fields of an honest relay's order."""
        fields: dict[str, Any] = {
            "server-round": step,
            "classes": [str(digit) for digit in range(10)],
            "neighbours": [(site - 1) % 4, (site + 1) % 4] if step else [],
            "weights": [1 / 3, 1 / 3] if step else [],
            "listeners": [(site - 1) % 4, (site + 1) % 4],
            "test": False,
            "last": False,
            "rejoin": False,
            "reset": False,
            "cycle-from": min(1.0, step / 48),
        }
        of_others = {
            name: value
            for name, value in (self.public | self.nonces).items()
            if name.rpartition("-")[2] != str(site)
        }
        return (
            fields | of_others | {name.replace("_", "-"): value for name, value in changes.items()}
        )

    def ask(
        self,
        site: int,
        kind: str,
        fields: dict[str, Any],
        received: dict[int, dict[str, Array]] | None = None,
        x: torch.Tensor | None = None,
    ) -> Message:
        """The answer to a message."""
        records: dict[str, Any] = {"config": ConfigRecord(fields)} | (
            {} if x is None else {"arrays": pack({"x": x})}
        )
        records |= {
            f"from-{sender}": ArrayRecord(arrays) for sender, arrays in (received or {}).items()
        }
        message = Message(RecordDict(records), 1000 + site, kind)
        message.metadata.__dict__["_message_id"] = "1"
        reply = client_app(message=message, context=self.contexts[site])
        if not reply.has_error() and "nonce" in config_of(reply):
            self.nonces[f"nonce-{site}"] = config_of(reply)["nonce"]
        return reply

    def delivery(
        self, site: int, step: int, sender: int, labelled: int | None = None
    ) -> dict[str, Array]:
        """What ``sender`` offered ``site`` in a step, which the relay calls ``labelled``."""
        label = step if labelled is None else labelled
        arrays = self.offered[step][sender].items()
        return {
            f"{label}/{name.partition('/')[2]}": array
            for name, array in arrays
            if name.startswith(("offer/", f"to-{site}/"))
        }

    def step(
        self,
        site: int,
        step: int,
        received: dict[int, dict[str, Array]] | None = None,
        **changes: Any,
    ) -> Message:
        """The answer to a step, by default with what the neighbours offered in the one before."""
        if received is None:
            received = (
                {j: self.delivery(site, step - 1, j) for j in ((site - 1) % 4, (site + 1) % 4)}
                if step
                else {}
            )
        return self.ask(site, "train.peer", self.fields(site, step, **changes), received)

    def all_step(self, step: int) -> list[Message]:
        """Let all sites take a step."""
        replies = [self.step(site, step) for site in SITES]
        assert not any(reply.has_error() for reply in replies)
        self.offered[step] = {site: arrays_of(reply) for site, reply in enumerate(replies)}
        return replies

    def state(self, site: int) -> PeerState | None:
        """What a site remembers."""
        algorithm = peer_of(self.config, site, (1,)).plan.algorithm
        return load_peer_state(
            self.contexts[site], type(algorithm.init(torch.zeros(1))), torch.device("cpu")
        )


def after(steps: int, **changes: Any) -> Sites:
    sites = Sites(**changes)
    for step in range(steps):
        sites.all_step(step)
    return sites


def refused(reply: Message) -> list[str]:
    found: Any = config_of(reply)["refused"]
    return list(found)
