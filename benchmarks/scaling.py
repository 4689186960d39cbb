"""Time and memory as sites, parameters and the share of drawn sites grow.

    python -m benchmarks.scaling [--most-parameters 10000000]

The laboratory, FedAvg, one batch of 64 examples a site and round, so that what is measured is
mostly the exchange. Each row runs in a process of its own: milliseconds of the last round for each
site that took part, and the most memory that the run needed beyond what was there before it.
"""

import argparse
import json
import resource
import subprocess
import sys

import pandas as pd
import psutil
import torch

from benchmarks import timing
from configuration.config import configuration
from datasets.sources import Examples

BATCH, ROUNDS, SHAPE = 64, 3, (1, 8, 8)
NETWORKS = {10**4: "ten_thousand", 10**6: "million", 10**7: "ten_million", 10**8: "hundred_million"}
ROWS = (  # sites, parameters, share of the sites that are drawn in a round
    *((sites, 10**4, 1.0) for sites in (5, 30, 100, 300, 1000)),
    *((1000, 10**4, share) for share in (0.1, 0.01)),
    *((5, parameters, 1.0) for parameters in (10**6, 10**7, 10**8)),
    (100, 10**7, 1.0),
)


def examples(path: str) -> Examples:
    """Random ones, a batch and a test example for each of ``path`` sites."""
    count = int(path) * (BATCH + 1)
    x = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1))
    return Examples(x, torch.arange(count) % 10, tuple("0123456789"))


def measured(sites: int, parameters: int, share: float) -> dict[str, float]:
    """Run it in this process, after a small run that loads what every run needs."""
    torch.set_num_threads(1)
    _ends(*ROWS[0])
    before = psutil.Process().memory_info().rss
    ends, drawn = _ends(sites, parameters, share)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    took = ends[-2] - ends[-3]  # the last round also tests all sites
    return {
        "ms a site": round(1000 * took / drawn, 1),
        "MB": round((peak - before) / 1e6),
        "models": round((peak - before) / (4 * parameters)),
    }


def _ends(sites: int, parameters: int, share: float) -> tuple[list[float], int]:
    """When rounds ended, and how many sites took part in each."""
    config = configuration(
        strategy="fedavg",
        num_sites=sites,
        epochs=ROUNDS,
        fedavg={"local_epochs": 1},
        training={"batch_size": BATCH},
        sampling={"fraction": share},
        model={"name": f"benchmarks.wide:{NETWORKS[parameters]}"},
        data={
            "source": "benchmarks.scaling:examples",
            "path": str(sites),
            "test_fraction": 1 / (BATCH + 1),
        },
    )
    return timing.rounds(config).ends, config.sampled(sites)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--most-parameters", type=int, default=10**8)
    parser.add_argument("--row", type=int, help="this row only, in this process, as JSON")
    arguments = parser.parse_args()
    if arguments.row is not None:
        print(json.dumps(measured(*ROWS[arguments.row])))
        return
    found = []
    for number, (sites, parameters, share) in enumerate(ROWS):
        if parameters <= arguments.most_parameters:
            command = [sys.executable, "-m", "benchmarks.scaling", "--row", str(number)]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            own = json.loads(said.splitlines()[-1])
            found.append({"sites": sites, "parameters": parameters, "drawn": share, **own})
    print(pd.DataFrame(found).to_string(index=False))


if __name__ == "__main__":
    main()
