"""Partitions of a simulation's data: every example goes to exactly one site.

A partition is a function of labels [n] (all 0 where examples have no classes), the number of sites
and a generator, which returns a list of index arrays, one a site; what it takes beside these are
keys of the run configuration. The same generator gives the same split. ``PARTITIONS`` names those
of this file; one's own is ``package.module:function`` (see ``examples/my_partition.py``).
"""

import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from datasets.names import call_imported, listed, shown

Indices = NDArray[np.int64]
FEWEST = 2  # examples a site must have: one to train on, one to test on
TRIES = 1000


class PartitionError(ValueError):
    """The examples cannot be split as asked; the message says which key to change."""


def iid(labels: Indices, num_sites: int, generator: Generator) -> list[Indices]:
    """Equal shares of a random order; sizes differ by at most one."""
    return list(np.array_split(generator.permutation(len(labels)), num_sites))


def sizes(
    labels: Indices, num_sites: int, generator: Generator, size_ratio: float
) -> list[Indices]:
    """Random examples; sizes in geometric progression, the last ``size_ratio`` times the first."""
    weights = np.geomspace(1, size_ratio, num_sites)
    borders = np.rint(np.cumsum(weights / weights.sum())[:-1] * len(labels)).astype(int)
    return list(np.split(generator.permutation(len(labels)), borders))


def dirichlet(labels: Indices, num_sites: int, generator: Generator, alpha: float) -> list[Indices]:
    """Of each class, sites get shares drawn from Dirichlet(alpha, ..., alpha).

    Drawn again until no site is empty.

    Source: Hsu et al., "Measuring the Effects of Non-Identical Data Distribution", 2019. Differs:
    shares are drawn for each class over the sites, not for each site over the classes, so that
    every example is used once.
    """
    for _ in range(TRIES):
        parts: list[list[Indices]] = [[] for _ in range(num_sites)]
        for label in np.unique(labels):
            members = generator.permutation(np.flatnonzero(labels == label))
            shares = generator.dirichlet(np.full(num_sites, alpha))
            borders = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(int)
            for part, cut in zip(parts, np.split(members, borders), strict=True):
                part.append(cut)
        whole = [np.concatenate(part) for part in parts]
        if min(map(len, whole)) >= FEWEST:
            return whole
    key = f"partition.alpha = {alpha}: a site stayed empty in {TRIES} draws"
    raise PartitionError(f"{key}; raise it, or take dirichlet-equal")


def dirichlet_equal(
    labels: Indices, num_sites: int, generator: Generator, alpha: float
) -> list[Indices]:
    """The Dirichlet split of the decentralized literature: skewed classes, equal sizes.

    Sites are split in groups of at most ten. In a group each class is cut by Dirichlet shares, a
    site that already has its share of examples getting no more, until the smallest site has half
    the average. The lists of all sites are then laid end to end and cut again into equal slices,
    whose borders are not those of the Dirichlet draw.

    Source: the code of Lin et al., "Quasi-global momentum", ICML 2021. Differs: the slices take up
    the remainder, so that every example is used once.
    """
    order = generator.permutation(len(labels))
    groups = [min(10, num_sites - start) for start in range(0, num_sites, 10)]
    borders = np.rint(np.cumsum(groups)[:-1] / num_sites * len(labels)).astype(int)
    line: list[Indices] = []
    for members, count in zip(np.split(order, borders), groups, strict=True):
        line += _dirichlet_group(members, labels[members], count, generator, alpha)
    return list(np.array_split(np.concatenate(line), num_sites))


def _dirichlet_group(
    members: Indices, labels: Indices, num_sites: int, generator: Generator, alpha: float
) -> list[Indices]:
    target = len(members) / num_sites
    for _ in range(TRIES):
        parts: list[Indices] = [np.empty(0, np.int64) for _ in range(num_sites)]
        for label in np.unique(labels):
            ours = members[labels == label]
            shares = generator.dirichlet(np.full(num_sites, alpha))
            shares *= [len(part) < target for part in parts]
            if not shares.sum() > 0:  # every site with a share is full: the others take the class
                shares = np.array([float(len(part) < target) for part in parts])
            borders = np.rint(np.cumsum(shares / shares.sum())[:-1] * len(ours)).astype(int)
            parts = [
                np.concatenate([part, cut])
                for part, cut in zip(parts, np.split(ours, borders), strict=True)
            ]
        if min(map(len, parts)) >= 0.5 * target:
            return parts
    # A tiny alpha over few classes may never satisfy the half: slices are made from what there is.
    return parts


def classes(
    labels: Indices, num_sites: int, generator: Generator, classes_per_site: int
) -> list[Indices]:
    """Each site gets ``classes_per_site`` classes; sites that share one get equal parts of it."""
    known = np.unique(labels)
    key = f"partition.classes-per-site = {classes_per_site}"
    if classes_per_site > len(known):
        raise PartitionError(f"{key}: there are {len(known)} classes")
    if num_sites * classes_per_site < len(known):
        raise PartitionError(
            f"{key}: {num_sites} sites would leave out some of the {len(known)} classes; "
            f"allowed: {-(-len(known) // num_sites)} to {len(known)}"
        )
    shuffled = generator.permutation(known)
    owners: dict[int, list[int]] = {int(label): [] for label in known}
    for site in range(num_sites):
        for place in range(site * classes_per_site, (site + 1) * classes_per_site):
            owners[int(shuffled[place % len(known)])].append(site)
    parts: list[list[Indices]] = [[] for _ in range(num_sites)]
    for label, sites in owners.items():
        members = generator.permutation(np.flatnonzero(labels == label))
        for site, cut in zip(sites, np.array_split(members, len(sites)), strict=True):
            parts[site].append(cut)
    return [np.concatenate(part) for part in parts]


def natural(groups: Indices, num_sites: int, generator: Generator) -> list[Indices]:
    """A site for each natural group: a hospital, a speaker."""
    return [np.flatnonzero(groups == site) for site in range(num_sites)]


class Partition(NamedTuple):
    """A named partition.

    Attributes:
        split: takes labels [n], the number of sites, a generator, and the keys.
        by_group: whether it takes the natural sites of the examples instead of their labels.
        by_class: whether examples must have classes.
    """

    split: Callable[..., list[Indices]]
    by_group: bool = False
    by_class: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the run configuration that it takes."""
        return tuple(inspect.signature(self.split).parameters)[3:]


PARTITIONS = {
    "iid": Partition(iid),
    "dirichlet": Partition(dirichlet, by_class=True),
    "dirichlet-equal": Partition(dirichlet_equal, by_class=True),
    "classes": Partition(classes, by_class=True),
    "sizes": Partition(sizes),
    "natural": Partition(natural, by_group=True),
}


def partition(
    kind: str,
    labels: Indices,
    groups: Indices | None,
    group_names: Sequence[str],
    num_sites: int,
    generator: Generator,
    *,
    iid_fraction: float,
    **keys: float,
) -> list[Indices]:
    """Split examples with ``labels`` [n] in the way ``kind``, ``iid_fraction`` of them by chance.

    ``kind`` is one of ``PARTITIONS`` or the import path of one's own; ``keys`` has what it takes,
    and may have more.

    Raises:
        PartitionError: too few examples or classes, other natural sites than sites, or a partition
            of one's own that does not give every example to exactly one site.
    """
    key = f"partition.kind = {shown(kind)}"
    if len(labels) < FEWEST * num_sites:
        raise PartitionError(
            f"num-sites = {num_sites}: {len(labels)} examples are too few, a site needs {FEWEST}"
        )
    if 0 < iid_fraction < 1:
        order = generator.permutation(len(labels))
        mixed, rest = np.split(order, [round(iid_fraction * len(labels))])
        of_rest = None if groups is None else groups[rest]
        parts = partition(
            kind, labels[rest], of_rest, group_names, num_sites, generator, iid_fraction=0.0, **keys
        )
        shares = np.array_split(mixed, num_sites)
        return [
            np.concatenate([rest[part], share]) for part, share in zip(parts, shares, strict=True)
        ]
    if iid_fraction:
        parts = iid(labels, num_sites, generator)
    elif ":" in kind:
        parts = _checked(
            call_imported("partition.kind", kind, PartitionError, labels, num_sites, generator),
            len(labels),
            num_sites,
            key,
        )
    elif kind in PARTITIONS:
        found = PARTITIONS[kind]
        if found.by_group:
            labels = _of_sites(groups, group_names, num_sites, key)
        parts = found.split(labels, num_sites, generator, **{key: keys[key] for key in found.keys})
    else:
        raise PartitionError(f"{key}: allowed: {', '.join(PARTITIONS)}, package.module:function")
    if (fewest := min(map(len, parts))) < FEWEST:
        raise PartitionError(f"{key}: a site got {fewest} examples, it needs {FEWEST}")
    return parts


def _of_sites(groups: Indices | None, names: Sequence[str], num_sites: int, key: str) -> Indices:
    """Check that there is one group for each site, and return the groups."""
    if groups is None:
        raise PartitionError(f"{key}: the data have no natural sites; name them with data.group")
    if len(names) != num_sites:
        raise PartitionError(
            f"num-sites = {num_sites}: {key} needs {len(names)} sites: {listed(names)}"
        )
    return groups


def _checked(parts: object, num_examples: int, num_sites: int, key: str) -> list[Indices]:
    """A user's partition, checked: every example must go to exactly one site."""
    if not isinstance(parts, list | tuple) or len(parts) != num_sites:
        got = f"{len(parts)} of them" if isinstance(parts, list | tuple) else type(parts).__name__
        raise PartitionError(
            f"{key} must return a list of {num_sites} arrays, one a site; got {got}"
        )
    for site, part in enumerate(parts):
        if (
            not isinstance(part, np.ndarray)
            or part.ndim != 1
            or not np.issubdtype(part.dtype, np.integer)
        ):
            got = (
                f"{part.dtype} {part.shape}"
                if isinstance(part, np.ndarray)
                else type(part).__name__
            )
            raise PartitionError(
                f"{key}: site {site} must get a flat array of whole numbers; got {got}"
            )
    checked = [part.astype(np.int64) for part in parts]
    whole = np.concatenate(checked)
    if len(whole) and not 0 <= whole.min() <= whole.max() < num_examples:
        got = f"{whole.min()} to {whole.max()}"
        raise PartitionError(f"{key}: indices must lie between 0 and {num_examples - 1}; got {got}")
    times = np.bincount(whole, minlength=num_examples)
    if (times != 1).any():
        raise PartitionError(
            f"{key}: every example must go to exactly one site; "
            f"of {num_examples} go {(times == 0).sum()} to none and {(times > 1).sum()} to several"
        )
    return checked
