"""One site's examples."""

from typing import Any

import numpy as np
import pytest
import torch

from datasets.site import SiteData, Split, deal, merge, moments, own, relabel, standardise, take
from datasets.sources import Examples

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
    return Examples(torch.arange(100.0)[:, None], torch.arange(100) % 5, tuple("abcde"), test=official)


def test_training_and_test_parts_never_overlap() -> None:
    splits = deal(examples(False), 4, np.random.default_rng(1), test_part="own", **ARGUMENTS)
    everything = np.concatenate([np.concatenate(split) for split in splits])
    assert np.array_equal(np.sort(everything), np.arange(100))
    assert {len(split.test) for split in splits} == {6}


def test_official_test_part_is_dealt_out_and_never_trained_on() -> None:
    splits = deal(examples(True), 4, np.random.default_rng(1), test_part="official", **ARGUMENTS)
    assert np.array_equal(np.sort(np.concatenate([split.test for split in splits])), np.arange(80, 100))
    assert np.array_equal(np.sort(np.concatenate([split.train for split in splits])), np.arange(80))


def test_own_part_leaves_the_official_test_part_unused() -> None:
    splits = deal(examples(True), 4, np.random.default_rng(1), test_part="own", **ARGUMENTS)
    assert np.concatenate([np.concatenate(split) for split in splits]).max() == 79


def test_smallest_site_trains_on_one_example_and_tests_on_one() -> None:
    data = Examples(torch.zeros(2, 1), torch.tensor([0, 1]), ("a", "b"))
    split = own(data, np.random.default_rng(1), test_part="own", test_fraction=0.01)
    assert (len(split.train), len(split.test)) == (1, 1)


def table(values: list[list[float]], columns: tuple[str, ...]) -> SiteData:
    rows = Examples(torch.tensor(values), torch.zeros(len(values), dtype=torch.int64), ("a",), columns=columns)
    return take(rows, [Split(np.arange(len(values) - 1), np.array([len(values) - 1]))])


NAN = float("nan")


def test_moments_of_all_sites_are_those_of_the_table_put_together() -> None:
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(60, 3, generator=generator) * torch.tensor([1.0, 10.0, 100.0]) + torch.tensor([0.0, 5.0, -1e4])
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
    assert ready.train.x.tolist() == [[-1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    assert ready.test.x.tolist() == [[0.0, 0.0, 0.0, 1.0]]


def test_column_that_nobody_knows_becomes_zero() -> None:
    data = table([[NAN], [NAN]], ("ca",))
    assert standardise(data, merge([moments(data.train.x)])).train.x.tolist() == [[0.0, 1.0]]


def test_missing_values_are_said() -> None:
    data = table([[1.0, NAN], [NAN, NAN], [5.0, NAN]], ("age", "ca"))
    assert "of 3 rows, missing values in age (1), ca (all)" in data.notes[0]
    assert table([[1.0], [2.0]], ("age",)).notes == ()


def test_relabel_counts_in_the_list_of_all_sites() -> None:
    data = take(Examples(torch.zeros(4, 1), torch.tensor([0, 1, 1, 0]), ("cat", "dog")), [Split(np.arange(3), np.array([3]))])
    assert relabel(data, ["bird", "cat", "dog"]).train.y.tolist() == [1, 2, 2]
    assert relabel(data, ["bird", "cat", "dog"]).test.y.tolist() == [1]
    assert relabel(data, ["cat", "dog"]) is data
    with pytest.raises(ValueError, match="classes dog of this site are not among the run's: cat"):
        relabel(data, ["cat"])


def test_pooled_test_parts_are_dealt_out_evenly_and_nothing_is_trained_on() -> None:
    data = examples(test=False)
    arguments = ARGUMENTS | {"kind": "classes", "classes_per_site": 1}
    own_parts, pooled = (deal(data, 5, np.random.default_rng(1), **arguments, test_part=part) for part in ("own", "pooled"))
    for before, after in zip(own_parts, pooled, strict=True):
        assert np.array_equal(before.train, after.train)
    tests = [np.concatenate([split.test for split in splits]) for splits in (own_parts, pooled)]
    assert np.array_equal(np.sort(tests[0]), np.sort(tests[1]))
    assert abs(len(pooled[0].test) - len(pooled[1].test)) <= 1
    assert not np.array_equal(tests[0], tests[1])


def test_a_real_site_cannot_pool_its_test_part() -> None:
    with pytest.raises(ValueError, match="test-part = 'pooled': sites do not share"):
        own(examples(test=False), np.random.default_rng(1), test_part="pooled", test_fraction=0.2)
