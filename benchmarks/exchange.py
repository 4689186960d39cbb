"""What ten sites' exchange of a model of 7 billion parameters takes, by costs measured here.

    python -m benchmarks.exchange [--parameters 7e9] [--sites 10] [--gbit 1]

    exchange = down + up + site's work + server's work
    down, up = bytes a site / min(server's link / sites, one stream)

One stream is what others report of a SuperLink over a WAN of 100 ms: 4 GB each way in about
10 minutes, 13 MB/s. Packing, the border's checks, the mean and the codecs are measured with
20 million parameters, on one core. ``superlink`` is what Flower's processes need for a GB:
docs/results/deployment.md, 100 million parameters, what is left of a round without the service's
work and Flower's polls. Pessimistic: nothing overlaps.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch

from strategies.averaging.mean import StreamingMean, extent
from strategies.codecs import Codec, bf16, identity, qsgd
from strategies.records import pack

MEASURED = 20_000_000
STREAM = 8e9 / 600  # bytes a second
SUPERLINK = 20.0  # seconds a GB, on two cores that do everything else, too
STEPS = 10_000
WIRES: dict[str, tuple[Codec, Codec]] = {  # down, up
    "float32": (identity(), identity()),
    "bf16": (bf16([MEASURED]), bf16([MEASURED])),
    "bf16 down, qsgd 8 bits up": (bf16([MEASURED]), qsgd([MEASURED], 8)),
    "bf16 down, qsgd 4 bits up": (bf16([MEASURED]), qsgd([MEASURED], 4)),
}


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of one core, which other work does not change; of the second of two calls."""
    work()
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    """Print a row a wire."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=float, default=7e9)
    parser.add_argument("--sites", type=int, default=10)
    parser.add_argument(
        "--gbit", type=float, default=1.0, help="the server's link, which all sites share"
    )
    parser.add_argument("--superlink", type=float, default=SUPERLINK, help="seconds a GB")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    x, scale = torch.randn(MEASURED), arguments.parameters / MEASURED
    mean = StreamingMean(x.shape)
    packing = seconds(lambda: pack({"x": x}))

    def add() -> None:
        extent(x, x)
        mean.add(x, 0.01)

    adding, gigabytes = seconds(add), 4 * MEASURED / 1e9
    rate = min(arguments.gbit * 1e9 / 8 / arguments.sites, STREAM)
    print(
        f"seconds a GB of float32: packing {packing / gigabytes:.2f}, "
        f"checks and mean {adding / gigabytes:.2f}"
    )
    rows = []
    for name, codecs in WIRES.items():
        size, site, server = [0.0, 0.0], packing, packing + arguments.sites * adding
        for way, found in enumerate(codecs):
            payload = found.encode(x, torch.Generator())
            size[way] = sum(part.numel() * part.element_size() for part in payload.values()) * scale
            encoding = seconds(lambda: found.encode(x, torch.Generator()))  # noqa: B023
            decoding = seconds(lambda: found.decode(payload))  # noqa: B023
            site += decoding if way == 0 else encoding
            server += encoding if way == 0 else arguments.sites * decoding
        whole = arguments.sites * sum(size)
        exchange = sum(size) / rate + (site + server) * scale + arguments.superlink * whole / 1e9
        row: dict[str, Any] = {
            "wire": name,
            "GB down": size[0] / 1e9,
            "GB up": size[1] / 1e9,
            "link, min": sum(size) / rate / 60,
            "site's work, min": site * scale / 60,
            "server's work, min": server * scale / 60,
            "SuperLink, min": arguments.superlink * whole / 6e10,
            "exchange, min": exchange / 60,
        }
        for steps in (50, 500):
            row[f"hours in {STEPS:,} steps, H = {steps}"] = STEPS / steps * exchange / 3600
        rows.append(row)
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:.3g}".format))


if __name__ == "__main__":
    main()
