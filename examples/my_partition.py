"""A partition of one's own: ``partition.kind = "examples.my_partition:power_law"``.

A function of labels [n], the number of sites and a generator; it returns a list of index arrays,
one a site. The app checks that every example goes to exactly one site, and at least two to each.
"""

import numpy as np
from numpy.random import Generator

from datasets.partitions import FEWEST, Indices

EXPONENT = 1.0  # 0: equal sizes


def power_law(labels: Indices, num_sites: int, generator: Generator) -> list[Indices]:
    """Random examples; sizes by a power law, as those of cities.

    Beside FEWEST for everybody, site i gets a share in proportion to (i + 1)^-EXPONENT.
    """
    shares = np.arange(1.0, num_sites + 1) ** -EXPONENT
    spare = np.cumsum(shares / shares.sum()) * (len(labels) - FEWEST * num_sites)
    borders = np.rint(spare).astype(int) + FEWEST * np.arange(1, num_sites + 1)
    return list(np.split(generator.permutation(len(labels)), borders[:-1]))
