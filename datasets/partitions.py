"""Who gets what in a simulation. Every example goes to exactly one site; the same generator gives the same split.

Each function returns a list of index arrays, one a site.
"""

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Indices = NDArray[np.int64]
FEWEST = 2  # examples a site must have: one to train on, one to test on
TRIES = 1000


class PartitionError(ValueError):
    """The examples cannot be dealt out as asked; the message says which key to change."""


def partition(
    kind: str,
    labels: Indices,
    groups: Indices | None,
    group_names: Sequence[str],
    num_sites: int,
    generator: Generator,
    *,
    alpha: float,
    classes_per_site: int,
    size_ratio: float,
    iid_fraction: float,
) -> list[Indices]:
    """Deal out examples with ``labels`` [n] in the way ``kind`` of the run configuration, ``iid_fraction`` of them by chance.

    Raises:
        PartitionError: too few examples or classes, or other natural sites than sites.
    """
    if len(labels) < FEWEST * num_sites:
        raise PartitionError(f"num-sites = {num_sites}: {len(labels)} examples are too few, a site needs {FEWEST}")
    if 0 < iid_fraction < 1:
        order = generator.permutation(len(labels))
        mixed, rest = np.split(order, [round(iid_fraction * len(labels))])
        parts = partition(
            kind,
            labels[rest],
            None if groups is None else groups[rest],
            group_names,
            num_sites,
            generator,
            alpha=alpha,
            classes_per_site=classes_per_site,
            size_ratio=size_ratio,
            iid_fraction=0.0,
        )
        return [np.concatenate([rest[part], share]) for part, share in zip(parts, np.array_split(mixed, num_sites), strict=True)]
    match "iid" if iid_fraction else kind:
        case "iid":
            parts = iid(len(labels), num_sites, generator)
        case "dirichlet":
            parts = dirichlet(labels, num_sites, alpha, generator)
        case "dirichlet-equal":
            parts = dirichlet_equal(labels, num_sites, alpha, generator)
        case "classes":
            parts = classes(labels, num_sites, classes_per_site, generator)
        case "sizes":
            parts = sizes(len(labels), num_sites, size_ratio, generator)
        case "natural":
            if groups is None:
                raise PartitionError("partition = 'natural': the data have no natural sites; name them with group")
            if len(group_names) != num_sites:
                names = ", ".join(group_names[:12]) + (", ..." if len(group_names) > 12 else "")
                raise PartitionError(
                    f"num-sites = {num_sites}: partition = 'natural' needs {len(group_names)} sites, one for each of {names}"
                )
            parts = [np.flatnonzero(groups == site) for site in range(num_sites)]
        case _:
            raise ValueError(f"no partition {kind!r}")
    if min(map(len, parts)) < FEWEST:
        raise PartitionError(f"partition = {kind!r}: a site got {min(map(len, parts))} examples, it needs {FEWEST}")
    return parts


def iid(num_examples: int, num_sites: int, generator: Generator) -> list[Indices]:
    """Equal shares of a random order; sizes differ by at most one."""
    return list(np.array_split(generator.permutation(num_examples), num_sites))


def sizes(num_examples: int, num_sites: int, ratio: float, generator: Generator) -> list[Indices]:
    """Random examples, sizes in geometric progression: the largest site has ``ratio`` times the examples of the smallest."""
    weights = np.geomspace(1, ratio, num_sites)
    borders = np.rint(np.cumsum(weights / weights.sum())[:-1] * num_examples).astype(int)
    return list(np.split(generator.permutation(num_examples), borders))


def dirichlet(labels: Indices, num_sites: int, alpha: float, generator: Generator) -> list[Indices]:
    """Of each class, sites get shares drawn from Dirichlet(alpha, ..., alpha); drawn again until no site is empty.

    Source: Hsu et al., "Measuring the Effects of Non-Identical Data Distribution", 2019. Differs: shares are drawn for each class
    over the sites, not for each site over the classes, so that every example is used once.
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
    raise PartitionError(f"dirichlet-alpha = {alpha}: a site stayed empty in {TRIES} draws; raise it or take dirichlet-equal")


def dirichlet_equal(labels: Indices, num_sites: int, alpha: float, generator: Generator) -> list[Indices]:
    """The Dirichlet split of the decentralized literature: skewed classes, equal sizes.

    Sites are dealt with in groups of at most ten. In a group each class is cut by Dirichlet shares, a site that already has its
    share of examples getting no more, until the smallest site has half the average. The lists of all sites are then laid end to
    end and cut again into equal slices, whose borders are not those of the Dirichlet draw.

    Source: the code of Lin et al., "Quasi-global momentum", ICML 2021. Differs: the slices take up the remainder, so that every
    example is used once.
    """
    order = generator.permutation(len(labels))
    helpers = [min(10, num_sites - start) for start in range(0, num_sites, 10)]
    borders = np.rint(np.cumsum(helpers)[:-1] / num_sites * len(labels)).astype(int)
    line: list[Indices] = []
    for members, count in zip(np.split(order, borders), helpers, strict=True):
        line += _dirichlet_group(members, labels[members], count, alpha, generator)
    return list(np.array_split(np.concatenate(line), num_sites))


def _dirichlet_group(members: Indices, labels: Indices, num_sites: int, alpha: float, generator: Generator) -> list[Indices]:
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
            parts = [np.concatenate([part, cut]) for part, cut in zip(parts, np.split(ours, borders), strict=True)]
        if min(map(len, parts)) >= 0.5 * target:
            return parts
    # A tiny alpha over few classes may never satisfy the half: the equal slices are made from what there is.
    return parts


def classes(labels: Indices, num_sites: int, per_site: int, generator: Generator) -> list[Indices]:
    """Each site gets examples of ``per_site`` classes; the sites that share a class get equal parts of it."""
    known = np.unique(labels)
    if per_site > len(known):
        raise PartitionError(f"classes-per-site = {per_site}: there are {len(known)} classes")
    if num_sites * per_site < len(known):
        raise PartitionError(
            f"classes-per-site = {per_site}: {num_sites} sites would leave out some of the {len(known)} classes; "
            f"at least {-(-len(known) // num_sites)}"
        )
    shuffled = generator.permutation(known)
    owners: dict[int, list[int]] = {int(label): [] for label in known}
    for site in range(num_sites):
        for place in range(site * per_site, (site + 1) * per_site):
            owners[int(shuffled[place % len(known)])].append(site)
    parts: list[list[Indices]] = [[] for _ in range(num_sites)]
    for label, sites in owners.items():
        members = generator.permutation(np.flatnonzero(labels == label))
        for site, cut in zip(sites, np.array_split(members, len(sites)), strict=True):
            parts[site].append(cut)
    return [np.concatenate(part) for part in parts]
