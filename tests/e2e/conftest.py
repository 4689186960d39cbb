"""What tests with processes of Flower's own share."""

import os
import subprocess
from collections.abc import Callable, Iterator

import pytest

from tests.conftest import ROOT
from tests.e2e.processes import free_port

Make = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    """``make("run", "SET=...")`` with a SuperLink of the tests' own, ended after them."""
    home = tmp_path_factory.mktemp("flwr")
    settings = [f"FLWR_HOME={home}", f"PORT={free_port()}"]
    clean = {
        key: value
        for key, value in os.environ.items()
        if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }

    def call(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = ["make", "--no-print-directory", *arguments, *settings]
        return subprocess.run(
            command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=600, check=False
        )

    yield call
    call("stop")
