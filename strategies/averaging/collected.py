"""The models that sites sent, on disk until all of them are there.

A median needs everything at once, and memory must not grow with the number of sites.
Memory is that of a model and of a block of all rows, however many sites there are; on disk it is a
model a site.
"""

from collections.abc import Mapping
from io import FileIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strategies.robust import Robust, combined


class Collected:
    """The rows of a robust mean.

    Args:
        robust: which mean.
        file: for the rows, empty, without a buffer; those that find no place in it stay in memory.
    """

    def __init__(self, robust: Robust, file: FileIO) -> None:
        self._robust, self._file = robust, file
        self._keys: list[int] = []  # of the rows on disk, then of those in memory
        self._rest: list[NDArray[np.float32]] = []
        self._sizes: dict[str, int] = {}

    def add(self, vectors: Mapping[str, Tensor], key: int) -> None:
        """Add what a site sent: vectors [d] of float32, of the same names from each.

        Rows are taken in the order of the keys.
        """
        self._sizes = self._sizes or {name: len(vector) for name, vector in vectors.items()}
        row = [vectors[name].numpy() for name in self._sizes]
        if self._rest or not self._written(row):
            self._rest.append(np.concatenate(row))
        self._keys.append(key)

    def _written(self, row: list[NDArray[np.float32]]) -> bool:
        start = 4 * sum(self._sizes.values()) * len(self._keys)
        try:
            self._file.seek(start)
            for part in row:
                rest = part.data.cast("B")
                while rest:
                    rest = rest[self._file.write(rest) :]
        except OSError:  # the disk is full
            return False
        return True

    def result(self) -> dict[str, Tensor]:
        """The robust mean of each vector. Krum keeps the same rows of all, judged by the first."""
        total, on_disk = sum(self._sizes.values()), len(self._keys) - len(self._rest)
        order = np.argsort(self._keys, kind="stable")
        rows = (
            np.memmap(self._file, np.float32, "r", shape=(on_disk, total))
            if on_disk
            else np.empty((0, total), np.float32)
        )

        def block(start: int, stop: int) -> Tensor:
            parts = [rows[:, start:stop], *(row[None, start:stop] for row in self._rest)]
            return torch.from_numpy(np.concatenate(parts)[order])

        found = combined(
            block, len(self._keys), total, self._robust, judged=next(iter(self._sizes.values()))
        )
        return dict(zip(self._sizes, found.split(list(self._sizes.values())), strict=True))
