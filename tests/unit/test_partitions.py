"""Partitions of a simulation's data."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.partitions import PARTITIONS, Indices, PartitionError, _dirichlet_group, partition

KINDS = ["iid", "dirichlet", "dirichlet-equal", "classes", "sizes"]
LABELS = np.repeat(np.arange(10), 60)


def partitioned(
    kind: str, num_sites: int, seed: int = 1, labels: Any = LABELS, **changes: Any
) -> list[Any]:
    arguments = {
        "alpha": 0.5,
        "classes_per_site": 4,
        "size_ratio": 10.0,
        "iid_fraction": 0.0,
    } | changes
    groups, names = arguments.pop("groups", None), arguments.pop("names", ())
    return partition(
        kind, labels, groups, names, num_sites, np.random.default_rng(seed), **arguments
    )


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.integers(3, 24),
    st.integers(0, 1000),
    st.sampled_from([0.1, 1.0, 100.0]),
)
def test_each_example_goes_to_exactly_one_site(
    kind: str, num_sites: int, seed: int, alpha: float
) -> None:
    parts = partitioned(kind, num_sites, seed, alpha=alpha)
    assert len(parts) == num_sites
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(LABELS)))
    assert min(map(len, parts)) >= 2


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_split(kind: str) -> None:
    one, two, other = partitioned(kind, 5, 1), partitioned(kind, 5, 1), partitioned(kind, 5, 2)
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", ["dirichlet", "dirichlet-equal"])
def test_large_alpha_is_equal_shares_of_every_class(kind: str) -> None:
    for part in partitioned(kind, 5, alpha=1e6):
        assert np.abs(np.bincount(LABELS[part], minlength=10) - 12).max() <= 2


@pytest.mark.parametrize("kind", ["dirichlet", "dirichlet-equal"])
def test_small_alpha_is_more_skewed(kind: str) -> None:
    def largest_share(alpha: float) -> float:
        shares = [
            np.bincount(LABELS[part], minlength=10).max() / len(part)
            for part in partitioned(kind, 8, alpha=alpha)
        ]
        return float(np.mean(shares))

    assert largest_share(0.1) > 2 * largest_share(100.0)


def test_dirichlet_shares_have_the_variance_of_the_distribution() -> None:
    """A share over n sites has variance (n - 1) / (n^2 (n a + 1)); within five standard errors."""
    labels, alpha, n = np.zeros(100_000, dtype=np.int64), 2.0, 4
    shares = np.array(
        [
            [len(part) / 100_000 for part in partitioned("dirichlet", n, seed, labels, alpha=alpha)]
            for seed in range(400)
        ]
    )
    squares = ((shares - 1 / n) ** 2).mean(1)
    error = squares.std() / np.sqrt(len(squares))
    assert abs(squares.mean() - (n - 1) / (n**2 * (n * alpha + 1))) < 5 * error


def test_site_that_has_its_share_gets_no_further_class() -> None:
    for seed in range(20):
        lists = _dirichlet_group(np.arange(600), LABELS, 6, np.random.default_rng(seed), 0.3)
        for part in lists:
            labels = LABELS[part]
            assert (
                labels < labels[-1]
            ).sum() < 100  # what it had before its last class was less than its share


def test_smallest_site_of_a_group_has_half_the_average_before_the_slices() -> None:
    for seed in range(20):
        lists = _dirichlet_group(np.arange(600), LABELS, 6, np.random.default_rng(seed), 0.3)
        assert min(map(len, lists)) >= 50


@pytest.mark.parametrize(
    ("num_sites", "groups"), [(10, [10]), (16, [10, 6]), (20, [10, 10]), (21, [10, 10, 1])]
)
def test_groups_have_at_most_ten_sites_and_examples_in_proportion(
    num_sites: int, groups: list[int]
) -> None:
    generator = np.random.default_rng(1)
    order, line, start = generator.permutation(len(LABELS)), [], 0
    for stop, size in zip(np.cumsum(groups), groups, strict=True):
        members = order[round(start / num_sites * 600) : round(stop / num_sites * 600)]
        line += _dirichlet_group(members, LABELS[members], size, generator, 0.1)
        start = stop
    expected = np.array_split(np.concatenate(line), num_sites)
    found = partitioned("dirichlet-equal", num_sites, alpha=0.1)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_which_site_has_which_class_is_chance() -> None:
    first = {
        tuple(np.unique(LABELS[partitioned("classes", 10, seed, classes_per_site=1)[0]]))
        for seed in range(20)
    }
    assert len(first) > 4


@pytest.mark.parametrize("num_sites", [5, 16])
def test_equal_slices_differ_by_at_most_one_example(num_sites: int) -> None:
    sizes = [len(part) for part in partitioned("dirichlet-equal", num_sites, alpha=0.01)]
    assert max(sizes) - min(sizes) <= 1


def test_iid_sizes_differ_by_at_most_one() -> None:
    sizes = [len(part) for part in partitioned("iid", 7)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("per_site", [1, 2, 5, 10])
def test_classes_per_site(per_site: int) -> None:
    for part in partitioned("classes", 10, classes_per_site=per_site):
        assert len(np.unique(LABELS[part])) == per_site


def test_sizes_are_in_geometric_progression() -> None:
    sizes = [len(part) for part in partitioned("sizes", 5, size_ratio=16.0)]
    assert np.allclose(sizes, 600 * np.array([1, 2, 4, 8, 16]) / 31, atol=1)


def test_natural_sites_are_the_groups() -> None:
    groups = np.arange(600) % 3
    parts = partitioned("natural", 3, groups=groups, names=("a", "b", "c"))
    assert all(set(groups[part]) == {site} for site, part in enumerate(parts))


@pytest.mark.parametrize(
    ("kind", "num_sites", "changes", "message"),
    [
        ("natural", 3, {}, "no natural sites"),
        (
            "natural",
            3,
            {"groups": LABELS, "names": tuple("abcdefghij")},
            r"num-sites = 3: .* needs 10 sites: a, b, c",
        ),
        (
            "classes",
            3,
            {"classes_per_site": 2},
            r"partition\.classes-per-site = 2: 3 sites would leave out .* allowed: 4 to 10",
        ),
        (
            "classes",
            3,
            {"classes_per_site": 11},
            r"partition\.classes-per-site = 11: there are 10 classes",
        ),
        ("dirichlet", 100, {"alpha": 1e-4}, r"partition\.alpha = 0.0001: a site stayed empty"),
        (
            "zipf",
            3,
            {},
            r"partition\.kind = 'zipf': allowed: iid, .*, natural, package.module:function",
        ),
        ("iid", 400, {}, "num-sites = 400: 600 examples are too few"),
        ("sizes", 100, {"size_ratio": 1000.0}, r"partition\.kind = 'sizes': a site got 0 examples"),
    ],
)
def test_what_cannot_be_partitioned_is_an_error_that_names_the_key(
    kind: str, num_sites: int, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PartitionError, match=message):
        partitioned(kind, num_sites, **changes)


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.0, 60), (0.1, 54.6), (0.5, 33), (0.9, 11.4), (1.0, 6)]
)
def test_a_fraction_is_partitioned_by_chance(fraction: float, expected: int) -> None:
    """Of its own 60 examples a site of ten keeps 60 (1 - f), and gets 6 f of them with the rest."""
    parts = partitioned("classes", 10, classes_per_site=1, iid_fraction=fraction)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(LABELS)))
    own = [np.bincount(LABELS[part]).max() for part in parts]
    assert abs(np.mean(own) - expected) <= (0 if not fraction else 6)


def mine(labels: Indices, num_sites: int, generator: np.random.Generator) -> Any:
    return [np.arange(site, len(labels), num_sites, dtype=np.uint64) for site in range(num_sites)]


def changed(change: Any) -> Any:
    """A partition that returns what ``change`` makes of ``mine``."""
    return lambda labels, num_sites, generator: change(mine(labels, num_sites, generator))


no_list = changed(len)
too_few = changed(lambda parts: parts[:-1])
no_arrays = changed(lambda parts: [list(part) for part in parts])
two_dimensions = changed(lambda parts: [part[None] for part in parts])
no_whole_numbers = changed(lambda parts: [part.astype(float) for part in parts])
masks = changed(lambda parts: [part > 3 for part in parts])
too_large = changed(lambda parts: [part + np.uint64(1) for part in parts])
negative = changed(lambda parts: [part.astype(np.int64) - 1 for part in parts])
left_out = changed(lambda parts: [part[1:] for part in parts])
twice = changed(lambda parts: [np.concatenate([part, part[:1]]) for part in parts])
unequal = changed(
    lambda parts: [np.concatenate([parts[0], parts[1][1:]]), parts[1][:1], *parts[2:]]
)


def test_partition_of_ones_own() -> None:
    parts = partitioned("tests.unit.test_partitions:mine", 4)
    assert all(np.array_equal(part, np.arange(site, 600, 4)) for site, part in enumerate(parts))
    assert {part.dtype for part in parts} == {np.dtype(np.int64)}
    mixed = partitioned("tests.unit.test_partitions:mine", 4, iid_fraction=0.5)
    assert np.array_equal(np.sort(np.concatenate(mixed)), np.arange(600))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_list", "must return a list of 3 arrays, one a site; got int"),
        ("too_few", "must return a list of 3 arrays, one a site; got 2 of them"),
        ("no_arrays", "site 0 must get a flat array of whole numbers; got list"),
        ("two_dimensions", r"site 0 must get a flat array of whole numbers; got uint64 \(1, 200\)"),
        ("no_whole_numbers", "got float64"),
        ("masks", "got bool"),
        ("too_large", "indices must lie between 0 and 599; got 1 to 600"),
        ("negative", "indices must lie between 0 and 599; got -1 to 598"),
        ("left_out", "exactly one site; of 600 go 3 to none and 0 to several"),
        ("twice", "exactly one site; of 600 go 0 to none and 3 to several"),
        ("unequal", "a site got 1 examples, it needs 2"),
        ("nowhere", "has no attribute 'nowhere'"),
        ("LABELS", "is no function but ndarray"),
    ],
)
def test_partition_of_ones_own_is_checked(name: str, message: str) -> None:
    kind = f"tests.unit.test_partitions:{name}"
    with pytest.raises(PartitionError, match=rf"partition\.kind = '{kind}'.*{message}"):
        partitioned(kind, 3)


def test_example_of_ones_own_gives_sizes_by_a_power_law() -> None:
    parts = partitioned("examples.my_partition:power_law", 8)
    shares = 1 / np.arange(1, 9)
    assert np.allclose([len(part) - 2 for part in parts], 584 * shares / shares.sum(), atol=1)
    assert partitioned("examples.my_partition:power_law", 300, labels=LABELS)  # two for everybody
    assert not np.array_equal(
        parts[0], partitioned("examples.my_partition:power_law", 8, seed=2)[0]
    )


def test_partitions_say_which_keys_they_take() -> None:
    assert {name: found.keys for name, found in PARTITIONS.items()} == {
        "iid": (),
        "dirichlet": ("alpha",),
        "dirichlet-equal": ("alpha",),
        "classes": ("classes_per_site",),
        "sizes": ("size_ratio",),
        "natural": (),
    }


def test_only_the_keys_of_the_partition_are_needed() -> None:
    parts = partition(
        "sizes", LABELS, None, (), 2, np.random.default_rng(1), size_ratio=2.0, iid_fraction=0.0
    )
    assert [len(part) for part in parts] == [200, 400]
