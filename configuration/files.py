"""Files that are on disk whole or not at all, and outlive a power cut."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

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


def append(descriptor: int, data: bytes) -> None:
    """Append at once and all of it, or leave the file as it was.

    Raises:
        OSError: there is no space for it.
    """
    size = os.fstat(descriptor).st_size
    if os.write(descriptor, data) < len(data):  # what a disk that becomes full takes, is no error
        os.ftruncate(descriptor, size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def full_disk_is_os_error() -> Iterator[None]:
    """Safetensors and PyTorch have errors of their own for a disk that is full."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise OSError(str(error)) from None


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that its names outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
