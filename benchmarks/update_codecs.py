"""What codecs cost in accuracy where sites send pseudo-gradients.

    python -m benchmarks.update_codecs

Digits, five sites of unlike classes, three seeds.
"""

from statistics import mean, stdev
from typing import Any

import pandas as pd

from simulation.laboratory import simulate

METHODS: dict[str, dict[str, Any]] = {
    "diloco": {"training": {"optimizer": "adamw", "lr": 0.003}, "diloco.local-steps": 10},
    "gsgm": {"gsgm.schedule": "list"},
}
FEEDBACK = {"error_feedback": "deep-squeeze"}
WIRES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16 up": {"codec": "bf16"},
    "bf16 up and down": {"codec": "bf16", "down_codec": "bf16"},
    "qsgd 8 bits": {"codec": "qsgd"},
    "qsgd 4 bits": {"codec": "qsgd", "bits": 4},
    "qsgd 4 bits, deep-squeeze": {"codec": "qsgd", "bits": 4, **FEEDBACK},
    "qsgd 4 bits, deep-squeeze, bf16 down": {
        "codec": "qsgd",
        "bits": 4,
        **FEEDBACK,
        "down_codec": "bf16",
    },
}
SEEDS = (1, 2, 3)


def main() -> None:
    """Print a row a codec."""
    rows = []
    for wire, keys in WIRES.items():
        row: dict[str, Any] = {"wire": wire}
        for method, more in METHODS.items():
            common: dict[str, Any] = {
                "strategy": method,
                "num_sites": 5,
                "epochs": 10,
                "model": {"name": "mlp"},
                "progress": False,
            }
            common |= {"partition": {"kind": "dirichlet", "alpha": 0.3}, "wire": keys, **more}
            runs = [simulate(**common, seed=seed) for seed in SEEDS]
            found = [run.summary["accuracy"] for run in runs]
            row[method] = f"{mean(found):.3f} ± {stdev(found):.3f}"
            row[f"{method}, MB up"] = mean(run.metrics["bytes_up"].max() for run in runs) / 1e6
        rows.append(row)
        print(pd.DataFrame(rows).to_string(index=False, float_format="{:.2f}".format), flush=True)


if __name__ == "__main__":
    main()
