"""Who gets what."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.partitions import PartitionError, _dirichlet_group, partition

KINDS = ["iid", "dirichlet", "dirichlet-equal", "classes", "sizes"]
LABELS = np.repeat(np.arange(10), 60)


def deal(kind: str, num_sites: int, seed: int = 1, labels: Any = LABELS, **changes: Any) -> list[Any]:
    arguments = {"alpha": 0.5, "classes_per_site": 4, "size_ratio": 10.0, "iid_fraction": 0.0} | changes
    groups = changes.pop("groups", None)
    names = changes.pop("names", ())
    arguments = {key: value for key, value in arguments.items() if key not in ("groups", "names")}
    return partition(kind, labels, groups, names, num_sites, np.random.default_rng(seed), **arguments)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.integers(3, 24), st.integers(0, 1000), st.sampled_from([0.1, 1.0, 100.0]))
def test_each_example_goes_to_exactly_one_site(kind: str, num_sites: int, seed: int, alpha: float) -> None:
    parts = deal(kind, num_sites, seed, alpha=alpha)
    assert len(parts) == num_sites
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(LABELS)))
    assert min(map(len, parts)) >= 2


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_split(kind: str) -> None:
    one, two, other = deal(kind, 5, 1), deal(kind, 5, 1), deal(kind, 5, 2)
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", ["dirichlet", "dirichlet-equal"])
def test_large_alpha_is_equal_shares_of_every_class(kind: str) -> None:
    for part in deal(kind, 5, alpha=1e6):
        assert np.abs(np.bincount(LABELS[part], minlength=10) - 12).max() <= 2


@pytest.mark.parametrize("kind", ["dirichlet", "dirichlet-equal"])
def test_small_alpha_is_more_skewed(kind: str) -> None:
    def largest_share(alpha: float) -> float:
        shares = [np.bincount(LABELS[part], minlength=10).max() / len(part) for part in deal(kind, 8, alpha=alpha)]
        return float(np.mean(shares))

    assert largest_share(0.1) > 2 * largest_share(100.0)


def test_dirichlet_shares_have_the_variance_of_the_distribution() -> None:
    """A share of Dirichlet(a, ..., a) over n sites has variance (n - 1) / (n^2 (n a + 1)); within five standard errors."""
    labels, alpha, n = np.zeros(100_000, dtype=np.int64), 2.0, 4
    shares = np.array([[len(part) / 100_000 for part in deal("dirichlet", n, seed, labels, alpha=alpha)] for seed in range(400)])
    squares = ((shares - 1 / n) ** 2).mean(1)
    error = squares.std() / np.sqrt(len(squares))
    assert abs(squares.mean() - (n - 1) / (n**2 * (n * alpha + 1))) < 5 * error


def test_site_that_has_its_share_gets_no_further_class() -> None:
    for seed in range(20):
        lists = _dirichlet_group(np.arange(600), LABELS, 6, 0.3, np.random.default_rng(seed))
        for part in lists:
            labels = LABELS[part]
            assert (labels < labels[-1]).sum() < 100  # what it had before its last class was less than its share


@pytest.mark.parametrize("num_sites", [5, 16])
def test_equal_slices_differ_by_at_most_one_example(num_sites: int) -> None:
    sizes = [len(part) for part in deal("dirichlet-equal", num_sites, alpha=0.01)]
    assert max(sizes) - min(sizes) <= 1


def test_iid_sizes_differ_by_at_most_one() -> None:
    sizes = [len(part) for part in deal("iid", 7)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("per_site", [1, 2, 5, 10])
def test_classes_per_site(per_site: int) -> None:
    for part in deal("classes", 10, classes_per_site=per_site):
        assert len(np.unique(LABELS[part])) == per_site


def test_sizes_are_in_geometric_progression() -> None:
    sizes = [len(part) for part in deal("sizes", 5, size_ratio=16.0)]
    assert np.allclose(sizes, 600 * np.array([1, 2, 4, 8, 16]) / 31, atol=1)


def test_natural_sites_are_the_groups() -> None:
    groups = np.arange(600) % 3
    parts = deal("natural", 3, groups=groups, names=("a", "b", "c"))
    assert all(set(groups[part]) == {site} for site, part in enumerate(parts))


@pytest.mark.parametrize(
    ("kind", "num_sites", "changes", "message"),
    [
        ("natural", 3, {}, "no natural sites"),
        ("natural", 3, {"groups": LABELS, "names": tuple("abcdefghij")}, r"num-sites = 3: .* needs 10 sites, .* a, b, c"),
        ("classes", 3, {"classes_per_site": 2}, "classes-per-site = 2: 3 sites would leave out .* at least 4"),
        ("classes", 3, {"classes_per_site": 11}, "classes-per-site = 11: there are 10 classes"),
        ("dirichlet", 100, {"alpha": 1e-4}, "dirichlet-alpha = 0.0001: a site stayed empty"),
        ("iid", 400, {}, "num-sites = 400: 600 examples are too few"),
        ("sizes", 100, {"size_ratio": 1000.0}, "partition = 'sizes': a site got 0 examples"),
    ],
)
def test_what_cannot_be_dealt_is_an_error_that_names_the_key(
    kind: str, num_sites: int, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PartitionError, match=message):
        deal(kind, num_sites, **changes)


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 60), (0.5, 33), (1.0, 6)])
def test_a_fraction_is_dealt_out_by_chance(fraction: float, expected: int) -> None:
    """Of ten sites with one class each, 60 examples: a site keeps 60 (1 - f) of its class and gets 6 f of it with the rest."""
    parts = deal("classes", 10, classes_per_site=1, iid_fraction=fraction)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(LABELS)))
    own = [np.bincount(LABELS[part]).max() for part in parts]
    assert abs(np.mean(own) - expected) <= (0 if not fraction else 6)
