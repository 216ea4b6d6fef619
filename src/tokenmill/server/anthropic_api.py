"""The Anthropic API: messages and count_tokens. Thin: a body to a call, an answer to bytes."""

from typing import Final

from starlette.requests import Request
from starlette.routing import Route

from tokenmill.core import SamplingParams
from tokenmill.server.answering import EventStream, JsonAnswer
from tokenmill.server.caller import Caller
from tokenmill.server.edge import Asgi
from tokenmill.server.gateway import Gateway
from tokenmill.wire import AnthropicWriter, parse_anthropic_call, write_anthropic_reply

__all__ = ["AnthropicApi"]

_DEFAULTS: Final = SamplingParams(temperature=1.0)


class AnthropicApi:
    """Handlers of the routes under /v1 that Anthropic's clients use."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def routes(self) -> list[Route]:
        """The routes."""
        return [Route("/v1/messages", self.messages, methods=["POST"])]

    async def messages(self, request: Request) -> Asgi:
        """POST /v1/messages."""
        call = parse_anthropic_call(await request.body(), _DEFAULTS)
        caller: Caller = request.scope["tokenmill.caller"]
        answer = await self._gateway.open(call, caller)
        if call.stream:
            return EventStream(answer, AnthropicWriter(answer.num_prompt_tokens))
        return JsonAnswer(answer, write_anthropic_reply)
