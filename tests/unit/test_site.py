"""One site's examples."""

from typing import Any

import numpy as np
import pytest
import torch

from datasets.site import (
    Moments,
    SiteData,
    Split,
    deal,
    merge,
    moments,
    own,
    relabel,
    standardise,
    take,
)
from datasets.sources import Examples, SourceError

ARGUMENTS: dict[str, Any] = {
    "kind": "iid",
    "alpha": 1.0,
    "classes_per_site": 2,
    "size_ratio": 2.0,
    "iid_fraction": 0.0,
    "test_fraction": 0.25,
}


def examples(test: bool) -> Examples:
    official = torch.arange(100) >= 80 if test else None
    return Examples(
        torch.arange(100.0)[:, None], torch.arange(100) % 5, tuple("abcde"), test=official
    )


def test_training_and_test_parts_never_overlap() -> None:
    splits = deal(examples(False), 4, np.random.default_rng(1), test_part="own", **ARGUMENTS)
    everything = np.concatenate([np.concatenate(split) for split in splits])
    assert np.array_equal(np.sort(everything), np.arange(100))
    assert {len(split.test) for split in splits} == {6}


def test_official_test_part_is_dealt_out_and_never_trained_on() -> None:
    splits = deal(examples(True), 4, np.random.default_rng(1), test_part="official", **ARGUMENTS)
    assert np.array_equal(
        np.sort(np.concatenate([split.test for split in splits])), np.arange(80, 100)
    )
    assert np.array_equal(np.sort(np.concatenate([split.train for split in splits])), np.arange(80))


def test_own_part_leaves_the_official_test_part_unused() -> None:
    splits = deal(examples(True), 4, np.random.default_rng(1), test_part="own", **ARGUMENTS)
    assert np.concatenate([np.concatenate(split) for split in splits]).max() == 79


def test_smallest_site_trains_on_one_example_and_tests_on_one() -> None:
    data = Examples(torch.zeros(2, 1), torch.tensor([0, 1]), ("a", "b"))
    split = own(data, np.random.default_rng(1), test_part="own", test_fraction=0.01)
    assert (len(split.train), len(split.test)) == (1, 1)


@pytest.mark.parametrize("test_part", ["own", "pooled", "official"])
def test_validation_takes_the_place_of_the_test_part_and_comes_from_the_training_part(
    test_part: str,
) -> None:
    data, keys = examples(test_part == "official"), ARGUMENTS | {"test_part": test_part}
    plain, chosen = (
        deal(data, 4, np.random.default_rng(1), **keys, validation=share) for share in (0.0, 0.2)
    )
    trained = np.concatenate([split.train for split in chosen])
    validated = np.concatenate([split.test for split in chosen])
    before = np.concatenate([split.train for split in plain])
    assert np.array_equal(np.sort(np.concatenate([trained, validated])), np.sort(before))
    assert len(validated) == sum(round(0.2 * len(split.train)) for split in plain)
    strange = [set(split.test) - set(part.train) for split, part in zip(chosen, plain, strict=True)]
    assert any(strange) == (test_part != "own")  # dealt out as test parts are


def test_real_site_validates_on_its_training_part() -> None:
    plain, chosen = (
        own(examples(False), np.random.default_rng(1), test_part="own", test_fraction=0.2, **more)
        for more in ({}, {"validation": 0.25})
    )
    assert len(chosen.test) == 20
    assert set(plain.train) == {*chosen.train, *chosen.test}
    data = Examples(torch.zeros(2, 1), torch.tensor([0, 1]), ("a", "b"))
    with pytest.raises(SourceError, match=r"data.validation = 0.5: a site has 1 training examples"):
        own(data, np.random.default_rng(1), test_part="own", test_fraction=0.5, validation=0.5)


def table(values: list[list[float]], columns: tuple[str, ...]) -> SiteData:
    rows = Examples(
        torch.tensor(values), torch.zeros(len(values), dtype=torch.int64), ("a",), columns=columns
    )
    return take(rows, [Split(np.arange(len(values) - 1), np.array([len(values) - 1]))])


NAN = float("nan")


def test_moments_of_all_sites_are_those_of_the_table_put_together() -> None:
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(60, 3, generator=generator) * torch.tensor(
        [1.0, 10.0, 100.0]
    ) + torch.tensor([0.0, 5.0, -1e4])
    whole[torch.rand(60, 3, generator=generator) < 0.3] = NAN
    whole[:10, 1] = NAN  # a site that knows nothing of a column
    merged = merge([moments(whole[:10]), moments(whole[10:25]), moments(whole[25:])])
    columns = whole.double().numpy()
    torch.testing.assert_close(merged.mean, tuple(np.nanmean(columns, 0)))
    torch.testing.assert_close(merged.variance, tuple(np.nanvar(columns, 0)))
    assert merged.known == tuple((~np.isnan(columns)).sum(0))


def test_table_is_standardised_and_missing_values_are_marked() -> None:
    data = table([[1.0, 7.0], [NAN, 7.0], [5.0, 7.0], [3.0, NAN]], ("age", "const"))
    ready = standardise(data, moments(data.train.x))
    # The mean of 1 and 5 is 3, their deviation 2; a column without spread is only centred.
    assert ready.train.x.tolist() == [
        [-1.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 1.0, 0.0],
        [1.0, 0.0, 0.0, 0.0],
    ]
    assert ready.test.x.tolist() == [[0.0, 0.0, 0.0, 1.0]]


def test_column_that_nobody_knows_becomes_zero() -> None:
    data = table([[NAN], [NAN]], ("ca",))
    assert standardise(data, merge([moments(data.train.x)])).train.x.tolist() == [[0.0, 1.0]]


def test_missing_values_are_said() -> None:
    data = table([[1.0, NAN], [NAN, NAN], [5.0, NAN]], ("age", "ca"))
    assert "of 3 rows, missing values in age (1), ca (all)" in data.notes[0]
    assert table([[1.0], [2.0]], ("age",)).notes == ()


def test_relabel_counts_in_the_list_of_all_sites() -> None:
    data = take(
        Examples(torch.zeros(4, 1), torch.tensor([0, 1, 1, 0]), ("cat", "dog")),
        [Split(np.arange(3), np.array([3]))],
    )
    assert relabel(data, ["bird", "cat", "dog"]).train.y.tolist() == [1, 2, 2]
    assert relabel(data, ["bird", "cat", "dog"]).test.y.tolist() == [1]
    assert relabel(data, ["cat", "dog"]) is data
    with pytest.raises(ValueError, match="classes dog of this site are not among the run's: cat"):
        relabel(data, ["cat"])


def test_pooled_test_parts_are_dealt_out_evenly_and_nothing_is_trained_on() -> None:
    data = examples(test=False)
    arguments = ARGUMENTS | {"kind": "classes", "classes_per_site": 1}
    own_parts, pooled = (
        deal(data, 5, np.random.default_rng(1), **arguments, test_part=part)
        for part in ("own", "pooled")
    )
    for before, after in zip(own_parts, pooled, strict=True):
        assert np.array_equal(before.train, after.train)
    tests = [np.concatenate([split.test for split in splits]) for splits in (own_parts, pooled)]
    assert np.array_equal(np.sort(tests[0]), np.sort(tests[1]))
    assert abs(len(pooled[0].test) - len(pooled[1].test)) <= 1
    assert not np.array_equal(tests[0], tests[1])


def test_a_real_site_cannot_pool_its_test_part() -> None:
    with pytest.raises(ValueError, match="test-part = 'pooled': only in a simulation"):
        own(examples(test=False), np.random.default_rng(1), test_part="pooled", test_fraction=0.2)


def cells(generator: torch.Generator, rows: int = 200) -> torch.Tensor:
    return torch.randn(rows, 3, generator=generator) * torch.tensor(
        [1.0, 10.0, 0.1]
    ) + torch.tensor([50.0, 0.0, -3.0])


@pytest.mark.parametrize("value", [99_999.0, -99_999.0, 1e18])
def test_value_far_off_all_others_is_said_but_not_told(value: float) -> None:
    whole = cells(torch.Generator().manual_seed(1))
    whole[7, 1] = value
    [note] = table(whole.tolist(), ("age", "bp", "dose")).notes
    assert "of 200 rows, values more than 50 deviations off the median in bp (1)" in note
    assert "99" not in note
    whole[1:4, 0] = value  # more than one, and beside missing values
    whole[60:90, 0] = NAN
    missing, far = table(whole.tolist(), ("age", "bp", "dose")).notes
    assert "age (30)" in missing
    assert "age (3), bp (1)" in far


def test_nothing_is_said_of_ordinary_columns() -> None:
    generator = torch.Generator().manual_seed(1)
    whole = cells(generator, 2000)
    whole[:, 1] = whole[:, 0].gt(53)  # a rare flag
    whole[:, 2] = torch.randn(2000, generator=generator).exp()  # a long tail
    whole[5, 0] = 50 + 60  # of deviation 1: 60 off, and seen
    [note] = table(whole.tolist(), ("age", "flag", "dose")).notes
    assert "in age (1):" in note
    whole[5, 0] = 50 + 40
    assert table(whole.tolist(), ("age", "flag", "dose")).notes == ()
    assert table([[NAN, 1.0], [NAN, 1.0]], ("none", "constant")).notes[1:] == ()


@pytest.mark.parametrize(
    ("known", "mean", "variance"),
    [
        (3.0, NAN, 1.0),
        (3.0, float("inf"), 1.0),
        (3.0, 1e300, 1.0),
        (3.0, 1e20, 1.0),
        (3.0, 0.0, NAN),
        (3.0, 0.0, float("inf")),
        (3.0, 0.0, 1e40),
        (3.0, 0.0, -1.0),
        (-1.0, 0.0, 1.0),
        (NAN, 0.0, 1.0),
        (float("inf"), 0.0, 1.0),
    ],
)
def test_moments_that_no_table_has_are_refused_by_the_column(
    known: float, mean: float, variance: float
) -> None:
    good = Moments((3.0, 3.0), (0.0, 1.0), (1.0, 0.0))
    bad = Moments((3.0, known), (0.0, mean), (1.0, variance))
    with pytest.raises(SourceError, match="column 'bp'"):
        merge([good, bad], ("age", "bp"))
    with pytest.raises(SourceError, match="column 'number 2'"):
        merge([good, bad])
    with pytest.raises(SourceError, match="column 'bp'"):
        standardise(table([[1.0, 2.0], [3.0, 4.0]], ("age", "bp")), bad)


def test_moments_of_values_that_are_not_finite_are_refused_by_the_column() -> None:
    with pytest.raises(SourceError, match="column 'bp'"):
        moments(torch.tensor([[1.0, 2.0], [3.0, float("inf")]]), ("age", "bp"))
    with pytest.raises(SourceError, match="mean has 1 values for 2 columns"):
        Moments((3.0, 3.0), (0.0,), (1.0, 1.0)).check(("age", "bp"))


def test_largest_values_of_a_table_keep_their_moments() -> None:
    largest = torch.tensor([[2.0**63, 1.0], [-(2.0**63), 2.0]])
    common = merge([moments(largest), moments(largest)])
    assert common.variance[0] == 2.0**126
    data = table(largest.tolist(), ("id", "age"))
    assert standardise(data, common).train.x[0, 0] == 1.0
