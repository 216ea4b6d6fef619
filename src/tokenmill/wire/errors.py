"""Errors on the wire: our tree to the shapes of both APIs, and what an endpoint says back to our tree.

OpenAI: `{"error": {"message", "type", "param", "code"}}`. Anthropic: `{"type": "error", "error": {"type",
"message"}, "request_id"}`. Other servers have other shapes (`detail`, a bare text), which are read too.
"""

import re
import time
from email.utils import parsedate_to_datetime
from typing import Any, Final

import msgspec

from tokenmill.core import (
    BudgetError,
    EndpointError,
    ExpiredError,
    NotFoundError,
    ResourceError,
    TokenmillError,
    UsageError,
)
from tokenmill.wire.call import Api
from tokenmill.wire.fields import FieldError, encode_json, quoted
from tokenmill.wire.sse import encode_sse

__all__ = [
    "UnknownModelError",
    "error_of",
    "retry_after",
    "status_of",
    "stream_error",
    "write_error",
    "write_stream_error",
]

_OPENAI: Final[dict[int, tuple[str, str | None]]] = {
    401: ("invalid_request_error", "invalid_api_key"),
    403: ("permission_error", None),
    404: ("invalid_request_error", "not_found"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
}
"""Type and code; other statuses below 500 are `invalid_request_error`, all above `server_error`."""

_ANTHROPIC: Final = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
"""Other statuses below 500 are `invalid_request_error`, all above `api_error`."""

_STATUS_OF_TYPE: Final = {
    "invalid_request_error": 400,
    "server_error": 500,
    "api_error": 500,
    **{name: status for status, name in _ANTHROPIC.items()},
}
_CLASS_STATUS: Final[tuple[tuple[type[TokenmillError], int], ...]] = (
    (UsageError, 400),
    (ExpiredError, 504),
    (NotFoundError, 404),
    (ResourceError, 429),
    (EndpointError, 502),
)


class UnknownModelError(NotFoundError):
    """A model that is not served here."""


def status_of(error: TokenmillError, api: Api = "openai") -> int:
    """The HTTP status that an error is answered with.

    To Anthropic's clients a server that is full is 529, money that is not left 402: neither is a rate limit.
    """
    if api == "anthropic":
        own: dict[type[TokenmillError], int] = {BudgetError: 402, ResourceError: 529}
        if type(error) in own:
            return own[type(error)]
    return next((status for kind, status in _CLASS_STATUS if isinstance(error, kind)), 500)


def write_error(
    api: Api, error: TokenmillError, *, status: int = 0, code: str | None = None, request_id: str = ""
) -> bytes:
    """The body of an error, in the shape of the API. `status` and `code` where the class does not say it."""
    status = status or status_of(error, api)
    if api == "anthropic":
        kind = _ANTHROPIC.get(status, "invalid_request_error" if status < 500 else "api_error")
        name = {"request_id": request_id} if request_id else {}
        return encode_json({"type": "error", "error": {"type": kind, "message": _clean(str(error))}, **name})
    default = ("invalid_request_error" if status < 500 else "server_error", None)
    kind, usual_code = _OPENAI.get(status, default)
    if isinstance(error, BudgetError):
        kind = usual_code = "insufficient_quota"
    field: str | None = None
    if isinstance(error, FieldError):
        field, code = error.field or None, code or error.code
    elif isinstance(error, UnknownModelError):
        field, usual_code = "model", "model_not_found"
    inner = {"message": _clean(str(error)), "type": kind, "param": field, "code": code or usual_code}
    return encode_json({"error": inner})


def write_stream_error(api: Api, error: TokenmillError, *, request_id: str = "") -> bytes:
    """The event of an error after a stream has begun."""
    body = write_error(api, error, request_id=request_id)
    return encode_sse(body, "error" if api == "anthropic" else "")


def error_of(status: int, body: bytes, *, key_name: str = "") -> TokenmillError:
    """What an endpoint meant by a status and a body. `key_name` is the variable that has its key."""
    said = quoted(_message(body)) if body else "nothing"
    message = f"HTTP {status}, it says {said}"
    if status in (401, 403):
        what = f"look at the key in {key_name}" if key_name else "name the variable of the key (--key-env)"
        return UsageError(message, hint=what)
    if status == 404:
        return NotFoundError(message, hint="check the URL, --api, and the model's name (GET /v1/models)")
    if status in (408, 409, 425, 429, 529):
        return ResourceError(message, hint="ask for less at once, or later")
    if 400 <= status < 500:
        return UsageError(message, hint="the endpoint does not take this request as it is")
    return EndpointError(message, hint="look at the endpoint's log, or try again")


def retry_after(value: str) -> float:
    """The seconds that a Retry-After header asks for, 0 if it asks for none that can be read."""
    if re.fullmatch(r"\d{1,9}(\.\d{1,6})?", value):
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def stream_error(data: bytes) -> TokenmillError:
    """The error that an endpoint sends in a stream, after the status was 200."""
    try:
        found = msgspec.json.decode(data)
    except (ValueError, RecursionError):
        found = None
    inner = found.get("error") if isinstance(found, dict) else None
    inner = inner if isinstance(inner, dict) else {}
    code = inner.get("code")
    status = code if isinstance(code, int) and 400 <= code < 600 else 0
    error = error_of(status or _STATUS_OF_TYPE.get(str(inner.get("type")), 500), data)
    text = error.message.partition(", ")[2]
    return type(error)(f"an error in the stream, {text}", hint=error.hint)


def _message(body: bytes) -> str:
    """The sentence in an error's body, whatever its shape; else the body itself."""
    try:
        found: Any = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return body.decode("utf-8", "replace")
    for name in ("error", "detail", "message"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    return found if isinstance(found, str) else body.decode("utf-8", "replace")


def _clean(text: str) -> str:
    """Text that JSON can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")
