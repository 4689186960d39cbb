"""One site's examples: its training part and its test part, ready to compute with."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple, Self

import numpy as np
import pandas as pd
import torch
from numpy.random import Generator
from torch import Tensor

from datasets.errors import SourceError
from datasets.examples import LARGEST, Examples
from datasets.lazy import Lazy, Reader, Values
from datasets.names import listed, shown
from datasets.partitions import FEWEST, PARTITIONS, Indices, PartitionError, partition

FAR_OFF = 50  # deviations


class Part(NamedTuple):
    """Examples of one purpose: ``x`` [n, ...] as the source left it, and ``y`` [n, ...].

    In classification ``y`` is [n] int64.
    """

    x: Values
    y: Values


class SiteData(NamedTuple):
    """What a site holds.

    Attributes:
        train, test: its examples.
        classes: the names that ``y`` counts.
        columns: names of a table's features.
        notes: what a person should know about the data, such as filled-in values.
    """

    train: Part
    test: Part
    classes: tuple[str, ...]
    columns: tuple[str, ...]
    notes: tuple[str, ...]


class Split(NamedTuple):
    """Indices of one site's training and test examples in the data set."""

    train: Indices
    test: Indices


def deal(
    examples: Examples,
    num_sites: int,
    generator: Generator,
    *,
    kind: str,
    iid_fraction: float,
    test_part: str,
    test_fraction: float,
    validation: float = 0.0,
    **keys: float,
) -> list[Split]:
    """Everybody's examples in a simulation: each goes to one site, to train or to test on.

    ``kind``, ``iid_fraction`` and ``keys`` as in :func:`datasets.partitions.partition`. With
    ``validation`` sites test on so much of their training parts, which are dealt out among them as
    test parts are, and nobody sees these.

    Raises:
        PartitionError: the data cannot be dealt out so.
    """
    pool, official = _candidates(examples, test_part, validation)
    parts = partition(
        kind,
        _labels(examples, kind)[pool],
        None if examples.group is None else examples.group.numpy()[pool],
        examples.groups,
        num_sites,
        generator,
        iid_fraction=iid_fraction,
        **keys,
    )
    if official is None:
        splits = [_split(pool[part], test_fraction, generator) for part in parts]
    else:
        splits = [Split(pool[part], official) for part in parts]
    if validation:
        splits = [_validating(split, validation, generator) for split in splits]
    elif official is not None:
        return _spread(splits, official, generator)
    if test_part == "own":
        return splits
    return _spread(splits, np.concatenate([split.test for split in splits]), generator)


def _spread(splits: Sequence[Split], tests: Indices, generator: Generator) -> list[Split]:
    """The same training parts; ``tests`` in equal shares of a random order."""
    shares = np.array_split(generator.permutation(tests), len(splits))
    return [Split(split.train, share) for split, share in zip(splits, shares, strict=True)]


def _labels(examples: Examples, kind: str) -> Indices:
    """The class of each example; 0 where they have none."""
    if isinstance(examples.y, Tensor) and examples.y.dim() == 1 and examples.y.dtype == torch.int64:
        return examples.y.numpy()
    if kind in PARTITIONS and PARTITIONS[kind].by_class:
        allowed = ", ".join(name for name, each in PARTITIONS.items() if not each.by_class)
        raise PartitionError(
            f"partition.kind = {kind!r}: the examples have no classes; allowed: {allowed}"
        )
    return np.zeros(len(examples.y), np.int64)


def own(
    examples: Examples,
    generator: Generator,
    *,
    test_part: str,
    test_fraction: float,
    validation: float = 0.0,
) -> Split:
    """The split of a real site, which holds nothing but its own examples."""
    if test_part == "pooled":
        raise SourceError(
            "data.test-part = 'pooled': only in a simulation; allowed: 'own', 'official'"
        )
    pool, official = _candidates(examples, test_part, validation)
    if len(pool) < FEWEST:
        raise SourceError(
            f"{len(pool)} examples are too few: one is needed to train on and one to test on"
        )
    split = _split(pool, test_fraction, generator) if official is None else Split(pool, official)
    return _validating(split, validation, generator) if validation else split


def _candidates(
    examples: Examples, test_part: str, validation: float
) -> tuple[Indices, Indices | None]:
    """Examples to split, and the official test part where it is asked for; else it is not used."""
    if isinstance(examples.x, Lazy) and examples.x.in_order:
        for wrong, key, allowed in (
            (test_part != "official", f"test-part = {test_part!r}", "'official'"),
            (validation, f"validation = {validation:g}", "0"),
        ):
            if wrong:
                raise SourceError(
                    f"data.{key}: an IterableDataset cannot be split; allowed: {allowed}"
                )
    if examples.test is None:
        if test_part == "official":
            raise SourceError(
                "data.test-part = 'official': the data have no official test part; allowed: 'own'"
            )
        return np.arange(len(examples.y)), None
    test = examples.test.numpy()
    return np.flatnonzero(~test), np.flatnonzero(test) if test_part == "official" else None


def _split(indices: Indices, test_fraction: float, generator: Generator) -> Split:
    shuffled = generator.permutation(indices)
    num_test = min(max(1, round(test_fraction * len(indices))), len(indices) - 1)
    return Split(shuffled[num_test:], shuffled[:num_test])


def _validating(split: Split, share: float, generator: Generator) -> Split:
    """A share of the training part in the place of the test part, which nobody sees."""
    if len(split.train) < FEWEST:
        raise SourceError(
            f"data.validation = {share:g}: a site has {len(split.train)} training examples, "
            f"it needs {FEWEST}; allowed: 0"
        )
    return _split(split.train, share, generator)


def take(examples: Examples, splits: Sequence[Split]) -> SiteData:
    """The examples of one split, or of several put together; tables are not standardised yet."""
    train, test = (
        torch.from_numpy(np.concatenate(indices)) for indices in zip(*splits, strict=True)
    )
    if isinstance(examples.x, Lazy) and examples.x.in_order:
        train = train.sort().values
    parts = Part(examples.x[train], examples.y[train]), Part(examples.x[test], examples.y[test])
    notes: tuple[str, ...] = ()
    if examples.columns and not isinstance(examples.x, Lazy):
        table = torch.cat([examples.x[train], examples.x[test]])
        notes = (*_missing(table, examples.columns), *_far_off(table, examples.columns))
    return SiteData(*parts, examples.classes, examples.columns, notes)


def _missing(table: Tensor, columns: tuple[str, ...]) -> tuple[str, ...]:
    """What to say about missing values."""
    absent = table.isnan()
    said = [
        f"{name} ({'all' if n == len(absent) else n})"
        for name, n in zip(columns, absent.sum(0).tolist(), strict=True)
        if n
    ]
    filled = "filled with the mean of all sites, and marked in a column of their own"
    return (
        (f"of {len(absent)} rows, missing values in {', '.join(said)}: {filled}",) if said else ()
    )


def _far_off(table: Tensor, columns: tuple[str, ...]) -> tuple[str, ...]:
    """What to say about values that hide all others: one typing error moves all sites' moments.

    Deviations are those of a normal distribution with the same quartiles, which few values do not
    move.
    """
    frame = pd.DataFrame(table.double().numpy())
    low, median, high = torch.tensor(frame.quantile([0.25, 0.5, 0.75]).to_numpy())
    deviation = (high - low) / 1.349
    far = ((table - median).abs() > FAR_OFF * deviation) & (deviation > 0)
    said = [f"{name} ({n})" for name, n in zip(columns, far.sum(0).tolist(), strict=True) if n]
    what = f"values more than {FAR_OFF} deviations off the median in {', '.join(said)}"
    return (
        (f"of {len(table)} rows, {what}: they shrink all others of the column, at all sites",)
        if said
        else ()
    )


class Moments(NamedTuple):
    """Of each column of a table: how many values are known, their mean and their variance."""

    known: tuple[float, ...]
    mean: tuple[float, ...]
    variance: tuple[float, ...]

    def check(self, columns: Sequence[str]) -> Self:
        """These moments, if those of a table could be like them.

        Raises:
            SourceError: not one of each for each of ``columns``, or one is negative, not finite or
                too large.
        """
        for name, values in self._asdict().items():
            if len(values) != len(columns):
                raise SourceError(f"{name} has {len(values)} values for {len(columns)} columns")
        for column, known, mean, variance in zip(columns, *self, strict=True):
            # The mean square is at most the largest square. Written so that NaN is refused.
            if not (
                0 <= known < float("inf") and variance >= 0 and mean * mean + variance <= LARGEST**2
            ):
                said = f"known = {known}, mean = {mean}, variance = {variance}"
                raise SourceError(
                    f"column {shown(column)}: {said} are no moments of values within ±2^63"
                )
        return self

    def split(self, size: int) -> tuple["Moments", "Moments"]:
        """Those of the first columns, and those of the others."""
        return Moments(*(each[:size] for each in self)), Moments(*(each[size:] for each in self))


def moments(table: Values, columns: Sequence[str] = ()) -> Moments:
    """The moments of the known values of ``table`` [n, columns].

    Raises:
        SourceError: those of a column are not finite or too large.
    """
    if isinstance(table, Lazy):
        return merge(
            [moments(table.reader[rows][0]) for rows in table.rows.sort().values.split(2**16)],
            columns,
        )
    known = ~table.isnan()
    values = table.double().nan_to_num()
    count = known.sum(0)
    mean = values.sum(0) / count.clamp(min=1)
    variance = ((values - mean).square() * known).sum(0) / count.clamp(min=1)
    found = Moments(*(tuple(each.double().tolist()) for each in (count, mean, variance)))
    return found.check(columns or _numbered(table.shape[1]))


def merge(sites: Sequence[Moments], columns: Sequence[str] = ()) -> Moments:
    """The moments of all sites' values together, from each site's own (the law of total variance).

    Raises:
        SourceError: those of a site's column are not finite or too large.
    """
    columns = columns or _numbered(len(sites[0].known))
    for site in sites:
        site.check(columns)
    # [sites, columns]
    count, mean, variance = (
        torch.tensor(each, dtype=torch.float64) for each in zip(*sites, strict=True)
    )
    total = count.sum(0)
    share = count / total.clamp(min=1)
    middle = (share * mean).sum(0)
    spread = (share * (variance + (mean - middle).square())).sum(0)
    return Moments(*(tuple(each.tolist()) for each in (total, middle, spread)))


def _numbered(size: int) -> list[str]:
    return [f"number {number}" for number in range(1, size + 1)]


def standardise(data: SiteData, common: Moments) -> SiteData:
    """A table as a network takes it: [n, 2 columns].

    The values with mean 0 and deviation 1 over all sites, then 1 where one was missing, which
    itself becomes 0.

    All sites use the same moments: the same patient looks the same everywhere.

    Raises:
        SourceError: the moments are not those of this table's columns, not finite, or too large.
    """
    common.check(data.columns)
    mean, deviation = _middle(common)

    def ready(part: Part) -> Part:
        if isinstance(part.x, Lazy):
            return part._replace(
                x=replace(
                    part.x,
                    reader=_standardising(part.x.reader, common),
                    example=(2 * len(data.columns),),
                )
            )
        return part._replace(x=_standardised(part.x, mean, deviation))

    return data._replace(train=ready(data.train), test=ready(data.test))


def standardise_numbers(data: SiteData, common: Moments) -> SiteData:
    """Numbers to predict, with mean 0 and deviation 1 over all sites.

    A number that is the same everywhere becomes 0.

    Raises:
        SourceError: the moments are not those of these numbers, not finite, or too large.
    """
    common.check(data.classes)
    if not (isinstance(data.train.y, Tensor) and isinstance(data.test.y, Tensor)):
        raise SourceError("numbers to predict come as a tensor y, not with each item")
    mean, deviation = _middle(common)

    def ready(part: Part) -> Part:
        return Part(part.x, ((part.y - mean) / deviation).float())

    return data._replace(train=ready(data.train), test=ready(data.test))


def deviations(common: Moments) -> tuple[float, ...]:
    """Of each column; 1 where all values are the same."""
    return tuple(_middle(common)[1].tolist())


def _middle(common: Moments) -> tuple[Tensor, Tensor]:
    """The mean and the deviation of each column."""
    mean, variance = torch.tensor(common.mean), torch.tensor(common.variance)
    return mean, torch.where(variance > 0, variance.sqrt(), torch.ones_like(variance))


@lru_cache(maxsize=4)
def _standardising(reader: Reader, common: Moments) -> "Standardised":
    """One for all parts and sites: with each reader other processes are started."""
    return Standardised(reader, *_middle(common))


def _standardised(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    values = ((x - mean) / deviation).nan_to_num()
    return torch.cat([values, x.isnan().float()], 1).float()


class Standardised:
    """Reads rows of a table as a network takes them."""

    def __init__(self, reader: Reader, mean: Tensor, deviation: Tensor) -> None:
        self._reader, self._mean, self._deviation = reader, mean, deviation

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        x, y = self._reader[rows]
        return _standardised(x, self._mean, self._deviation), y


def relabel(data: SiteData, classes: Sequence[str]) -> SiteData:
    """The same examples with ``y`` counting ``classes``, the list that all sites agreed on.

    Raises:
        SourceError: a class of this site is not in the list; or they are names of labels or
            numbers, and other ones.
    """
    if tuple(classes) == data.classes:
        return data
    if isinstance(data.train.y, Tensor) and data.train.y.dtype != torch.int64:
        raise SourceError(
            f"this site has {listed(data.classes)} to predict, the run {listed(classes)}"
        )
    place = {name: index for index, name in enumerate(classes)}
    if lost := [name for name in data.classes if name not in place]:
        raise SourceError(
            f"classes {listed(lost)} of this site are not among the run's: {listed(classes)}"
        )
    index = torch.tensor([place[name] for name in data.classes])
    if not (isinstance(data.train.y, Tensor) and isinstance(data.test.y, Tensor)):
        raise SourceError(
            "classes differ from site to site: give y as a tensor, not with each item"
        )

    def counted(part: Part) -> Part:
        # Below 0: pixels that do not count.
        return Part(part.x, torch.where(part.y >= 0, index[part.y.clamp(min=0)], part.y))

    return data._replace(train=counted(data.train), test=counted(data.test), classes=tuple(classes))
