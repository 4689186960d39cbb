"""Labels computed from columns: what pandas computes, and nothing that is code."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.expressions import LONGEST, ExpressionError, evaluate
from datasets.sources import SourceError, load

TABLE = pd.DataFrame(
    {
        "age": [50, 61, 72, 0],
        "target": [0, 1, 2, 3],
        "dose": [0.5, np.nan, -1.0, 2.5],
        "smokes": [True, False, True, False],
        "ward": ["a", "b", "a & b", "c"],
        "heart rate": [60, 70, 80, 90],
        "class": [1, 1, 2, 2],
    }
)


@pytest.mark.parametrize(
    "expression",
    [
        "target > 0",
        "age >= 60 and target > 0",
        "age >= 60 & target > 0",
        "age < 60 | target > 1 & smokes",
        "not smokes or age == 0",
        "~(target > 0)",
        "~target > 0",
        "0 < target <= 2",
        "target in [1, 3]",
        "target not in (0, -1)",
        "ward in ['a', 'c']",
        "ward == 'a & b'",
        "'b' != ward",
        "`heart rate` > 65 and `class` == 2",
        "age // 10",
        "age % 7 - -target * 2",
        "age / 2 ** 2 > 13.5",
        "+dose > 0",
        "dose == dose",
        "smokes * 2 + target",
        "target & `class`",
        "True and smokes",
        "  target > 0",
    ],
)
def test_values_are_those_of_pandas(expression: str) -> None:
    expected: Any = TABLE.eval(expression.strip())
    pd.testing.assert_series_equal(evaluate(expression, TABLE)[0], expected, check_names=False)


NUMBERS = st.sampled_from(["age", "target", "dose", "`heart rate`", "smokes", "1", "2.5", "-3"])
ARITHMETIC = st.recursive(
    NUMBERS,
    lambda part: st.builds("({} {} {})".format, part, st.sampled_from(["+", "*", "/"]), part),
    max_leaves=4,
)
COMPARISONS = st.builds(
    "{} {} {}".format, ARITHMETIC, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), ARITHMETIC
)
LABELS = st.recursive(
    COMPARISONS | st.builds("not {}".format, COMPARISONS),
    lambda part: st.builds(
        "({} {} {})".format, part, st.sampled_from(["and", "or", "&", "|"]), part
    ),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None)
@given(LABELS)
def test_any_comparison_is_that_of_pandas(expression: str) -> None:
    try:
        expected = TABLE.eval(expression)
    except (TypeError, NotImplementedError, ZeroDivisionError):  # nothing to compare with
        return
    if isinstance(expected, pd.Series):
        pd.testing.assert_series_equal(evaluate(expression, TABLE)[0], expected, check_names=False)


def test_columns_that_a_label_is_made_of_are_told() -> None:
    assert evaluate("age > `heart rate` and 'ward' == 'ward'", TABLE)[1] == ["age", "heart rate"]


def test_two_columns_in_backticks_are_not_confused_with_a_column_of_any_name() -> None:
    table = pd.DataFrame({"a b": [1, 2], "c d": [2, 1], "_0": [5, 5], "__1": [7, 7]})
    assert evaluate("`a b` > `c d`", table)[0].tolist() == [False, True]
    assert evaluate("`a b` + _0 * `c d` + __1", table)[0].tolist() == [1 + 10 + 7, 2 + 5 + 7]


CODE = [
    # What was found to run programs, read keys and write files at a site.
    "(@importlib.import_module('os').system('id > {file}') + age)",
    "@np.resize(@Path('{folder}/0.key').read_text().split(), 4)",
    "@np.resize(@Path('/etc/passwd').read_text().splitlines(), 4)",
    "age.to_csv('{file}')",
    "age.to_pickle('{file}')",
    "@table.drop(columns='ward').to_csv('{file}')",
    # The same without pandas' own sign, and what else Python has.
    "importlib.import_module('os').system('id > {file}') + age",
    "__import__('os').system('id > {file}')",
    "open('{file}', 'w')",
    "(lambda: age.to_csv('{file}'))()",
    "[age.to_csv('{file}') for _ in [1]] == age",
    "age > 0 and age.to_csv('{file}') == 0",
    "age in [age.to_csv('{file}')]",
    "`age`.to_csv('{file}')",
    "f'{age.to_csv(chr(120))}' == ward",
    "age.__class__.__mro__",
    "age[0]",
    "age if smokes else target",
    "(age := 1)",
    "age is target",
    "age @ target",
    "age ^ target",
    "age << 60",
    "{'a': age}",
    "age,",
    "*age",
    "await age",
    "yield age",
    "age; target",
    "age\ntarget",
    "age = 1",
    "del age",
    "import os",
    "age == None",
    "age == ...",
    "age == 1j",
    "ward == b'a'",
    "age in target",
    "1 in [1, 2]",
    "age in [target]",
    "target == [0, 1]",
    "1 > 0",
    "age +",
    "(age > 1",
    "age > 'a'",
    "-ward",
    "ward + 'x'",
    "`nobody` > 0",
    "\x00age",
]


@pytest.mark.parametrize("code", CODE)
def test_code_is_refused_and_not_run(code: str, tmp_path: Path) -> None:
    (tmp_path / "0.key").write_text("the private key of the site")
    TABLE.to_csv(tmp_path / "t.csv", index=False)
    label = code.replace("{file}", str(tmp_path / "written")).replace("{folder}", str(tmp_path))
    before = sorted(Path().iterdir())
    with pytest.raises(SourceError, match=r"data\.label = .*; allowed are columns") as error:
        read_csv(tmp_path / "t.csv", label)
    assert "the private key" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.key", "t.csv"]
    assert sorted(Path().iterdir()) == before


def read_csv(path: Path, label: str) -> Any:
    return load(
        "csv", str(path), label=label, group="", image_size=8, audio_seconds=1.0, text_buckets=8
    )


@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9 < age",
        "9**9 * 9**9 * 9**9 < age",
        "9.0**9.0**9.0**9.0 < age",
        "(-8)**0.5 < age",
        "2**-9999999999999999999 < age",
        f"age < {10**30}",
        "'x' * 999999999 == ward",
        "999999999 * 'x' == ward",
        "ward * 999999999 == 'x'",
        "'%999999999d' % 1 == ward",
        "'%999999999d' % age == ward",
        "ward % 1 == 'x'",
        "-" * 900 + "age",
        "(" * 400 + "age" + ")" * 400,
        "not " * 200 + "smokes",
        "f(" * 300 + "age" + ")" * 300,
        "age + " * 120 + "age",
        "age > 0" + " " * LONGEST,
        "[" * 900,
    ],
)
def test_what_would_eat_time_or_memory_is_refused(expression: str) -> None:
    with pytest.raises(ExpressionError):
        evaluate(expression, TABLE)


def test_bounds_leave_room_for_a_sum_of_many_columns() -> None:
    table = pd.DataFrame({f"q{n}": [n, -n] for n in range(60)})
    total = sum(range(60))
    assert evaluate(" + ".join(table.columns) + " > 0", table)[0].tolist() == [
        total > 0,
        -total > 0,
    ]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [*"()[]{}.,:@'\"`&|~+-*/%<>=!0 \\\n", "**", "age", "ward", "not ", "in ", "and "]
        ),
        max_size=12,
    )
)
def test_any_text_is_a_label_or_refused(parts: list[str]) -> None:
    try:
        values, used = evaluate("".join(parts), TABLE)
    except ExpressionError:
        return
    assert len(values) == len(TABLE)
    assert set(used) <= set(TABLE.columns)


def test_label_that_is_wrong_is_not_repeated_in_full(tmp_path: Path) -> None:
    TABLE.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(SourceError, match="1000000 characters") as error:
        read_csv(tmp_path / "t.csv", "x" * 1_000_000)
    assert len(str(error.value)) < 1500
