"""POST /v1/embeddings: texts to vectors, over the gateway like every call."""

import asyncio

from starlette.requests import Request
from starlette.routing import Route

from tokenmill.server.answering import send_json
from tokenmill.server.caller import Caller
from tokenmill.server.edge import Asgi, Receive, Scope_, Send
from tokenmill.server.gateway import Gateway
from tokenmill.wire.openai_embeddings import parse_embedding_call, shortened, write_embeddings

__all__ = ["EmbeddingsApi"]


class EmbeddingsApi:
    """The handler of /v1/embeddings."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def routes(self) -> list[Route]:
        """The route."""
        return [Route("/v1/embeddings", self.create, methods=["POST"])]

    async def create(self, request: Request) -> Asgi:
        """POST /v1/embeddings."""
        call = parse_embedding_call(await request.body())
        caller: Caller = request.scope["tokenmill.caller"]
        found = await self._gateway.embed(call.model, call.texts, caller, user=call.user, tier=call.tier)
        # A thousand vectors take long enough to be written that others would wait.
        body = await asyncio.to_thread(
            lambda: write_embeddings(
                call.model,
                shortened(found.vectors, call.dimensions),
                found.usage,
                as_base64=call.as_base64,
            )
        )

        async def answer(scope: Scope_, receive: Receive, send: Send) -> None:
            await send_json(send, 200, body)

        return answer
