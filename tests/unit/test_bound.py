"""How far one contribution may move the model."""

from server_app.bound import Bound, Change


def bound_of(*changes: Change) -> Bound:
    bound = Bound(10.0)
    for site, change in enumerate(changes):
        bound.accept(site, change)
    return bound


def test_bound_is_ten_times_the_median_over_sites() -> None:
    bound = bound_of(Change(1, 1), Change(2, 1), Change(9, 1))
    assert bound.violation(Change(20, 1), 0.0) is None
    assert (bound.violation(Change(20.1, 1), 0.0) or "").startswith(
        "it moves the model by 20.1; at most 10 times the median over the sites, 20 (max-change)"
    )


def test_site_counts_once_and_with_its_largest_change() -> None:
    bound = bound_of(Change(1, 1), Change(2, 1), Change(3, 1))
    for site in (1, 2):
        bound.accept(site, Change(1e-9, 1))  # they have learned their parts
    assert bound.violation(Change(20, 0.1), 0.0) is None
    assert bound.violation(Change(40, 2), 0.0) is None
    assert bound.violation(Change(21, 1), 0.0)


def test_bound_itself_is_allowed() -> None:
    bound = bound_of(Change(2, 1), Change(2, 1), Change(2, 1))
    assert bound.violation(Change(20, 0.5), 0.0) is None  # 20 is not more than 20
    assert bound.violation(Change(30, 1.5), 0.0) is None  # 20 a rate is not more than 20


def test_site_that_takes_more_steps_may_move_further() -> None:
    bound = bound_of(Change(1, 0.1), Change(1, 0.1), Change(1, 0.1))
    assert bound.violation(Change(50, 5), 0.0) is None
    assert bound.violation(Change(50, 0.4), 0.0)


def test_site_with_few_steps_may_move_as_far_as_others_with_many() -> None:
    bound = bound_of(Change(1, 10), Change(1, 10), Change(1, 10))
    assert bound.violation(Change(9, 0.01), 0.0) is None
    assert bound.violation(Change(11, 0.01), 0.0)


def test_model_itself_is_the_measure_until_three_sites_have_answered() -> None:
    bound = bound_of(Change(1e-3, 1), Change(1e-3, 1))
    assert bound.few
    assert bound.violation(Change(49, 1), 5.0) is None
    assert (bound.violation(Change(51, 1), 5.0) or "").startswith(
        "it moves the model by 51; at most 10 times the model's norm, 50 (max-change)"
    )
    assert bound.violation(Change(1e9, 1), 0.0) is None  # a model of zeros is no measure
    bound.accept(2, Change(1e-3, 1))
    assert not bound.few
    assert bound.violation(Change(49, 1), 5.0)


def test_sites_that_never_moved_are_no_measure() -> None:
    bound = bound_of(Change(0, 1), Change(0, 1), Change(0, 1))
    assert bound.violation(Change(49, 1), 5.0) is None
    assert bound.violation(Change(51, 1), 5.0)


def test_first_contributions_are_measured_by_each_other() -> None:
    others = {0: Change(1.0, 1.0), 1: Change(2.0, 1.0), 2: Change(500.0, 1.0)}
    assert [Bound(10.0).violation(change, 1e9, others) is None for change in others.values()] == [
        True,
        True,
        False,
    ]
