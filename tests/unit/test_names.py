"""Names that leave a site, and values in error messages."""

from typing import Any, cast

import pytest
from flwr.app import Context, RecordDict

from client_app.site import SiteId, name_of
from datasets.names import fault, listed, shown, too_many


@pytest.mark.parametrize(
    "name",
    ["a", "x" * 64, "Universitätsklinik 7 (Köln), <b>$x_$</b>", "病院", "=cmd|' /C calc'!A0"],
)
def test_printable_name_passes(name: str) -> None:
    assert fault([name]) == ""


@pytest.mark.parametrize(
    "name",
    ["", "x" * 65, "a\nb", "\x1b[2J", "a\tb", "a\x00", "\u202eabc", "\udcff", "a\u2028b", 7, None],
)
def test_name_that_would_do_harm_is_not_repeated(name: Any) -> None:
    text = fault(["fine", name])
    assert text.startswith("name 2 of 2")
    assert text.isprintable()
    assert not name or str(name)[:60] not in text.replace("of 2", "")


def test_number_of_classes_is_bounded() -> None:
    assert (too_many(100), too_many(101)) == (
        "",
        "101 different classes, at most 100 may leave a site",
    )


def test_long_values_are_shortened_and_odd_ones_escaped() -> None:
    assert shown("a\nb") == r"'a\nb'"
    assert shown("/data/" + "x" * 150) == f"'/data/{'x' * 150}'"
    text = shown("start" + "x" * 1_000_000 + "end")
    assert text.startswith("'startx")
    assert text.endswith("xend' (1000008 characters)")
    assert len(text) < 220


def test_long_lists_are_shortened() -> None:
    assert listed(["a", "b\n"]) == r"a, 'b\n'"
    assert listed([str(number) for number in range(50)]) == ", ".join(map(str, range(20))) + ", ..."


def test_name_of_a_site_is_checked_where_it_leaves() -> None:
    config, place = cast(Any, None), SiteId(3, None, "")

    def named(**node: str) -> str:
        return name_of(config, place, Context(1, 2, dict(node), RecordDict(), {}))

    assert named(name="Oslo") == "Oslo"
    assert named() == "site 3"
    with pytest.raises(
        ValueError,
        match="name of --node-config: name 1 of 1 holds characters that cannot be printed",
    ):
        named(name="Oslo\x1b[2J\nWARNING: all is well")
