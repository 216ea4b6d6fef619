"""Function calls that a model wrote as text, and whether they are the ones that were asked for.

The rules are those of the Berkeley Function Calling Leaderboard (BFCL, its AST check for Python): names,
required and unknown parameters, types, and for every value a list of those that are accepted. Calls of one
answer may come in any order. Nothing that a model wrote is evaluated.
"""

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from tokenmill.core import UsageError

__all__ = ["Call", "calls_match", "parse_calls"]

_MAX_CHARS: Final = 20_000
_TYPES: Final[Mapping[str, type]] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}
_IGNORED: Final = re.compile(r"[ ,./\-_*^]")
_OPTIONAL: Final = ""  # among the accepted values: the parameter may be left out


class Call(NamedTuple):
    """A function's dotted name and its arguments, as plain values."""

    name: str
    arguments: Mapping[str, Any]


def parse_calls(text: str) -> list[Call]:
    """The calls of an answer such as `[f(x=1), g.h(y="a")]`; brackets and code fences may be missing.

    Raises UsageError if the text is something else.
    """
    text = re.sub(r"^```\w*\n", "", text.strip()).strip("`\n ")
    text = f"{'' if text.startswith('[') else '['}{text}{'' if text.endswith(']') else ']'}"
    try:
        if len(text) > _MAX_CHARS:
            raise ValueError("too long")
        body = ast.parse(text.strip().strip("'"), mode="eval").body
        if not isinstance(body, ast.List):
            raise ValueError("no list")
        return [_call(element) for element in body.elts]
    except (SyntaxError, ValueError, RecursionError, MemoryError, TypeError) as error:
        raise UsageError(f"the answer is no list of function calls: {error}") from None


def calls_match(
    calls: Sequence[Call], functions: Sequence[Mapping[str, Any]], accepted: Sequence[Any]
) -> bool:
    """Whether each accepted call, `{name: {parameter: [values]}}`, has one call of its own, and none is
    over.
    """
    if len(calls) != len(accepted):
        return False
    left = list(calls)
    for entry in accepted:
        ((name, values),) = entry.items()
        document = next((each for each in functions if each["name"] == name), None)
        found = next((call for call in left if document and _is_accepted(call, document, values)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call):
        raise ValueError(f"{ast.unparse(node)[:40]!r} is no call")
    arguments = {keyword.arg: _value(keyword.value) for keyword in node.keywords if keyword.arg is not None}
    return Call(ast.unparse(node.func), arguments)


def _value(node: ast.expr) -> Any:
    """What stands for an argument; what is no plain value is kept as its text, as in the official reader."""
    match node:
        case ast.Constant(value=value):
            return "..." if value is Ellipsis else value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=elements):
            return [_value(each) for each in elements]
        case ast.Tuple(elts=elements):
            return tuple(_value(each) for each in elements)
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {_value(k): _value(v) for k, v in zip(keys, values, strict=True) if k is not None}
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div()):
            return _computed(node)
        case ast.Call(keywords=[_, *_]):
            call = _call(node)
            return {call.name: dict(call.arguments)}
    return ast.unparse(node)


def _computed(node: ast.BinOp) -> Any:
    left, right = _value(node.left), _value(node.right)
    if not all(isinstance(each, int | float) and abs(each) < 1e15 for each in (left, right)):
        return ast.unparse(node)
    match node.op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
    return left / right if right else ast.unparse(node)


def _is_accepted(call: Call, document: Mapping[str, Any], values: Mapping[str, list[Any]]) -> bool:
    parameters = document["parameters"]
    if call.name != document["name"] or any(name not in call.arguments for name in parameters["required"]):
        return False
    for name, value in call.arguments.items():
        if name not in parameters["properties"] or name not in values:
            return False
        if not _value_matches(value, parameters["properties"][name], values[name]):
            return False
    return all(name in call.arguments or _OPTIONAL in accepted for name, accepted in values.items())


def _value_matches(value: Any, parameter: Mapping[str, Any], accepted: list[Any]) -> bool:
    kind = parameter["type"]
    expected: Any = _TYPES.get(kind, str)
    inner = _TYPES.get(parameter.get("items", {}).get("type", "any")) if kind in ("array", "tuple") else None
    value = list(value) if kind == "tuple" and isinstance(value, tuple) else value
    value = float(value) if kind == "float" and type(value) is int else value
    usual = _usual_type(accepted)
    if type(value) is expected:
        is_variable = usual is not None and usual is not expected
        if inner is not None and not _items_fit(value, inner, accepted):
            return False
    elif usual is not None and type(value) is usual:
        is_variable = True
    else:
        return False
    if is_variable:
        return value in accepted
    if expected is dict:
        return any(_dict_matches(value, each) for each in accepted if each != _OPTIONAL)
    if expected is list and inner is dict:
        return any(_dicts_match(value, each) for each in accepted)
    return _plain(value) in [_plain(each) for each in accepted]


def _usual_type(accepted: list[Any]) -> type | None:
    return next((type(each) for each in accepted if each != _OPTIONAL), None)


def _items_fit(value: list[Any], inner: type, accepted: list[Any]) -> bool:
    """Whether the items are of the declared type, or of the type that an accepted list has."""
    return any(
        not isinstance(each, list) or all(type(item) in (inner, _usual_type(each)) for item in value)
        for each in accepted
    )


def _dict_matches(value: Any, accepted: Any) -> bool:
    """Each entry among the accepted values of its key, and no key missing that must be there."""
    if not isinstance(value, dict) or not isinstance(accepted, dict):
        return False
    known = all(
        key in accepted and _plain(each) in [_plain(choice) for choice in accepted[key]]
        for key, each in value.items()
    )
    return known and all(key in value or _OPTIONAL in choices for key, choices in accepted.items())


def _dicts_match(values: list[Any], accepted: Any) -> bool:
    return (
        isinstance(accepted, list)
        and len(values) == len(accepted)
        and all(_dict_matches(value, each) for value, each in zip(values, accepted, strict=True))
    )


def _plain(value: Any) -> Any:
    """Texts, also those of a list, without regard to case, spaces and common marks."""
    if isinstance(value, str):
        return _IGNORED.sub("", value).lower().replace("'", '"')
    return [_plain(each) for each in value] if isinstance(value, list) else value
