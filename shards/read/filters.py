"""Selects manifest rows with a small expression language, or with any pyarrow expression.

Takes caches and a filter; returns the rows of the joined manifest that match, for ``FeatureStream(rows=…)``.

    1 <= duration < 20 and speaker != '' and not (split in ['test', 'val'] or text_length == 0)

Names are the columns of the manifest (``docs/format.md``) and of the label set, ``duration`` in seconds and
``text_length`` in characters. The syntax is Python's, but nothing is evaluated as Python.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shards.errors import UserError
from shards.read.cache import Cache

COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


def select_rows(caches: Sequence[Cache], filter: str | pc.Expression) -> NDArray[np.int64]:
    """Return the rows of the concatenated ``caches`` that match ``filter``, int64 in ascending order.

    Raises:
        UserError: the filter is not a valid expression, or compares a column with a value of another type.
    """
    found, start = [], 0
    for cache in caches:
        table = cache.manifest
        seconds = pc.divide(pc.cast(table["samples"], pa.float64()), float(cache.spec.sampling_rate))
        table = table.append_column("duration", seconds)
        table = table.append_column("text_length", pc.cast(pc.utf8_length(table["text"]), pa.int64()))
        expression = parse_filter(filter, table.column_names) if isinstance(filter, str) else filter
        table = table.append_column("", pa.array(np.arange(len(table))))  # no label column has this name
        try:
            passed = table.filter(expression)[""]
        except (pa.ArrowException, TypeError) as error:
            message = " ".join(str(error).split())
            raise UserError(
                f"the filter '{filter}' does not fit the manifest of '{cache.location}': {message}"
            ) from None
        found.append(passed.to_numpy() + start)
        start += len(cache)
    rows: NDArray[np.int64] = np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
    return rows


def parse_filter(text: str, columns: Sequence[str]) -> pc.Expression:
    """Parse the text of a filter over ``columns``; UserError if it is not a valid filter."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id not in columns:
                raise _UnsupportedExpression(f"column '{node.id}' does not exist (columns: {', '.join(columns)})")
        expression = _expression(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _invalid_filter(text, "it is not an expression") from None
    except _UnsupportedExpression as error:
        raise _invalid_filter(text, str(error)) from None
    return expression


class _UnsupportedExpression(Exception):
    """A part of the text that filters do not support. The message is one phrase."""


def _invalid_filter(text: str, what: str) -> UserError:
    return UserError(f"'{text}' is not a valid filter: {what}; example: \"duration < 20 and split != 'test'\"")


def _expression(node: ast.expr) -> pc.Expression:
    if isinstance(node, ast.BoolOp):
        join = operator.and_ if isinstance(node.op, ast.And) else operator.or_
        return reduce(join, map(_expression, node.values))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return ~_expression(node.operand)
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        return reduce(operator.and_, map(_comparison, sides, node.ops, sides[1:]))
    raise _UnsupportedExpression(f"'{ast.unparse(node)}' is not a comparison")


def _comparison(left: ast.expr, op: ast.cmpop, right: ast.expr) -> pc.Expression:
    if not any(isinstance(side, ast.Name) for side in (left, right)):
        raise _UnsupportedExpression(f"neither '{ast.unparse(left)}' nor '{ast.unparse(right)}' is a column")
    if isinstance(op, ast.In | ast.NotIn):
        if not isinstance(right, ast.List | ast.Tuple):
            raise _UnsupportedExpression(f"'in' expects a list such as ['a', 'b'], got '{ast.unparse(right)}'")
        values = pa.array([_constant(value) for value in right.elts])
        inside = _value(left).isin(values)
        return ~inside if isinstance(op, ast.NotIn) else inside
    if type(op) not in COMPARE:
        raise _UnsupportedExpression("expected one of '<', '<=', '>', '>=', '==', '!=', 'in' and 'not in'")
    compared: pc.Expression = COMPARE[type(op)](_value(left), _value(right))
    return compared


def _value(node: ast.expr) -> pc.Expression:
    if isinstance(node, ast.Name):
        return pc.field(node.id)
    return pc.scalar(_constant(node))


def _constant(node: ast.expr) -> str | int | float | bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        number = _constant(node.operand)
        if not isinstance(number, str | bool):
            return -number
    if isinstance(node, ast.Constant) and type(node.value) in (str, int, float, bool):
        return node.value  # type: ignore[return-value]
    raise _UnsupportedExpression(f"'{ast.unparse(node)}' is not a column, a string, a number or True or False")
