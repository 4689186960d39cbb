"""Who takes part: what happened to sites, told with the time, and what follows from it."""

import math

import pytest

from server_app.roster import LONGEST_PAUSE, Roster


def roster(least: int = 2, sites: int = 4) -> Roster:
    return Roster({site: f"site {site}" for site in range(sites)}, least, 60.0)


def test_site_is_away_from_its_silence_to_its_next_answer() -> None:
    known = roster()
    known.lose(1, "no answer", 5.0)
    assert known.here() == [0, 2, 3]
    assert (known.away(1), known.silent(1)) == (True, True)
    assert known.answer(1)
    assert known.here() == [0, 1, 2, 3]
    assert not known.answer(1)  # it was here already


def test_site_that_fails_is_away_and_not_silent() -> None:
    known = roster()
    known.lose(1, "out of memory", 5.0, failed=True)
    assert (known.away(1), known.silent(1)) == (True, False)


def test_who_is_called_again_depends_on_the_count_and_the_grid() -> None:
    known = roster()
    known.lose(0, "no answer", 0.0, call_from=3)
    known.lose(1, "no answer", 0.0, call_from=5)
    assert [known.due(count) for count in (2, 3, 5)] == [[], [0], [0, 1]]
    assert known.update_connected({1, 2, 3}, 1.0) == []
    assert known.due(5) == [1]
    assert known.update_connected({0, 1, 2, 3}, 2.0) == [0]
    assert known.due(5) == [0, 1]


def test_who_is_lost_again_and_again_is_left_alone_ever_longer() -> None:
    known = roster()
    pauses = []
    for _ in range(9):
        pauses.append(known.pause(1))
        known.lose(1, "no answer", 0.0)
    assert pauses == [1, 2, 4, 8, 16, 32, 64, LONGEST_PAUSE, LONGEST_PAUSE]
    known.answer(1)
    assert known.pause(1) == 1


def test_hurry_calls_the_silent_and_not_the_failed() -> None:
    known = roster()
    known.lose(0, "no answer", 0.0, call_from=7)
    known.lose(1, "out of memory", 0.0, failed=True, call_from=7)
    known.call_silent_now()
    assert known.due(0) == [0]


def test_time_is_counted_from_when_one_too_many_was_gone() -> None:
    known = roster()
    known.lose(0, "no answer", 10.0)
    known.lose(1, "no answer", 20.0)
    assert known.left_s(1000.0) == math.inf  # two are enough
    known.lose(2, "no answer", 30.0)
    known.lose(2, "no answer", 40.0)  # it is away since 30
    assert known.left_s(50.0) == 30 + 60 - 50
    known.answer(0)
    assert known.left_s(50.0) == math.inf


def test_site_that_is_connected_again_has_its_time_to_answer() -> None:
    known = roster(least=4)
    known.update_connected({1, 2, 3}, 10.0)
    known.lose(0, "not connected", 10.0)
    assert known.left_s(40.0) == 30.0
    known.update_connected({0, 1, 2, 3}, 40.0)
    assert known.left_s(40.0) == 60.0
    known.update_connected({1, 2, 3}, 70.0)  # it goes and comes, and never answers
    known.lose(0, "not connected", 70.0)
    known.update_connected({0, 1, 2, 3}, 80.0)
    assert known.left_s(80.0) == 20.0
    known.answer(0)
    known.lose(0, "no answer", 90.0)
    assert known.left_s(90.0) == 60.0


def test_run_stops_at_once_where_nobody_can_help() -> None:
    known = roster()
    for site in (0, 1, 2):
        known.lose(site, "out of memory", 0.0, failed=True)
    assert not known.recoverable
    assert known.left_s(0.0) == 0.0
    known.call(0)  # it may have mended
    assert known.recoverable
    assert known.left_s(0.0) == 60.0


@pytest.mark.parametrize(
    ("failed", "text"),
    [
        (
            False,
            (
                "1 sites go on after patience-s = 60, min-sites = 2: stopped. "
                "site 1: why 1; site 2: why 2; site 3: why 3"
            ),
        ),
        (
            True,
            (
                "1 sites go on and no others will, min-sites = 2: stopped. "
                "site 1: why 1; site 2: why 2; site 3: why 3"
            ),
        ),
    ],
)
def test_shortage_says_who_is_away_and_why(failed: bool, text: str) -> None:
    known = roster()
    for site in (1, 2, 3):
        known.lose(site, f"why {site}", 0.0, failed=failed)
    assert known.shortage() == text


def test_shortage_of_many_is_a_short_line() -> None:
    known = roster(sites=100)
    for site in range(99):
        known.lose(site, "no answer", 0.0)
    assert known.shortage("peers").endswith("site 3, site 4, ...: no answer")


def test_least_is_at_most_all() -> None:
    assert roster(least=9).least == 4


def test_who_was_away_has_its_time_anew_after_the_server_was() -> None:
    known, resumed = roster(least=4), roster(least=4)
    known.update_connected({1, 2, 3}, 10.0)
    known.lose(0, "not connected", 10.0)
    known.update_connected({0, 1, 2, 3}, 20.0)  # back, and silent
    resumed.load_state_dict(known.state_dict(), 100.0)
    resumed.update_connected({1, 2, 3}, 110.0)
    assert resumed.left_s(110.0) == 50.0
    resumed.update_connected({0, 1, 2, 3}, 120.0)
    assert resumed.left_s(120.0) == 60.0
