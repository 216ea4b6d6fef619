"""Writes the keys of deployment.yaml into docs/serving.md, from the types that read it.

    python -m scripts.serving_keys            # rewrites the part between the two marks

A test compares the page with what this gives, so the page cannot name a key that is not there, or leave one
out.
"""

import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from tokenmill.engine.mock import MockScript
from tokenmill.router import Price
from tokenmill.server.config import Deployment

__all__ = ["PAGE", "keys_table", "main", "with_keys"]

PAGE: Final = Path(__file__).parents[1] / "docs" / "serving.md"
_BEGIN: Final = "<!-- keys: python -m scripts.serving_keys -->\n"
_END: Final = "<!-- end of keys -->\n"


def main() -> int:
    """Rewrite the page."""
    PAGE.write_text(with_keys(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


def with_keys(page: str) -> str:
    """The page with the table as it should be. Raises ValueError without the marks."""
    before, after = page.index(_BEGIN) + len(_BEGIN), page.index(_END)
    return page[:before] + keys_table() + page[after:]


def keys_table() -> str:
    """A part for each section of the file: what its type says of it, and its keys."""
    return "\n".join(_sections(Deployment, "")) + "\n"


def _sections(section: Any, place: str) -> Iterator[str]:
    hints = typing.get_type_hints(section)
    rows, inner = [], []
    for each in dataclasses.fields(section):
        found, suffix, kind = _inside(hints[each.name])
        if found is None:
            rows.append(f"| `{each.name}{suffix}` | {kind} | {_default(each)} |")
        else:
            inner.append((found, f"{place}{each.name}{suffix}."))
    yield f"### {f'`{place[:-1]}`' if place else 'The file'}\n\n{inspect.getdoc(section)}\n"
    if rows:
        yield "\n".join(["| key | kind | if left out |", "|---|---|---|", *rows]) + "\n"
    for found, name in inner:
        # Prices look the same wherever they are.
        if found is not Price or name.startswith("models"):
            yield from _sections(found, name)


def _inside(hint: Any) -> tuple[Any, str, str]:
    """The section that a key holds (None: a plain value), how its name goes on, and the kind in words."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        kinds = [each for each in typing.get_args(hint) if each is not type(None)]
        return _inside(kinds[0]) if len(kinds) == 1 else (None, "", " or ".join(map(_word, kinds)))
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return (None, "", "a script, for tests") if hint is MockScript else (hint, "", "")
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        inner, suffix, kind = _inside(args[1])
        return inner, f".{'NAME' if args[0] is str else 'TIER'}{suffix}", kind
    if origin is tuple:
        inner, suffix, kind = _inside(args[0])
        return inner, "[]" + suffix, kind
    return None, "", _word(hint)


def _word(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{each}`" for each in typing.get_args(kind))
    names = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false", "Path": "path"}
    return names.get(getattr(kind, "__name__", ""), "value")


def _default(each: "dataclasses.Field[Any]") -> str:
    if each.default is dataclasses.MISSING:
        return "must be given" if each.default_factory is dataclasses.MISSING else "none"
    if each.default is None:
        return "chosen"
    if isinstance(each.default, tuple):
        return ", ".join(f"`{value}`" for value in each.default) or "none"
    if isinstance(each.default, bool):
        return f"`{str(each.default).lower()}`"
    return f"`{each.default}`" if each.default != "" else "none"


if __name__ == "__main__":
    sys.exit(main())
