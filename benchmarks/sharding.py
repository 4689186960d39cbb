"""Memory of a site's processes, without and with ``sharding``.

    python -m benchmarks.sharding [PROCESSES]

A service on this machine's CPUs answers an order to train 50 million parameters in 24 layers on
digits, for an epoch with AdamW; then each process is asked for the most memory that it ever had.
What belongs on the CPU beside GPUs is in it: the network before it is sharded, in each process, and
messages, in rank 0.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import psutil

from benchmarks.wide import deep
from tests.app.services import Service, answer_to, fault, flat, order

DEEP = "benchmarks.wide:deep"
FREE = {"smallest-steps": 1, "smallest-examples": 8, "import-paths": [DEEP]}


def peaks(service: Service) -> dict[str, float]:
    """MB of each process of a site, by its rank."""
    service_itself = psutil.Process(service.process.pid)
    found = {}
    for process in (service_itself, *service_itself.children()):
        if (
            "client_app.service" in process.cmdline()
            and "torch.distributed.run" not in process.cmdline()
        ):
            [line] = [
                each
                for each in Path(f"/proc/{process.pid}/status").read_text().splitlines()
                if each.startswith("VmHWM")
            ]
            found[f"rank {process.environ().get('RANK', '0')}"] = int(line.split()[1]) / 1000
    return found


def main() -> None:
    """Print a table."""
    count, rows = int(sys.argv[1]) if len(sys.argv) > 1 else 2, []
    size = sum(parameter.numel() for parameter in deep((1, 8, 8), 10).parameters())
    config = flat(training={"optimizer": "adamw", "batch_size": 256}) | {"model.name": DEEP}
    for processes, sharding in ((1, False), (count, False), (count, True)):
        with TemporaryDirectory() as folder:
            service = Service(Path(folder), processes=processes, policy=FREE, sharding=sharding)
            try:
                reply = answer_to(service, config, "train", order({}, size, **{"local-epochs": 1}))
                if reply.has_error():
                    raise RuntimeError(fault(reply))
                rows.append(
                    {
                        "processes": processes,
                        "sharding": sharding,
                        **peaks(service),
                        "s": service.lines()[-1]["seconds"],
                    }
                )
            finally:
                service.end()
        print(rows[-1], flush=True)
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:,.0f}".format))


if __name__ == "__main__":
    main()
