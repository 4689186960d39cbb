"""Stores what peers offer to each other until it is delivered."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Array

from strategies.records import OFFER, TO

Link = tuple[int, int]  # sender, reader


class Links:
    """The links of a graph.

    Args:
        chained: whether offers are differences, which must all arrive, in order (CHOCO); of others
            the newest is enough.
        messages: to a peer in an exchange; of two, a step takes only what the step before it
            offers.

    Attributes:
        stale: links on which a difference is missing: nothing more goes over them until their
            sender starts again.
        delivered: bytes, of each link.
    """

    def __init__(self, *, chained: bool, messages: int) -> None:
        self._chained, self._messages = chained, messages
        # Of each sender and reader, steps of offers, by the step before their delivery.
        self._waiting: dict[int, dict[int, dict[int, int]]] = defaultdict(lambda: defaultdict(dict))
        # Of each sender, by step.
        self._offers: dict[int, dict[int, Mapping[str, Array]]] = defaultdict(dict)
        self.stale: set[Link] = set()
        self.delivered: dict[Link, int] = defaultdict(int)

    def waiting(self, sender: int, reader: int, step: int, *, rejoin: bool) -> list[int]:
        """The keys, for :meth:`take` and :meth:`deliver`, of what a step's message delivers."""
        waiting = self._waiting[sender][reader]
        # On a step of one kind, payloads of the other one are of no use.
        found = [s for s in waiting if self._messages == 1 or (step - s) % 2]
        if self._chained:
            return [s for s in found if s < step]
        # Who comes back may find an older one.
        return [max(found)] if rejoin and found else [s for s in found if s == step - 1]

    def get(self, sender: int, reader: int, keys: Iterable[int]) -> dict[str, Array]:
        """The arrays under these keys; they also stay here."""
        return {
            name: array
            for key in keys
            for name, array in self._parts(
                sender, reader, self._waiting[sender][reader][key]
            ).items()
        }

    def _parts(self, sender: int, reader: int, step: int) -> dict[str, Array]:
        """The parts of an offer that are for a reader."""
        own, all_ = f"{TO}{reader}/", f"{OFFER}/"
        offer = self._offers[sender][step]
        return {
            f"{step}/{name.partition('/')[2]}": array
            for name, array in offer.items()
            if name.startswith((own, all_))
        }

    def put(
        self, sender: int, readers: Iterable[int], at: int, step: int, arrays: Mapping[str, Array]
    ) -> None:
        """Store the offer of a step, to be delivered in the step after ``at``."""
        self._offers[sender][step] = arrays
        for reader in readers:
            if (sender, reader) not in self.stale and self._parts(sender, reader, step):
                self._waiting[sender][reader][at] = step
        self._forget(sender)

    def deliver(self, sender: int, reader: int, key: int) -> None:
        """Note that what waits under ``key`` was delivered."""
        if key in self._waiting[sender][reader]:
            self.delivered[sender, reader] += sum(
                len(array.data) for array in self.get(sender, reader, [key]).values()
            )
            self._drop(sender, reader, key)

    def _drop(self, sender: int, reader: int, key: int) -> None:
        del self._waiting[sender][reader][key]
        self._forget(sender)

    def drop_before(self, sender: int, reader: int, first: int) -> None:
        """Drop what waits under keys below ``first``, which is of no use any more."""
        for key in [key for key in self._waiting[sender][reader] if key < first]:
            self._drop(sender, reader, key)

    def clear(self, sender: int, reader: int) -> None:
        """Drop all that waits on a link."""
        self._waiting[sender].pop(reader, None)
        self._forget(sender)

    def miss(self, reader: int) -> None:
        """Mark a reader's links as stale: it may have missed differences that were on their way."""
        for sender in [sender for sender, waiting in self._waiting.items() if reader in waiting]:
            self.clear(sender, reader)
            self.stale.add((sender, reader))

    def _forget(self, sender: int) -> None:
        used = {step for waiting in self._waiting[sender].values() for step in waiting.values()}
        self._offers[sender] = {
            step: arrays for step, arrays in self._offers[sender].items() if step in used
        }

    # Checkpoints.

    def offers(self) -> dict[str, Mapping[str, Array]]:
        """The offers that are not delivered yet, by name."""
        return {
            f"offer-{sender}-{step}": arrays
            for sender, of in self._offers.items()
            for step, arrays in of.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """The state of the links without the offers, for a checkpoint."""
        waiting = {
            (sender, reader): dict(each)
            for sender, of in self._waiting.items()
            for reader, each in of.items()
        }
        return {"waiting": waiting, "stale": sorted(self.stale), "delivered": dict(self.delivered)}

    def load_state_dict(
        self, state: Mapping[str, Any], offers: Mapping[str, Mapping[str, Array]]
    ) -> None:
        """Restore the state and the offers of a checkpoint."""
        for (sender, reader), waiting in state["waiting"].items():
            self._waiting[sender][reader] = waiting
        self.stale, self.delivered = set(state["stale"]), defaultdict(int, state["delivered"])
        for name, arrays in offers.items():
            _, sender, step = name.split("-")
            self._offers[int(sender)][int(step)] = arrays
