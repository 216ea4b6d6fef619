"""Message batches of the Anthropic API."""

import asyncio
import datetime
from typing import Any, Final

from starlette.requests import Request
from starlette.routing import Route

from tokenmill.core import NotFoundError
from tokenmill.server.batch_lines import write_requests
from tokenmill.server.batch_room import BatchRoom, JsonBody, caller_of, number_of
from tokenmill.server.edge import Asgi
from tokenmill.server.files import Draft, FileAnswer, new_id, receive_body
from tokenmill.server.idempotency import Repeated, once
from tokenmill.store import Batch, StoredFile
from tokenmill.wire import FieldError

__all__ = ["AnthropicBatches"]

_PATH: Final = "/v1/messages/batches"
_MAX_PAGE: Final = 1000


class AnthropicBatches:
    """Handlers of /v1/messages/batches."""

    def __init__(self, room: BatchRoom) -> None:
        self._room = room

    def routes(self) -> list[Route]:
        """The routes."""
        return [
            Route(_PATH, self.create, methods=["POST"]),
            Route(_PATH, self.batches, methods=["GET"]),
            Route(f"{_PATH}/{{id}}", self.batch, methods=["GET"]),
            Route(f"{_PATH}/{{id}}", self.delete, methods=["DELETE"]),
            Route(f"{_PATH}/{{id}}/cancel", self.cancel, methods=["POST"]),
            Route(f"{_PATH}/{{id}}/results", self.results, methods=["GET"]),
        ]

    async def create(self, request: Request) -> Asgi:
        """POST /v1/messages/batches."""
        files = self._room.files
        self._room.check_tier(caller_of(request))
        received = await asyncio.to_thread(files.folder.draft)
        draft = await asyncio.to_thread(files.folder.draft)
        try:
            await receive_body(request, received, files.config)
            received.flush()
            model = await asyncio.to_thread(write_requests, received.path, draft, files.config)
            return await self._keep(request, model, draft, received.digest)
        except Repeated as repeated:
            return repeated
        finally:
            received.drop()
            draft.drop()

    async def _keep(self, request: Request, model: str, draft: Draft, digest: bytes) -> Asgi:
        """Make a batch of the requests in a draft."""
        room, caller = self._room, caller_of(request)
        now_s = room.now_s()
        file = StoredFile(
            id=new_id("file-"),
            project=caller.key.project,
            purpose="messages",
            filename="requests.jsonl",
            num_bytes=draft.num_bytes,
            created_s=now_s,
        )
        batch = Batch(
            id=new_id("msgbatch_"),
            project=caller.key.project,
            key_id=caller.key.id,
            feature=caller.feature,
            api="anthropic",
            endpoint="/v1/messages",
            model=model,
            input_file_id=file.id,
            created_s=now_s,
            expires_s=now_s + room.config.window_s,
            num_lines=draft.num_lines,
        )
        async with once(room.store, request, digest, now_s) as first:
            answer = JsonBody(_batch(batch, request))
            await asyncio.to_thread(draft.keep, file.id)
            try:
                answered = first.answered(200, answer.body)
                await room.objects.add_batch(batch, room.config.max_open, file=file, answered=answered)
            except BaseException:
                await asyncio.to_thread(room.files.folder.remove, file.id)
                raise
        room.worker.wake()
        return answer

    async def batches(self, request: Request) -> Asgi:
        """GET /v1/messages/batches, the newest first."""
        limit = number_of(request, "limit", 20, _MAX_PAGE)
        after, before = (request.query_params.get(name, "") for name in ("after_id", "before_id"))
        if after and before:
            raise FieldError("before_id", "only one of after_id and before_id can be given")
        found = await self._room.objects.batches(
            caller_of(request).key.project,
            "anthropic",
            after=after or before,
            limit=limit + 1,
            newest_first=not before,
        )
        shown = found[:limit]
        if before:
            shown.reverse()
        return JsonBody(
            {
                "data": [_batch(each, request) for each in shown],
                "has_more": len(found) > limit,
                "first_id": shown[0].id if shown else None,
                "last_id": shown[-1].id if shown else None,
            }
        )

    async def batch(self, request: Request) -> Asgi:
        """GET /v1/messages/batches/{id}."""
        return JsonBody(_batch(await self._batch(request), request))

    async def cancel(self, request: Request) -> Asgi:
        """POST /v1/messages/batches/{id}/cancel."""
        batch = await self._batch(request)
        if batch.has_ended:
            raise FieldError("", "the batch has ended already", hint="nothing is left to cancel")
        now_s = self._room.now_s()
        await self._room.objects.cancel_batch(batch.project, batch.id, "anthropic", now_s)
        self._room.worker.wake()
        return JsonBody(_batch(await self._batch(request), request))

    async def delete(self, request: Request) -> Asgi:
        """DELETE /v1/messages/batches/{id}."""
        batch = await self._batch(request)
        for file_id in await self._room.objects.delete_batch(batch.project, batch.id, "anthropic"):
            await asyncio.to_thread(self._room.files.folder.remove, file_id)
        return JsonBody({"id": batch.id, "type": "message_batch_deleted"})

    async def results(self, request: Request) -> Asgi:
        """GET /v1/messages/batches/{id}/results."""
        batch = await self._batch(request)
        if not batch.has_ended or not batch.output_file_id:
            raise NotFoundError("this batch has no results yet", hint="wait until it has ended")
        return FileAnswer(self._room.files.folder.path(batch.output_file_id), b"application/x-jsonl")

    async def _batch(self, request: Request) -> Batch:
        project, batch_id = caller_of(request).key.project, request.path_params["id"]
        return await self._room.objects.batch(project, batch_id, "anthropic")


def _batch(batch: Batch, request: Request) -> dict[str, Any]:
    """Counts move on at the end only, as that API has it."""
    has_ended = batch.has_ended
    status = "ended" if has_ended else "canceling" if batch.cancelling_s is not None else "in_progress"
    failed = batch.num_lines if batch.status == "failed" else batch.num_errored
    counts = {
        "succeeded": batch.num_answered,
        "errored": failed,
        "canceled": batch.num_cancelled,
        "expired": batch.num_expired,
    }
    return {
        "id": batch.id,
        "type": "message_batch",
        "processing_status": status,
        "request_counts": {
            "processing": 0 if has_ended else batch.num_lines,
            **{name: count if has_ended else 0 for name, count in counts.items()},
        },
        "created_at": _time(batch.created_s),
        "expires_at": _time(batch.expires_s),
        "ended_at": _time(batch.ended_s),
        "cancel_initiated_at": _time(batch.cancelling_s),
        "archived_at": None,
        "results_url": _results_url(batch, request) if has_ended and batch.output_file_id else None,
    }


def _results_url(batch: Batch, request: Request) -> str:
    """Under the name by which the client called us."""
    scheme = request.scope.get("scheme", "http")
    host = request.headers.get("host", "")
    return f"{scheme}://{host}{_PATH}/{batch.id}/results"


def _time(at_s: float | None) -> str | None:
    if at_s is None:
        return None
    return datetime.datetime.fromtimestamp(at_s, datetime.UTC).isoformat(timespec="milliseconds")
