"""Files that are on disk whole or not at all, and outlive a power cut."""

import os
from pathlib import Path

SITES = ".sites"  # the folder, among the results of a simulation, of what its sites remember


def write_whole(file: Path, data: bytes) -> None:
    """Write a file for its owner only."""
    partial = file.with_name(f"{file.name}.partial")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as target:
        target.write(data)
        target.flush()
        os.fsync(target.fileno())
    partial.replace(file)
    sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """The names in a folder outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
