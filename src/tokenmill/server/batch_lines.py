"""Lines of batches as bytes: input files that are read line by line, and the lines of output and error files.

An input line is `{"custom_id", "method": "POST", "url", "body"}` for both APIs; `requests` of a message batch
are written down in that form. Only its frame is checked here. What is wrong with a body is an error of that
line alone.
"""

import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from tokenmill.server.files import Draft, FilesConfig
from tokenmill.store import Batch, BatchFault, LineResult, NewLine, line_request_id
from tokenmill.wire import FieldError

__all__ = ["InputReader", "line_body", "output_line", "write_requests"]

_CHUNK: Final = 500
_MAX_FAULTS: Final = 100
_MAX_ID_CHARS: Final = 512
_MESSAGES_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NOT_RUN: Final = {
    "cancelled": ("batch_cancelled", "This request was not answered, for the batch was cancelled."),
    "expired": ("batch_expired", "This request was not answered before the batch expired."),
}
_MESSAGES_URL: Final = "/v1/messages"


class _InputLine(msgspec.Struct, forbid_unknown_fields=True):
    custom_id: str
    body: msgspec.Raw
    method: str = "POST"
    url: str = ""


class _Model(msgspec.Struct):
    model: str = ""


class _Requests(msgspec.Struct, forbid_unknown_fields=True):
    requests: list[msgspec.Raw]


class _Request(msgspec.Struct, forbid_unknown_fields=True):
    custom_id: str
    params: msgspec.Raw


class InputReader:
    """Reads the input of a batch, in a thread. `faults` say what is wrong with it, the first ones at most."""

    def __init__(self, path: Path, endpoint: str, config: FilesConfig) -> None:
        self._path = path
        self._endpoint = endpoint
        self._config = config
        self._ids: set[str] = set()
        self.faults: list[BatchFault] = []
        self.model = ""
        self.num_lines = 0

    def chunks(self) -> Iterator[list[NewLine]]:
        """The lines, some at a time. Ends early at the first fault that ends it all, or after many."""
        chunk: list[NewLine] = []
        for number, offset, data in self._lines():
            if (line := self._line(number, offset, data)) is not None:
                chunk.append(line)
            if len(self.faults) >= _MAX_FAULTS:
                return
            if len(chunk) >= _CHUNK:
                yield chunk
                chunk = []
        if not self.num_lines:
            self._fault("empty_file", "the file has no requests", None)
        if chunk:
            yield chunk

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        """Number from 1, offset and bytes of each line that is not empty."""
        number = offset = 0
        with self._path.open("rb") as file:
            while data := file.readline(self._config.max_line_bytes + 1):
                number += 1
                if len(data) > self._config.max_line_bytes:
                    self._fault("line_too_long", f"it has over {self._config.max_line_bytes} bytes", number)
                    return
                if number > self._config.max_lines:
                    self._fault("too_many_lines", f"there are over {self._config.max_lines}", number)
                    return
                if data.strip():
                    yield number, offset, data
                offset += len(data)

    def _line(self, number: int, offset: int, data: bytes) -> NewLine | None:
        try:
            line = msgspec.json.decode(data, type=_InputLine)
        except (ValueError, RecursionError) as error:
            self._fault("invalid_json_line", f"this line is no request ({error})", number)
            return None
        if (fault := self._wrong(line)) is not None:
            code, message, field = fault
            self._fault(code, message, number, field)
            return None
        self._ids.add(line.custom_id)
        if not self.num_lines:
            self.model = _model_of(bytes(line.body))
        self.num_lines += 1
        return NewLine(number=number - 1, custom_id=line.custom_id, offset=offset, length=len(data))

    def _wrong(self, line: _InputLine) -> tuple[str, str, str] | None:
        """Code, message and field of what is wrong with a line's frame."""
        if not 0 < len(line.custom_id) <= _MAX_ID_CHARS:
            return "invalid_custom_id", f"it has 1 to {_MAX_ID_CHARS} characters", "custom_id"
        if line.custom_id in self._ids:
            return "duplicate_custom_id", "a line before has it, too", "custom_id"
        if line.method != "POST":
            return "invalid_method", "the method is POST", "method"
        if line.url not in ("", self._endpoint):
            return "mismatched_endpoint", f"the batch is for {self._endpoint}", "url"
        return None

    def _fault(self, code: str, message: str, line: int | None, param: str | None = None) -> None:
        self.faults.append(BatchFault(code=code, message=message[:500], line=line, param=param))


def write_requests(body: Path, draft: Draft, config: FilesConfig) -> str:
    """Write the requests in a body of POST /v1/messages/batches down as input lines; returns the first model.

    In a thread. The body is mapped, not read into memory. Raises FieldError for what is no batch.
    """
    if not body.stat().st_size:
        raise FieldError("", "the body is empty", hint='send {"requests": [...]}')
    ids: set[str] = set()
    model = ""
    with body.open("rb") as file:
        # Not closed by hand: what is decoded refers to it, also from an error's traceback.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        requests = _decoded(mapped, _Requests, "").requests
        if not 0 < len(requests) <= config.max_lines:
            raise FieldError("requests", f"there are {len(requests)}", hint=f"send 1 to {config.max_lines}")
        for at, raw in enumerate(requests):
            request = _decoded(raw, _Request, f"requests[{at}]")
            if not _MESSAGES_ID.fullmatch(request.custom_id) or request.custom_id in ids:
                hint = "give each its own, of 1 to 64 characters A-Z a-z 0-9 _ -"
                raise FieldError(f"requests[{at}].custom_id", "is there twice, or no id", hint=hint)
            ids.add(request.custom_id)
            params = bytes(request.params).replace(b"\n", b" ").replace(b"\r", b" ")
            if len(params) > config.max_line_bytes - 200:
                raise FieldError(f"requests[{at}].params", "is too long", hint="shorten it")
            model = model or _model_of(params)
            frame = {"custom_id": request.custom_id, "method": "POST", "url": _MESSAGES_URL}
            draft.write(msgspec.json.encode({**frame, "body": msgspec.Raw(params)}) + b"\n")
    return model


def line_body(data: bytes) -> bytes:
    """The body of the request in an input line. Raises FieldError if it is none, or asks for a stream."""
    body = bytes(_decoded(data, _InputLine, "").body)
    try:
        fields = msgspec.json.decode(body)
    except (ValueError, RecursionError) as error:
        raise FieldError("body", f"is no JSON ({error})") from None
    if not isinstance(fields, dict):
        raise FieldError("body", "is no JSON object", hint="send the body of a request")
    if fields.get("stream"):
        raise FieldError("stream", "a batch has no streams", hint="leave it out")
    return body


def output_line(batch: Batch, result: LineResult) -> bytes:
    """What a line came to, as a line of the batch's output or error file."""
    value = _messages_line(result) if batch.api == "anthropic" else _openai_line(batch, result)
    return msgspec.json.encode(value) + b"\n"


def _openai_line(batch: Batch, result: LineResult) -> dict[str, Any]:
    name = f"batch_req_{batch.id.rpartition('_')[2]}_{result.number}"
    if result.state in _NOT_RUN:
        code, message = _NOT_RUN[result.state]
        error = {"code": code, "message": message}
        return {"id": name, "custom_id": result.custom_id, "response": None, "error": error}
    response = {
        "status_code": result.status,
        "request_id": line_request_id(batch.id, result.number),
        "body": msgspec.Raw(result.body),
    }
    return {"id": name, "custom_id": result.custom_id, "response": response, "error": None}


def _messages_line(result: LineResult) -> dict[str, Any]:
    if result.state == "answered":
        inner: dict[str, Any] = {"type": "succeeded", "message": msgspec.Raw(result.body)}
    elif result.state == "errored":
        inner = {"type": "errored", "error": msgspec.Raw(result.body)}
    else:
        inner = {"type": "canceled" if result.state == "cancelled" else "expired"}
    return {"custom_id": result.custom_id, "result": inner}


def _model_of(body: bytes) -> str:
    """The model that a body names, empty if it names none."""
    try:
        return msgspec.json.decode(body, type=_Model).model[:200]
    except (ValueError, RecursionError):
        return ""


def _decoded(data: Any, kind: type[Any], path: str) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except (ValueError, RecursionError) as error:
        raise FieldError(path, f"makes no sense ({error})", hint="see docs/batches.md") from None
