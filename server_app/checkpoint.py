"""Checkpoints: what the server needs to go on with a run that was killed.

A checkpoint is one file in PyTorch's format in the folder ``checkpoints`` of a run's results,
written atomically; reading it runs no code. The last two are kept, and what peers offered is beside
them in files of its own, each written once. A run that has ended well has none: what has one is
unfinished.
"""

import os
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import is_dataclass
from logging import WARNING
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from flwr.app import Array
from safetensors.torch import load_file, save_file
from torch import Tensor

from configuration.config import Config, identity
from configuration.errors import ConfigError, shown
from configuration.files import full_disk_is_os_error, sync_folder
from configuration.flower import log
from server_app.discovery import Federation
from strategies.protocol import Started
from strategies.records import pack, unpack

FOLDER, LOCK, NUM_KEPT, SYNC_EVERY_S = "checkpoints", "lock", 2, 1.0
RUNNING = "its server is still running"


class Saved(NamedTuple):
    """A run as far as it was.

    Attributes:
        config: that makes it this run (:func:`configuration.config.identity`).
        run: Flower's number of its first start, by which sites know it.
        start: how often it was started again until then.
        federation: its sites.
        rows: of ``metrics.csv``.
        arrays: the newest model, or models where sites learn alone.
        driver: the driver's own.
        offers: by name, what peers offered and is not delivered yet.
    """

    config: dict[str, Any]
    run: int
    start: int
    federation: Federation
    rows: int
    arrays: dict[str, Tensor]
    driver: dict[str, Any]
    offers: dict[str, Mapping[str, Array]]

    def next_start(self) -> Started:
        """What messages say of the resumed run, so that sites know it."""
        return Started(self.run, self.start + 1)

    def forget(self) -> None:
        """Drop what is large: whoever goes on with this checkpoint already has what it needs."""
        for part in (self.arrays, self.driver, self.offers):
            part.clear()


class Writer:
    """Writes the checkpoints of a run.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder / FOLDER, FileLock(folder / FOLDER / LOCK, timeout=0)
        if self._folder.exists():
            self._acquire()
        self._number = max(map(_number, self._folder.glob("*.pt")), default=0)
        # The offers of each; of one of a run that goes on, all that are there.
        self._offers_of = {
            self._number: frozenset(file.stem for file in self._folder.glob("*.safetensors"))
        }
        self._synced = 0.0

    def _acquire(self) -> None:
        """Lock the folder: while this process lives, no other may resume the run."""
        try:
            self._lock.acquire()
        except Timeout:
            raise ConfigError(
                f"results.resume: {shown(str(self._folder.parent))}: {RUNNING}"
            ) from None

    def write(self, saved: Saved, metrics: Path) -> None:
        """Write one, which counts on the rows of ``metrics``, then delete what it replaces.

        A power cut, unlike the end of a process, may cost what was written in the last second.

        Raises:
            OSError: it cannot be written; the last one is as it was.
        """
        if not self._folder.exists():
            self._folder.mkdir(parents=True)
            self._acquire()
        for name, arrays in saved.offers.items():
            if not (file := self._folder / f"{name}.safetensors").exists():
                _write_offer(file, arrays)
        self._number += 1
        final = self._folder / f"{self._number:09}.pt"
        partial = final.with_suffix(".partial")
        sync = time.monotonic() - self._synced > SYNC_EVERY_S
        if sync and metrics.exists():
            with metrics.open("rb") as rows:
                os.fsync(rows.fileno())
        with full_disk_is_os_error(), partial.open("wb") as target:
            torch.save(saved._replace(offers={name: {} for name in saved.offers})._asdict(), target)
            if sync:
                target.flush()
                os.fsync(target.fileno())
        partial.replace(final)
        if sync:
            sync_folder(self._folder)
            self._synced = time.monotonic()
        self._offers_of[self._number] = frozenset(saved.offers)
        self._delete_old()

    def _delete_old(self) -> None:
        for number in sorted(self._offers_of)[:-NUM_KEPT]:
            del self._offers_of[number]
        used = frozenset[str]().union(*self._offers_of.values())
        for file in self._folder.iterdir():
            old = _number(file) <= self._number - NUM_KEPT
            if (
                file.stem not in used
                if file.suffix == ".safetensors"
                else file.name != LOCK and old
            ):
                file.unlink(missing_ok=True)

    def close(self) -> None:
        """Unlock the folder: another process may resume the run."""
        self._lock.release()

    def finish(self) -> None:
        """Delete the checkpoints of a run that is over."""
        with suppress(FileNotFoundError):
            for file in self._folder.iterdir():
                file.unlink()
            self._folder.rmdir()
        self.close()


def _number(file: Path) -> int:
    return int(file.stem) if file.stem.isdigit() else 0


def _write_offer(file: Path, arrays: Mapping[str, Array]) -> None:
    partial = file.with_suffix(".partial")
    with full_disk_is_os_error():
        save_file({name: unpack(array).contiguous() for name, array in arrays.items()}, partial)
    partial.replace(file)


def read(folder: Path) -> Saved:
    """The newest checkpoint of a run's folder that can be read.

    Raises:
        ConfigError: there is none.
    """
    reasons = []
    if _is_running(folder):
        raise ConfigError(f"results.resume: {shown(str(folder))}: {RUNNING}")
    for file in sorted((folder / FOLDER).glob("*.pt"), reverse=True):
        try:
            with torch.serialization.safe_globals(_kinds(file)):
                saved = Saved(**torch.load(file, map_location="cpu", weights_only=True))
            offers: dict[str, Mapping[str, Array]] = {
                name: pack(load_file(file.with_name(f"{name}.safetensors")))
                for name in saved.offers
            }
            return saved._replace(offers=offers)
        except (
            Exception
        ) as error:  # whatever is wrong with a damaged file, the one before it may be whole
            reasons.append(f"{file.name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            log(WARNING, "%s: this checkpoint cannot be read, %s", folder, reasons[-1])
    why = "; ".join(reasons) or "no checkpoint is there: it ended well, or had not come so far"
    raise ConfigError(f"results.resume: {shown(str(folder))}: {why}")


def _is_running(folder: Path) -> bool:
    try:
        with (
            FileLock(folder / FOLDER / LOCK, timeout=0)
            if (folder / FOLDER / LOCK).exists()
            else nullcontext()
        ):
            return False
    except Timeout:
        return True


def _kinds(file: Path) -> list[Any]:
    """The classes of the values in a checkpoint: plain ones of modules that are loaded.

    Raises:
        ValueError: it holds something else.
    """
    found = []
    for name in torch.serialization.get_unsafe_globals_in_checkpoint(file):
        module, _, kind = name.rpartition(".")
        value = getattr(sys.modules.get(module), kind, None)
        if name == "builtins.bytes":  # empty ones
            value = bytes
        elif not (isinstance(value, type) and (hasattr(value, "_fields") or is_dataclass(value))):
            raise ValueError(f"it holds a {name}")
        found.append(value)
    return found


def check(config: Config, known: Mapping[str, Any], folder: Path) -> None:
    """Make sure that a folder's run, of the configuration ``known``, is this one.

    Raises:
        ConfigError: names each key that differs.
    """
    own = identity(config.flat())
    other = sorted(key for key in own | dict(known) if own.get(key) != known.get(key))
    if other:
        lines = [
            f"{key} = {shown(own.get(key))}: {shown(known.get(key))} is that of the run in {folder}"
            for key in other
        ]
        raise ConfigError("\n".join(lines))


def find(config: Config) -> tuple[Path, Saved] | None:
    """The run that ``results.resume`` asks to go on with, and its folder; None for a new run.

    Raises:
        ConfigError: there is none, or it has another configuration.
    """
    wanted, own = config.results.resume, identity(config.flat())
    if not wanted:
        return None
    try:
        parent, named = (
            Path(each).expanduser().absolute() for each in (config.results.folder, wanted)
        )
    except RuntimeError as error:  # a user who is not there
        raise ConfigError(
            f"results.resume = {shown(wanted)}, results.folder = {shown(config.results.folder)}: "
            f"{error}"
        ) from None
    if wanted != "auto":
        folder = next((path for path in (parent / wanted, named) if path.is_dir()), None)
        if folder is None:
            raise ConfigError(
                f"results.resume = {shown(wanted)}: no folder; "
                "allowed: auto, or the folder of a run"
            )
        saved = read(folder)
        check(config, saved.config, folder)
        return folder, saved
    for folder in sorted(
        (each.parent for each in parent.glob(f"*/{FOLDER}")),
        key=lambda path: path.name,
        reverse=True,
    ):
        with suppress(ConfigError):
            saved = read(folder)
            if saved.config == own:
                return folder, saved
    log(
        WARNING,
        "results.resume = 'auto': no unfinished run of this configuration in %s: a new one begins",
        parent,
    )
    return None
