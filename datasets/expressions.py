"""Labels computed from a table's columns by arithmetic, comparisons and Boolean operators.

A run's author writes the expression and every site computes it, so it must not be code. It is
parsed, never run: the syntax tree is walked, and what is not listed here is refused. Results are
those of ``pandas.DataFrame.eval``: ``&`` and ``|`` bind like ``and`` and ``or``; columns whose
names are no Python names stand in backticks.
"""

import ast
import operator
import re
from collections.abc import Callable
from typing import Any

import pandas as pd

from datasets.names import shown

LONGEST, DEEPEST = 1000, 100  # characters, and levels of the syntax tree
LARGEST = 2**63  # of whole numbers: constants and what is computed of them
ALLOWED = (
    "allowed are columns (in backticks where their names are no Python names), numbers, texts, "
    "+ - * / // % **, comparisons, in [...], and, or, not, & | ~"
)

Value = Any  # a column [rows], or a constant: bool, int, float or str
ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda column, values: column.isin(values),
    ast.NotIn: lambda column, values: ~column.isin(values),
}
UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Invert: operator.invert,
    ast.Not: operator.invert,
}
TOKENS = re.compile(r"""('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|`([^`]*)`|([&|])""")


class ExpressionError(ValueError):
    """The expression is none, or not allowed; the message says which part."""


def evaluate(expression: str, table: pd.DataFrame) -> tuple[pd.Series, list[str]]:
    """The values [rows] of ``expression`` on ``table``, and the columns that it is made of.

    Raises:
        ExpressionError: it is too long or too deep, holds no column, or what is not allowed.
    """
    if len(expression) > LONGEST:
        raise ExpressionError(f"it has {len(expression)} characters, at most {LONGEST} are allowed")
    text, quoted = _python(expression)
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ExpressionError("it cannot be parsed") from error
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    columns = {name: quoted.get(name, name) for name in names}
    if unknown := sorted(name for name in columns.values() if name not in table):
        raise ExpressionError(f"{shown(unknown[0])} is no column")
    try:
        values = _value(tree, {name: table[column] for name, column in columns.items()}, DEEPEST)
    except ExpressionError:
        raise
    except (TypeError, ArithmeticError, ValueError) as error:
        # Without the error's own words, which may hold values of the table.
        raise ExpressionError("its operators do not fit the kinds of its columns") from error
    if not isinstance(values, pd.Series):
        raise ExpressionError("it names no column")
    return values, sorted(columns.values())


def _python(expression: str) -> tuple[str, dict[str, str]]:
    """``expression`` in Python's own syntax, and the columns in backticks by their names there."""
    prefix = "_"
    while prefix in expression:
        prefix += "_"
    quoted: dict[str, str] = {}

    def replace(found: re.Match[str]) -> str:
        text, column, sign = found.groups()
        if text is not None:
            return str(text)
        if sign is not None:
            return " and " if sign == "&" else " or "
        name = f"{prefix}{len(quoted)}"
        quoted[name] = column
        return f" {name} "

    return TOKENS.sub(replace, expression).strip(), quoted


def _value(node: ast.expr, columns: dict[str, pd.Series], depth: int) -> Value:
    if not depth:
        raise ExpressionError(f"it is deeper than {DEEPEST} levels")

    def value(part: ast.expr) -> Value:
        return _value(part, columns, depth - 1)

    match node:
        case ast.Name(id=name):
            return columns[name]
        case ast.Constant(value=bool() | int() | float() | str() as constant):
            return _bounded(constant)
        case ast.UnaryOp(op=op, operand=operand):
            return UNARY[type(op)](value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            one, two = _number(value(left)), _number(value(right))
            if (
                isinstance(op, ast.Pow)
                and isinstance(one, int)
                and isinstance(two, int)
                and two > 64
            ):
                raise ExpressionError(f"a constant to the power of {two} is not allowed")
            return _bounded(ARITHMETIC[type(op)](one, two))
        case ast.BoolOp(op=op, values=parts):
            joined = operator.and_ if isinstance(op, ast.And) else operator.or_
            result = value(parts[0])
            for part in parts[1:]:
                result = joined(result, value(part))
            return result
        case ast.Compare(left=left, ops=ops, comparators=others):
            return _comparison(value(left), ops, others, value)
        case ast.Constant(value=constant):
            raise ExpressionError(
                f"a constant of the kind {type(constant).__name__} is not allowed"
            )
    raise ExpressionError(f"{type(node).__name__} is not allowed")


def _comparison(
    left: Value, ops: list[ast.cmpop], others: list[ast.expr], value: Callable[[ast.expr], Value]
) -> Value:
    """``left < one < two ...``: every link of the chain holds."""
    result: Value = True
    for op, other in zip(ops, others, strict=True):
        if type(op) not in COMPARISONS:
            raise ExpressionError(f"{type(op).__name__} is not allowed")
        if isinstance(op, ast.In | ast.NotIn):
            right: Value = _constants(other, value)
            if not isinstance(left, pd.Series):
                raise ExpressionError("in needs a column before it")
        else:
            right = value(other)
        result = result & COMPARISONS[type(op)](left, right)
        left = right
    return result


def _constants(node: ast.expr, value: Callable[[ast.expr], Value]) -> list[Value]:
    """The constants of the list behind ``in``."""
    match node:
        case ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Set(elts=parts):
            constants = [value(part) for part in parts]
            if not any(isinstance(each, pd.Series) for each in constants):
                return constants
    raise ExpressionError("in needs a list of constants behind it")


def _number(value: Value) -> Value:
    """``value`` for arithmetic: ``*`` would repeat a text without end, ``%`` would format it."""
    if isinstance(value, str) or (
        isinstance(value, pd.Series) and not pd.api.types.is_numeric_dtype(value)
    ):
        raise ExpressionError("texts can be compared, not computed with")
    return value


def _bounded(value: Value) -> Value:
    if isinstance(value, complex) or (isinstance(value, int) and abs(value) > LARGEST):
        raise ExpressionError(
            f"of its constants comes a number that is not real, or not within ±{LARGEST}"
        )
    return value
