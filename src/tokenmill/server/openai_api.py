"""The OpenAI API: chat completions, completions, models. Thin: a body to a call, an answer to bytes."""

from typing import Final

from starlette.requests import Request
from starlette.routing import Route

from tokenmill.core import SamplingParams
from tokenmill.server.answering import EventStream, JsonAnswer, send_json
from tokenmill.server.caller import Caller
from tokenmill.server.edge import Asgi, Receive, Scope_, Send
from tokenmill.server.gateway import Gateway
from tokenmill.wire import (
    Call,
    OpenAIHead,
    OpenAIWriter,
    UnknownModelError,
    parse_openai_chat,
    parse_openai_completion,
    write_openai_reply,
)
from tokenmill.wire.fields import encode_json

__all__ = ["OpenAIApi"]

_CHAT: Final = SamplingParams(temperature=1.0, max_tokens=1 << 20)
"""What the API's reference says of values that are left out: the answer may fill the context."""
_COMPLETION: Final = SamplingParams(temperature=1.0, max_tokens=16)


class OpenAIApi:
    """Handlers of the routes under /v1 that OpenAI's clients use."""

    def __init__(self, gateway: Gateway, started: int) -> None:
        self._gateway = gateway
        self._started = started

    def routes(self) -> list[Route]:
        """The routes."""
        return [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completion, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{model:path}", self.model, methods=["GET"]),
        ]

    async def chat(self, request: Request) -> Asgi:
        """POST /v1/chat/completions."""
        call = parse_openai_chat(await request.body(), _CHAT)
        return await self._answer(request, call, chat=True)

    async def completion(self, request: Request) -> Asgi:
        """POST /v1/completions."""
        call = parse_openai_completion(await request.body(), _COMPLETION)
        return await self._answer(request, call, chat=False)

    async def models(self, request: Request) -> Asgi:
        """GET /v1/models."""
        names = self._gateway.models
        return _Json({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, request: Request) -> Asgi:
        """GET /v1/models/{model}."""
        name = request.path_params["model"]
        if name not in self._gateway.models:
            raise UnknownModelError(f"the model {name[:80]!r} is not served", hint="see GET /v1/models")
        return _Json(self._model(name))

    async def _answer(self, request: Request, call: Call, *, chat: bool) -> Asgi:
        caller: Caller = request.scope["tokenmill.caller"]
        answer = await self._gateway.open(call, caller)
        prefix = "chatcmpl" if chat else "cmpl"
        head = OpenAIHead(id=f"{prefix}-{caller.request_id.removeprefix('req_')}", tier=answer.tier)
        if call.stream:
            return EventStream(answer, OpenAIWriter(chat=chat, include_usage=call.include_usage, head=head))
        return JsonAnswer(answer, lambda reply: write_openai_reply(reply, chat=chat, head=head))

    def _model(self, name: str) -> dict[str, object]:
        return {"id": name, "object": "model", "created": self._started, "owned_by": "tokenmill"}


class _Json:
    """A value as the whole answer."""

    def __init__(self, value: object) -> None:
        self._body = encode_json(value)

    async def __call__(self, scope: Scope_, receive: Receive, send: Send) -> None:
        await send_json(send, 200, self._body)
