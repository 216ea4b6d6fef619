"""JSON to typed records and back, with errors that name the field.

A request is read strictly: unknown fields, wrong types and numbers outside their range are a `FieldError`,
which knows the field for the API's own error shape. What an endpoint sends is read tolerantly where it has
more than is needed, and is an `EndpointError` where it has less.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import msgspec

from tokenmill.core import EndpointError, UsageError
from tokenmill.wire.scan import BadJsonError, check_json

__all__ = [
    "FieldError",
    "count_of",
    "decode_reply",
    "decode_request",
    "encode_json",
    "named_fields",
    "quoted",
    "schema_of",
]

_T = TypeVar("_T")
_PLACE: Final = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`$")
_UNKNOWN: Final = re.compile(r"unknown field `([^`]*)`")
_MISSING: Final = re.compile(r"missing required field `([^`]*)`")
_QUOTE_CHARS: Final = 200
_SEE: Final = "see /openapi.json for what can be asked"


class FieldError(UsageError):
    """A field of a request that cannot be used; `field` is its path, such as `messages[0].content`.

    `code` is OpenAI's word for what is wrong, where it has one.
    """

    def __init__(self, field: str, message: str, *, hint: str = "", code: str = "") -> None:
        super().__init__(f"{field}: {message}" if field else message, hint=hint)
        self.field = field
        self.code = code


def decode_request(body: bytes, kind: type[_T], *, hint: str = _SEE) -> _T:
    """A request's body as a record. `hint` is for wrong fields. Raises FieldError."""
    try:
        check_json(body)
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _field_error(str(error), hint) from None
    except BadJsonError as error:
        raise FieldError(error.path, str(error), hint="send plain JSON, as RFC 8259 has it") from None
    except (ValueError, RecursionError) as error:
        raise FieldError("", f"the body is no JSON ({error})", hint="send a JSON object in UTF-8") from None


def decode_reply(body: bytes, kind: type[_T]) -> _T:
    """What an endpoint sent, as a record. Raises EndpointError."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (ValueError, RecursionError) as error:
        raise EndpointError(
            f"the answer makes no sense: {error}; it begins with {quoted(body)}",
            hint="is this an endpoint of the API that was named?",
        ) from None


def encode_json(value: object) -> bytes:
    """Compact JSON in UTF-8. Raises UsageError for text that is no Unicode."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        raise UsageError("a text has half of a surrogate pair", hint="give valid Unicode") from None


def schema_of(source: str) -> dict[str, Any]:
    """A JSON schema from its text. Raises FieldError."""
    try:
        return msgspec.json.decode(source, type=dict[str, Any])
    except (ValueError, RecursionError) as error:
        raise FieldError("grammar", f"the schema is no JSON object ({error})") from None


def count_of(raw: Mapping[str, Any], name: str) -> int:
    """A count in what an endpoint sent, 0 if it is not there. Raises EndpointError for anything else."""
    value = raw.get(name)
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 48:
        raise EndpointError(f"the usage has {name} {quoted(str(value))}, which is no count")
    return value


def quoted(body: bytes | str) -> str:
    """The beginning of what somebody else wrote, on one line of printable text."""
    text = body[:_QUOTE_CHARS].decode("utf-8", "replace") if isinstance(body, bytes) else body[:_QUOTE_CHARS]
    clean = "".join(char if char.isprintable() else " " for char in text).strip()
    return repr(clean + " ..." if len(body) > _QUOTE_CHARS else clean)


@contextmanager
def named_fields(names: Mapping[str, str], path: str = "") -> Iterator[None]:
    """Turns a UsageError of `core` into a FieldError of the first of `names` in its message.

    `path` is the field if there is none.
    """
    try:
        yield
    except FieldError:
        raise
    except UsageError as error:
        places = {name: re.search(rf"\b{re.escape(name)}\b", error.message) for name in names}
        found = sorted((place.start(), name) for name, place in places.items() if place)
        raise FieldError(names[found[0][1]] if found else path, error.message, hint=error.hint) from None


def _field_error(message: str, hint: str) -> FieldError:
    """What msgspec found wrong, with the field's path in front."""
    place = _PLACE.search(message)
    path = place[1] if place else ""
    said = message[: place.start()] if place else message
    name: Any = _UNKNOWN.search(said) or _MISSING.search(said)
    if name:
        path = f"{path}.{name[1]}" if path else name[1]
        said = "this field is not known" if _UNKNOWN.search(said) else "is missing"
    return FieldError(path, said[0].lower() + said[1:], hint=hint)
