"""Sites behind services of their own, whose SuperNodes are another user.

Their ClientApp looks for what it can read.
"""

import grp
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import load_file

from client_app.policy import SHARDS
from simulation.laboratory import Run
from tests.conftest import ROOT
from tests.e2e.processes import CARRIER, SITES, Deployment, Services, as_user, wait_for

pytestmark = pytest.mark.e2e
# A site's key, memory, file and audit log, and its data.
WANTED = ("private/{}.seal", "private/state-{}", "private/{}.site", "private/{}.audit", "{}.csv")
SPY = f"""
from pathlib import Path
from flwr.clientapp import ClientApp
from client_app.app import app as honest

WANTED = {WANTED!r}

class Spy(ClientApp):
    def __call__(self, message, context):
        socket = Path(context.node_config["service"])
        site, found = socket.stem, []
        for name in WANTED:
            path = name.format(site)
            try:
                there = socket.parent / path
                found.append(path + ": " + str(list(there.iterdir()) if there.is_dir() \
else there.read_text()))
            except PermissionError:
                found.append(path + ": may not be read")
        with Path("loot").open("a") as loot:
            loot.write("\\n".join(found) + "\\n")
        return honest(message, context)

app = Spy()
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not pytest's, which is its user's alone."""
    with TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def app_with_a_spy(folder: Path) -> Path:
    """This app, as a server ships it that wants to know more."""
    ignored = shutil.ignore_patterns(".*", "runs", "tests", "notebooks", "docs", "__pycache__")
    app = Path(shutil.copytree(ROOT, folder / "app", ignore=ignored))
    (app / "spy.py").write_text(SPY)
    project = app / "pyproject.toml"
    project.write_text(
        project.read_text().replace('clientapp = "client_app.app:app"', 'clientapp = "spy:app"')
    )
    return app


@pytest.mark.skipif(
    os.geteuid() != 0 or not as_user(CARRIER), reason="only root can act as two users"
)
def test_shipped_code_reads_nothing_and_sealed_peers_go_on_when_a_service_is_killed(
    folder: Path, tmp_path: Path
) -> None:
    """The service is started again, and finds on its disk what it did before."""
    rows = torch.randn(SITES, 200, 4, generator=torch.Generator().manual_seed(1))
    for site in range(SITES):
        lines = [
            ",".join(f"{value:.4f}" for value in row) + f",{int(row.sum() > 0)}"
            for row in rows[site]
        ]
        (folder / f"{site}.csv").write_text("age,bp,chol,rate,target\n" + "\n".join(lines))
        (folder / f"{site}.csv").chmod(0o600)
    tables = {
        site: {"data": {"source": "csv", "path": str(folder / f"{site}.csv"), "label": "target"}}
        for site in range(SITES)
    }
    rules = {"sealing": "keys", "strategies": ["dmsgd"], "smallest-steps": 5}
    group = grp.getgrgid(CARRIER).gr_name
    services = Services(folder, sealing=True, of_sites=tables, policy=rules, group=group)
    deployment = Deployment(folder, app_with_a_spy(folder))
    try:
        for site in range(SITES):
            deployment.join(site, f'service="{services.socket(site)}"', user=CARRIER)
        settings = (
            f'results.folder="{tmp_path}" strategy="dmsgd" wire.sealing="keys" num-sites=3 '
            "min-sites=3 epochs=7 dmsgd.local-steps=5"
        )
        with deployment.run(f'{settings} model.name="mlp"') as process:
            wait_for(lambda: len(services.requests(2)) >= 6, 600)
            time.sleep(0.5)  # that answer is on its way
            services.kill(2)
            services.start(2)
            log = process.communicate()[0]
        (results,) = tmp_path.iterdir()
        run = Run.load(results)
        assert run.finished, log
        assert run.models == {}
        assert "goes on with what it remembers in" in (services.private / "2.log").read_text()
        for site in range(SITES):
            assert load_file(services.private / f"{site}.safetensors")
            assert not [
                request
                for request in services.requests(site)
                if "rule" in request or "problem" in request
            ]
            loot = "".join(
                file.read_text() for file in (folder / f"supernode-{site}").rglob("loot")
            )
            assert set(loot.splitlines()) == {
                f"{name.format(site)}: may not be read" for name in WANTED
            }
        assert list(run.sites["name"]) == ["clinic 0", "clinic 1", "clinic 2"]
    finally:
        deployment.end()
        services.end()


def test_language_is_learnt_where_a_site_has_several_processes(
    folder: Path, tmp_path: Path
) -> None:
    """Each process holds a shard of the network and of AdamW's moments.

    The other two sites have one process.
    """
    texts = (
        "the cat sat on the mat. ",
        "buy low, sell high, hold on. ",
        "a goal in the last minute! ",
    )
    for site, text in enumerate(texts):
        (folder / f"{site}.csv").write_text("text\n" + f'"{text}"\n' * 150)
    of_sites = {
        site: {
            "data": {"source": "text-bytes", "path": str(folder / f"{site}.csv"), "context": 16},
            "sharding": site == 2 and SHARDS,
        }
        for site in range(SITES)
    }
    services = Services(folder, of_sites=of_sites, processes={2: 2})
    deployment = Deployment(folder)
    try:
        for site in range(SITES):
            deployment.join(site, f'service="{services.socket(site)}"')
        settings = (
            f'results.folder="{tmp_path}" strategy="diloco" num-sites=3 epochs=8 '
            'diloco.local-steps=30 training.task="language" '
            'training.optimizer="adamw" training.lr=0.01 data.source="text-bytes" '
            'data.context=16 model.name="gpt" '
            "model.layers=1 model.width=32 model.heads=2"
        )
        with deployment.run(settings) as process:
            log = process.communicate()[0]
        (results,) = tmp_path.iterdir()
        run = Run.load(results)
        assert run.finished, log
        assert run.summary["bits-per-byte"] < 5.5  # by chance 8
        assert "test bits-per-byte" in log
        for site in range(SITES):
            assert not [
                request
                for request in services.requests(site)
                if "rule" in request or "problem" in request
            ]
    finally:
        deployment.end()
        services.end()
