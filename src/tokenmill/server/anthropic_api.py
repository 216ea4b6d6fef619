"""The Anthropic API: messages, the count of their tokens, models. Thin: a body to a call, an answer to bytes.

`anthropic-beta` is passed over. `anthropic-version` may be any date, for clients send the one that they were
made for, and changes nothing; but GET /v1/models, which both APIs have, is answered in this shape only to
those that send the header.
"""

import re
from datetime import UTC, datetime
from typing import Any, Final

from starlette.requests import Request
from starlette.routing import Match, Route

from tokenmill.core import NotFoundError, SamplingParams
from tokenmill.server.answering import EventStream, JsonAnswer, send_json
from tokenmill.server.caller import Caller
from tokenmill.server.edge import Asgi, Receive, Scope_, Send
from tokenmill.server.gateway import Answer, Gateway
from tokenmill.wire import (
    AnthropicHead,
    AnthropicWriter,
    Call,
    FieldError,
    parse_anthropic_call,
    parse_anthropic_count,
    write_anthropic_reply,
)
from tokenmill.wire.fields import encode_json

__all__ = ["AnthropicApi"]

_VERSION: Final = re.compile(r"20[0-9]{2}-[01][0-9]-[0-3][0-9]")
_DEFAULTS: Final = SamplingParams(temperature=1.0)
_MAX_PAGE: Final = 1000


class AnthropicApi:
    """Handlers of the routes under /v1 that Anthropic's clients use. `started` is Unix time, in seconds."""

    def __init__(self, gateway: Gateway, started: int) -> None:
        self._gateway = gateway
        self._created_at = datetime.fromtimestamp(started, UTC).isoformat().replace("+00:00", "Z")

    def routes(self) -> list[Route]:
        """The routes; those of models are for callers of this API alone and stand before the others."""
        return [
            Route("/v1/messages", self.messages, methods=["POST"]),
            Route("/v1/messages/count_tokens", self.count_tokens, methods=["POST"]),
            _AnthropicRoute("/v1/models", self.models, methods=["GET"]),
            _AnthropicRoute("/v1/models/{model:path}", self.model, methods=["GET"]),
        ]

    async def messages(self, request: Request) -> Asgi:
        """POST /v1/messages."""
        _check_version(request)
        call = parse_anthropic_call(await request.body(), _DEFAULTS)
        _check_turn(call)
        caller: Caller = request.scope["tokenmill.caller"]
        answer = await self._gateway.open(call, caller)
        head = _head(answer)
        if call.stream:
            return EventStream(answer, AnthropicWriter(answer.num_prompt_tokens, 0, head))
        return JsonAnswer(answer, lambda reply: write_anthropic_reply(reply, head))

    async def count_tokens(self, request: Request) -> Asgi:
        """POST /v1/messages/count_tokens."""
        _check_version(request)
        call = parse_anthropic_count(await request.body())
        _check_turn(call)
        return _Json({"input_tokens": await self._gateway.count_prompt_tokens(call)})

    async def models(self, request: Request) -> Asgi:
        """GET /v1/models, a page of them: `limit`, `after_id`, `before_id`."""
        _check_version(request)
        names = self._gateway.models
        limit = _limit(request.query_params.get("limit"))
        after, before = request.query_params.get("after_id"), request.query_params.get("before_id")
        if after is not None:
            names = names[_place(names, after, "after_id") + 1 :]
        if before is not None:
            names = names[: _place(names, before, "before_id")]
        page = names[-limit:] if before is not None and after is None else names[:limit]
        return _Json(
            {
                "data": [self._model(name) for name in page],
                "has_more": len(page) < len(names),
                "first_id": page[0] if page else None,
                "last_id": page[-1] if page else None,
            }
        )

    async def model(self, request: Request) -> Asgi:
        """GET /v1/models/{model}."""
        _check_version(request)
        name = request.path_params["model"]
        if name not in self._gateway.models:
            raise NotFoundError(f"the model {name[:80]!r} is not served", hint="see GET /v1/models")
        return _Json(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        return {"type": "model", "id": name, "display_name": name, "created_at": self._created_at}


class _AnthropicRoute(Route):
    """A path that the other API has too: only for those whose request is of this one."""

    def matches(self, scope: Scope_) -> tuple[Match, Scope_]:
        caller: Caller = scope["tokenmill.caller"]
        return super().matches(scope) if caller.api == "anthropic" else (Match.NONE, {})


class _Json:
    """A value as the whole answer."""

    def __init__(self, value: object) -> None:
        self._body = encode_json(value)

    async def __call__(self, scope: Scope_, receive: Receive, send: Send) -> None:
        await send_json(send, 200, self._body)


def _check_version(request: Request) -> None:
    version = request.headers.get("anthropic-version", "2023-06-01")
    if not _VERSION.fullmatch(version):
        raise FieldError("anthropic-version", f"it is {version[:40]!r}", hint="use 2023-06-01")


def _check_turn(call: Call) -> None:
    """Answers begin anew: none goes on from words that the client put into the model's mouth."""
    if call.messages[-1].role == "assistant":
        hint = "end with what the user says; an answer cannot be begun for the model"
        raise FieldError("messages", "the last one is the assistant's", hint=hint)


def _head(answer: Answer) -> AnthropicHead:
    name = answer.caller.request_id.removeprefix("req_")
    return AnthropicHead(id=f"msg_{name}", tier=answer.tier, max_tokens=answer.call.params.max_tokens)


def _limit(value: str | None) -> int:
    if value is None:
        return 20
    if not value.isascii() or not value.isdigit() or len(value) > 9 or not 1 <= int(value) <= _MAX_PAGE:
        raise FieldError("limit", f"it is {value[:40]!r}", hint=f"use a whole number from 1 to {_MAX_PAGE}")
    return int(value)


def _place(names: list[str], name: str, field: str) -> int:
    if name not in names:
        raise FieldError(field, f"the model {name[:80]!r} is not served", hint="give an id of GET /v1/models")
    return names.index(name)
