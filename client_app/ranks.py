"""A site of several processes, one a GPU, that ``torchrun`` starts.

All work on each request, each on its part of every batch. Rank 0 reads the requests and answers;
what it got, and what the run made the site remember, it shares with the others, which run the same
handlers and throw their answers away. They meet in each gradient
(:func:`client_app.training.data_parallel`). A process that fails alone ends; with it torchrun ends
the others and starts all of them again.
"""

import os
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from flwr.app import ArrayRecord, Context, Message, RecordDict

from client_app import framing

BARRIER_S = 60.0  # one that is through with a request waits so long for the others
IDLE = timedelta(days=3650)  # from request to request
SHARDING = "sharding"  # in the node's configuration: no process has a whole model
STATE = "state/"  # before the names of what the site remembers


@contextmanager
def all_or_none() -> Iterator[None]:
    """A context in which an error ends this process.

    The others would wait for it; so torchrun ends them too, and starts all again.
    """
    try:
        yield
    except Exception:
        traceback.print_exc()
        os._exit(1)


def broadcast(data: bytes | None, group: Any = None, device: torch.device | str = "cpu") -> bytes:
    """The bytes that rank 0 has, at all processes of a group.

    They exchange them through tensors of a device.
    """
    size = torch.tensor([0 if data is None else len(data)], device=device)
    with all_or_none():
        dist.broadcast(size, 0, group)
        whole = torch.frombuffer(bytearray(data or bytes(int(size))), dtype=torch.uint8).to(device)
        dist.broadcast(whole, 0, group)
    return whole.cpu().numpy().tobytes()


class Ranks:
    """The processes of a site.

    Attributes:
        rank, count: which of how many this is.
    """

    def __init__(self) -> None:
        self.rank, self.count = (
            int(os.environ.get("RANK", "0")),
            int(os.environ.get("WORLD_SIZE", "1")),
        )
        if self.count > 1:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            # Each start has names of its own: torchrun's store still knows the addresses of
            # processes that are gone.
            store, rank, count = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)  # type: ignore[attr-defined]
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=count)
            self._control: Any = dist.new_group(backend="gloo", timeout=IDLE)

    def send_request(self, message: Message, context: Context) -> None:
        """Send the others the request that rank 0 works on."""
        if self.count == 1:
            return
        content = RecordDict(
            {**message.content, **{STATE + name: record for name, record in context.state.items()}}
        )
        if context.node_config.get(SHARDING):  # rank 0 scatters the vectors
            content = RecordDict(
                {
                    name: record
                    for name, record in content.items()
                    if not isinstance(record, ArrayRecord)
                }
            )
        head = {
            "kind": message.metadata.message_type,
            "run": context.run_id,
            "node": context.node_id,
            "node-config": dict(context.node_config),
            "run-config": dict(context.run_config),
        }
        broadcast(framing.to_bytes(head, content), self._control)

    def receive_request(self) -> tuple[Mapping[str, Any], RecordDict, RecordDict]:
        """What rank 0 shares: the head, the message's content, and what the site remembers."""
        head, records = framing.from_bytes(broadcast(None, self._control))
        content = RecordDict(
            {name: record for name, record in records.items() if not name.startswith(STATE)}
        )
        state = RecordDict(
            {
                name.removeprefix(STATE): record
                for name, record in records.items()
                if name.startswith(STATE)
            }
        )
        return head, content, state

    def barrier(self, *, alone: bool = False) -> None:
        """Wait until all are through with the request; if one fails, end this process.

        ``alone``: rank 0 has work that the others have not.
        """
        if self.count > 1:
            with all_or_none():
                dist.monitored_barrier(
                    self._control, IDLE if alone else timedelta(seconds=BARRIER_S)
                )
