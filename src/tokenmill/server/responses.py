"""OpenAI's Responses API over the same calls. Nothing is stored: what a response was, its client knows."""

from typing import Final

from starlette.requests import Request
from starlette.routing import Route

from tokenmill.core import NotFoundError, SamplingParams
from tokenmill.server.answering import EventStream, JsonAnswer
from tokenmill.server.caller import Caller
from tokenmill.server.edge import Asgi
from tokenmill.server.gateway import Gateway
from tokenmill.wire.responses_answer import ResponseHead, ResponseWriter, write_response
from tokenmill.wire.responses_parse import parse_response

__all__ = ["ResponsesApi"]

_DEFAULTS: Final = SamplingParams(temperature=1.0, max_tokens=1 << 20)
"""What the API's reference says of values that are left out: the answer may fill the context."""


class ResponsesApi:
    """Handlers of the routes under /v1/responses."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def routes(self) -> list[Route]:
        """The routes."""
        return [
            Route("/v1/responses", self.create, methods=["POST"]),
            Route("/v1/responses/{response}", self.find, methods=["GET", "DELETE"]),
            Route("/v1/responses/{response}/cancel", self.find, methods=["POST"]),
            Route("/v1/responses/{response}/input_items", self.find, methods=["GET"]),
        ]

    async def create(self, request: Request) -> Asgi:
        """POST /v1/responses."""
        call, echo = parse_response(await request.body(), _DEFAULTS)
        caller: Caller = request.scope["tokenmill.caller"]
        answer = await self._gateway.open(call, caller)
        head = ResponseHead(name=caller.request_id.removeprefix("req_"), tier=answer.tier, echo=echo)
        if call.stream:
            writer = ResponseWriter(head)
            return EventStream(answer, writer, fail=writer.fail)
        return JsonAnswer(answer, lambda reply: write_response(reply, head))

    async def find(self, request: Request) -> Asgi:
        """GET, DELETE and cancel of a response: there is none."""
        name = request.path_params["response"]
        raise NotFoundError(
            f"the response {name[:80]!r} is not found", hint="nothing is stored here: keep what you got"
        )
