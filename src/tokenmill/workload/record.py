"""One call of a workload: what was asked, what was answered, by whom, under which terms, for how much.

A file of them is JSON lines. `request` is a body of POST /v1/chat/completions (or /v1/completions) that can
be sent again, `response` what that answers; the rest is what an endpoint does not say of itself. Texts may be
redacted. Who asked is a project and a pseudonym, from which nobody who lacks its key finds the end user.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from tokenmill.core import NotFoundError, StorageError, Tier, UsageError

__all__ = ["Given", "Origin", "WorkloadCall", "read_calls", "write_call"]


class Origin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which model made an answer: its name, where it is from, the digest of its files if they are here."""

    model: str
    source: str = ""
    digest: str = ""


class Given(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An answer that was given, in the shape of the API, by a deployment.

    `terms` are the licences of the model, or the terms of its provider: whether the answer may be trained on
    is for whoever reads them. Empty: nobody said.
    """

    response: dict[str, Any]
    deployment: str
    origin: Origin
    terms: tuple[str, ...] = ()
    cost_nano_usd: int = 0


class WorkloadCall(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A call and the answer that was given, with the fields of `Given`.

    `created` is Unix time in seconds when it began, money is nanodollars. `shadow` is what another deployment
    answered to the same call, for comparison.
    """

    id: str
    created: float
    project: str
    end_user: str = ""
    feature: str = ""
    tier: Tier = "standard"
    request: dict[str, Any]
    response: dict[str, Any]
    deployment: str
    origin: Origin
    terms: tuple[str, ...] = ()
    price_nano_usd: int = 0
    cost_nano_usd: int = 0
    shadow: Given | None = None


def write_call(call: WorkloadCall) -> bytes:
    """A line, with its end. Raises UsageError for text that is no Unicode (half a surrogate pair)."""
    try:
        return msgspec.json.encode(call) + b"\n"
    except (ValueError, TypeError) as error:
        raise UsageError(f"{call.id} cannot be written ({type(error).__name__})") from None


def read_calls(path: Path) -> Iterator[WorkloadCall]:
    """The calls of a file, one at a time. Raises NotFoundError, StorageError; UsageError with the line."""
    decoder = msgspec.json.Decoder(WorkloadCall)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield decoder.decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    hint = "is it a workload? see docs/capture.md"
                    raise UsageError(f"{path}:{number}: {error}", hint=hint) from None
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {path}", hint="give a workload") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror})", hint="check it") from None
