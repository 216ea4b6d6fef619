"""An endpoint under load: each request is one streamed call, with no retry and no bound of its own."""

from collections.abc import AsyncGenerator, AsyncIterator

from tokenmill.core import EndpointError, Message
from tokenmill.evals.load.target import Finish, LoadRequest, Piece, StreamEvent
from tokenmill.remote import RemoteClient
from tokenmill.wire import Call, TextPiece, ToolPiece, Totals
from tokenmill.wire import Finish as WireFinish

__all__ = ["RemoteTarget"]


class RemoteTarget:
    """A `Target` at a URL: conversations of one message, or with `is_chat` False plain prompts to continue.

    Pieces have the time at which their bytes arrived. Token counts are the endpoint's own, if it gives any.
    """

    def __init__(self, client: RemoteClient, *, is_chat: bool = True) -> None:
        self._client = client
        self._is_chat = is_chat

    async def stream(self, request: LoadRequest) -> AsyncIterator[StreamEvent]:
        """Send a request. Raises what `RemoteClient.stream` does."""
        messages = (Message(role="user", content=request.text),) if self._is_chat else ()
        call = Call(
            model=self._client.endpoint.model,
            messages=messages,
            prompts=() if self._is_chat else (request.text,),
            params=request.params,
            stream=True,
            include_usage=True,
        )
        reason, usage, at_s = "", None, 0.0
        stream = self._client.stream(call)
        try:
            async for at_s, piece in stream:
                if (isinstance(piece, TextPiece) and piece.text) or isinstance(piece, ToolPiece):
                    yield Piece(at_s)
                elif isinstance(piece, WireFinish):
                    if piece.error:
                        raise EndpointError(piece.error)
                    reason = piece.finish_reason
                elif isinstance(piece, Totals):
                    usage = piece.usage
        finally:
            if isinstance(stream, AsyncGenerator):
                await stream.aclose()
        if usage is None:
            yield Finish(at_s, reason)
        else:
            yield Finish(
                at_s, reason, usage.num_prompt_tokens, usage.num_cached_tokens, usage.num_output_tokens
            )
