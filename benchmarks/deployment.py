"""A real deployment on this machine: seconds a round, and where they go.

    python -m benchmarks.deployment [--heart FOLDER] [NAME ...]

A SuperLink with TLS, three SuperNodes with keys (of another user than their services, where this is
run by root), three site services. Flower asks for messages every three seconds, and a reply is
asked for likewise by its own strategies: two of these polls are the floor to which a round is
compared. ``without service`` is a site whose ClientApp does everything itself.
"""

import argparse
import grp
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any

import numpy as np
import pandas as pd
import psutil
from PIL import Image

from simulation.laboratory import Run
from tests.e2e.processes import CARRIER, SITES, Deployment, Services, as_user

FLOOR_S = 6.0
LARGE = {"1 M": "million", "100 M": "hundred_million"}
FREE = {
    "smallest-steps": 1,
    "smallest-examples": 8,
    "import-paths": [f"benchmarks.wide:{name}" for name in LARGE.values()],
}
PROGRAMS = ("superlink", "serverapp", "supernode", "clientapp", "client_app.service")
ONE_EPOCH = (
    "strategy='fedavg' epochs=3 fedavg.local-epochs=1 training.batch-size=256 training.lr=0.01"
)
CODED = "wire.down-codec='bf16' wire.codec='qsgd'"
DIGITS: dict[str, Any] = {"data": {"source": "digits"}}
CO_LEARNING = "co-learning.local-epochs=1 co-learning.epsilon=0.0 epochs=8"


def pictures(folder: Path) -> dict[str, Any]:
    """Write 600 PNGs of 64 x 64 pixels in two classes."""
    generator = np.random.default_rng(1)
    for number in range(600):
        file = folder / "pictures" / ("ill", "well")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        light = generator.integers(0, 120, (64, 64, 3)) + 100 * (number % 2)
        Image.fromarray(light.astype(np.uint8)).save(file)
    return {"data": {"source": "image-folder", "path": str(folder / "pictures")}}


CASES = {
    "co-learning": f"strategy='co-learning' {CO_LEARNING}",
    "co-learning, without service": f"strategy='co-learning' {CO_LEARNING}",
    "gsgm": "strategy='gsgm' epochs=4 gsgm.local-steps=15 gsgm.schedule='list'",
    "dmsgd, sealed": "strategy='dmsgd' epochs=4 dmsgd.local-steps=15 wire.sealing='keys'",
    "q-saddle, sealed, compressed": "strategy='q-saddle' epochs=4 q-saddle.local-steps=15 "
    "q-saddle.rho=0.05 wire.sealing='keys' wire.codec='qsgd' "
    "wire.error-feedback='choco' topology.averaging-rate=0.9",
    "heart": f"strategy='co-learning' {CO_LEARNING} model.name='mlp'",
    "pictures": f"strategy='co-learning' {CO_LEARNING}",
    **{
        f"{size}{', coded' if coded else ''}": (
            f"{ONE_EPOCH} model.name='benchmarks.wide:{name}' {coded}"
        )
        for size, name in LARGE.items()
        for coded in ("", CODED)
    },
}


class Memory(Thread):
    """Measures each program's peak memory in MB, of the largest process of a kind."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[str, float] = dict.fromkeys(PROGRAMS, 0.0)
        self.over = Event()

    def run(self) -> None:
        """Read the memory of the processes twice a second."""
        while not self.over.wait(0.5):
            for process in psutil.process_iter(["cmdline", "memory_info"]):
                words = " ".join(process.info["cmdline"] or ())
                for name in PROGRAMS:
                    if name in words and process.info["memory_info"]:
                        self.peaks[name] = max(
                            self.peaks[name], process.info["memory_info"].rss / 1e6
                        )


@contextmanager
def deployed(folder: Path, name: str, heart: str) -> Iterator[Deployment]:
    """Start the sites of a case."""
    keys: dict[str, Any] = DIGITS
    of_sites: dict[int, dict[str, Any]] = {}
    if name == "pictures":
        keys = pictures(folder)
    if name == "heart":
        files = sorted(Path(heart).glob("*.csv"))[:SITES]
        tables = [
            {"source": "csv", "path": str(file.absolute()), "label": "target > 0"} for file in files
        ]
        of_sites = {site: {"data": table} for site, table in enumerate(tables)}
    two = os.geteuid() == 0 and bool(as_user(CARRIER))
    more: dict[str, Any] = {"group": grp.getgrgid(CARRIER).gr_name} if two else {}
    deployment = Deployment(folder)
    services = None
    if "without" not in name:
        services = Services(
            folder, sealing="sealed" in name, of_sites=of_sites, policy=FREE, **keys, **more
        )
    try:
        for site in range(SITES):
            socket = f'service="{services.socket(site)}"' if services else f'site={site} data=""'
            deployment.join(site, socket, user=CARRIER if two and services else None)
        deployment.services = services  # type: ignore[attr-defined]
        yield deployment
    finally:
        deployment.end()
        if services:
            services.end()


def measure(name: str, heart: str) -> dict[str, Any]:
    """Run a case; return its row of the table."""
    with TemporaryDirectory() as text:
        folder = Path(text)
        folder.chmod(0o755)
        with deployed(folder, name, heart) as deployment:
            settings = (
                f"{CASES[name]} num-sites={SITES} results.folder='{folder / 'runs'}'".replace(
                    "'", '"'
                )
            )
            memory = Memory()
            memory.start()
            with deployment.run(settings) as process:
                log = process.communicate()[0]
            memory.over.set()
            services = getattr(deployment, "services", None)
            requests = (
                [request for site in range(SITES) for request in services.requests(site)]
                if services
                else []
            )
        results = list((folder / "runs").iterdir()) if (folder / "runs").exists() else []
        if not results or not Run.load(results[0]).finished:
            raise SystemExit(f"{name}: the run ended too soon\n{log}")
        run = Run.load(results[0])
    table = run.metrics[
        (run.metrics["split"] == "train") & (run.metrics["site"] == "all")
    ].drop_duplicates("round")
    spent = np.diff(table["seconds"].to_numpy()) / np.diff(table["round"].to_numpy())
    if name.startswith("gsgm"):
        spent = spent * SITES  # updates, each of one site
    work = [
        request["seconds"]
        for request in requests
        if request["way"] == "out" and request["kind"].startswith("train")
    ]
    refused = [request for request in requests if "rule" in request or "problem" in request]
    return {
        "case": name,
        "rounds": int(table["round"].max()),
        "seconds a round": median(spent),
        "of the floor": median(spent) / FLOOR_S,
        "the service's work": median(work) if work else float("nan"),
        "accuracy": run.history["accuracy"].iloc[-1],
        "refused": len(refused),
        "MB": run.history["megabytes"].iloc[-1],
        **{f"{name}, MB": peak for name, peak in memory.peaks.items()},
    }


def main() -> None:
    """Print a row a case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", help=f"of {', '.join(CASES)}; without any, all but the large ones"
    )
    parser.add_argument(
        "--heart", default="", help="a folder of three CSV files of hospitals, with a column target"
    )
    arguments = parser.parse_args()
    rows = []
    for name in arguments.names or [
        name for name in CASES if " M" not in name and (name != "heart" or arguments.heart)
    ]:
        rows.append(measure(name, arguments.heart))
        print(pd.DataFrame(rows).to_string(index=False, float_format="{:.3g}".format), flush=True)


if __name__ == "__main__":
    main()
