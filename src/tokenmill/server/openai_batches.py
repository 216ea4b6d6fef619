"""Files and batches of the OpenAI API."""

import asyncio
import hashlib
from typing import Any, Final, Literal

import msgspec
from starlette.requests import Request
from starlette.routing import Route

from tokenmill.core import NotFoundError
from tokenmill.server.batch_room import BatchRoom, JsonBody, caller_of, number_of
from tokenmill.server.edge import Asgi
from tokenmill.server.files import Draft, FileAnswer, Upload, new_id, receive_form
from tokenmill.server.idempotency import Repeated, once
from tokenmill.store import Batch, FilePurpose, StoredFile
from tokenmill.wire import FieldError
from tokenmill.wire.fields import decode_request

__all__ = ["OpenAIBatches"]

_PURPOSES: Final[tuple[FilePurpose, ...]] = ("batch", "batch_output")
_FILE_LIFE_S: Final = 30 * 86400
_LIFE_RANGE_S: Final = (3600, 30 * 86400)
_FIELDS: Final = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
_MAX_PAGE: Final = 100
_MAX_FILES_PAGE: Final = 10_000


class _NewBatch(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    input_file_id: str
    endpoint: str
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = None


class OpenAIBatches:
    """Handlers of /v1/files and /v1/batches."""

    def __init__(self, room: BatchRoom) -> None:
        self._room = room

    def routes(self) -> list[Route]:
        """The routes."""
        return [
            Route("/v1/files", self.upload, methods=["POST"]),
            Route("/v1/files", self.files, methods=["GET"]),
            Route("/v1/files/{id}", self.file, methods=["GET"]),
            Route("/v1/files/{id}", self.delete, methods=["DELETE"]),
            Route("/v1/files/{id}/content", self.content, methods=["GET"]),
            Route("/v1/batches", self.create, methods=["POST"]),
            Route("/v1/batches", self.batches, methods=["GET"]),
            Route("/v1/batches/{id}", self.batch, methods=["GET"]),
            Route("/v1/batches/{id}/cancel", self.cancel, methods=["POST"]),
        ]

    async def upload(self, request: Request) -> Asgi:
        """POST /v1/files."""
        files = self._room.files
        draft = await asyncio.to_thread(files.folder.draft)
        try:
            upload = await receive_form(request, draft, files.config)
            return await self._keep(request, upload, draft)
        except Repeated as repeated:
            return repeated
        finally:
            draft.drop()

    async def _keep(self, request: Request, upload: Upload, draft: Draft) -> Asgi:
        """Make what was uploaded a file."""
        files, project = self._room.files, caller_of(request).key.project
        now_s = self._room.now_s()
        file = StoredFile(
            id=new_id("file-"),
            project=project,
            purpose="batch",
            filename=upload.filename,
            num_bytes=draft.num_bytes,
            created_s=now_s,
            expires_s=now_s + _life_s(upload.fields),
        )
        fields = [upload.filename, *(f"{name}={value}" for name, value in sorted(upload.fields.items()))]
        digest = hashlib.sha256("\0".join(fields).encode() + draft.digest).digest()
        async with once(self._room.store, request, digest, now_s) as first:
            body = JsonBody(_file(file))
            await asyncio.to_thread(draft.keep, file.id)
            try:
                max_bytes = files.config.max_project_bytes
                await files.objects.add_file(file, max_bytes, first.answered(200, body.body))
            except BaseException:
                await asyncio.to_thread(files.folder.remove, file.id)
                raise
            return body

    async def files(self, request: Request) -> Asgi:
        """GET /v1/files."""
        order = request.query_params.get("order", "desc")
        if order not in ("asc", "desc"):
            raise FieldError("order", f"it is {order[:40]!r}", hint="use asc or desc")
        purpose = request.query_params.get("purpose")
        limit = number_of(request, "limit", _MAX_FILES_PAGE, _MAX_FILES_PAGE)
        found = await self._room.objects.files(
            caller_of(request).key.project,
            [each for each in _PURPOSES if purpose in (None, each)] or ["batch"],
            after=request.query_params.get("after", ""),
            limit=limit + 1,
            newest_first=order == "desc",
        )
        if purpose is not None and purpose not in _PURPOSES:
            found = []
        return JsonBody(_page([_file(each) for each in found], limit))

    async def file(self, request: Request) -> Asgi:
        """GET /v1/files/{id}."""
        return JsonBody(_file(await self._file(request)))

    async def content(self, request: Request) -> Asgi:
        """GET /v1/files/{id}/content."""
        file = await self._file(request)
        return FileAnswer(self._room.files.folder.path(file.id))

    async def delete(self, request: Request) -> Asgi:
        """DELETE /v1/files/{id}."""
        file = await self._file(request)
        await self._room.objects.delete_file(file.project, file.id)
        await asyncio.to_thread(self._room.files.folder.remove, file.id)
        return JsonBody({"id": file.id, "object": "file", "deleted": True})

    async def create(self, request: Request) -> Asgi:
        """POST /v1/batches."""
        room, caller = self._room, caller_of(request)
        body = await request.body()
        asked = decode_request(body, _NewBatch)
        metadata = _checked_metadata(asked.metadata or {})
        endpoints = [each for each in room.runner.endpoints if each != "/v1/messages"]
        if asked.endpoint not in endpoints:
            hint = f"use {', '.join(endpoints)}"
            raise FieldError("endpoint", f"{asked.endpoint[:80]!r} is for no batch", hint=hint)
        room.check_tier(caller)
        now_s = room.now_s()
        batch = Batch(
            id=new_id("batch_"),
            project=caller.key.project,
            key_id=caller.key.id,
            feature=caller.feature,
            api="openai",
            endpoint=asked.endpoint,
            metadata=metadata,
            input_file_id=asked.input_file_id,
            created_s=now_s,
            expires_s=now_s + room.config.window_s,
        )
        try:
            async with once(room.store, request, hashlib.sha256(body).digest(), now_s) as first:
                answer = JsonBody(_batch(batch))
                answered = first.answered(200, answer.body)
                await room.objects.add_batch(batch, room.config.max_open, answered=answered)
        except Repeated as repeated:
            return repeated
        room.worker.wake()
        return answer

    async def batches(self, request: Request) -> Asgi:
        """GET /v1/batches."""
        limit = number_of(request, "limit", 20, _MAX_PAGE)
        after = request.query_params.get("after", "")
        found = await self._room.objects.batches(
            caller_of(request).key.project, "openai", after=after, limit=limit + 1
        )
        return JsonBody(_page([_batch(each) for each in found], limit))

    async def batch(self, request: Request) -> Asgi:
        """GET /v1/batches/{id}."""
        return JsonBody(_batch(await self._batch(request)))

    async def cancel(self, request: Request) -> Asgi:
        """POST /v1/batches/{id}/cancel."""
        batch = await self._batch(request)
        if batch.has_ended and batch.status != "cancelled":
            raise FieldError("", f"the batch is {batch.status} already", hint="nothing is left to cancel")
        now_s = self._room.now_s()
        await self._room.objects.cancel_batch(batch.project, batch.id, "openai", now_s)
        self._room.worker.wake()
        return JsonBody(_batch(await self._batch(request)))

    async def _file(self, request: Request) -> StoredFile:
        project, file_id = caller_of(request).key.project, request.path_params["id"]
        file = await self._room.objects.file(project, file_id)
        if file.purpose not in _PURPOSES:
            raise NotFoundError(f"there is no file {file_id[:80]!r}", hint="list those that there are")
        return file

    async def _batch(self, request: Request) -> Batch:
        project, batch_id = caller_of(request).key.project, request.path_params["id"]
        return await self._room.objects.batch(project, batch_id, "openai")


def _life_s(fields: dict[str, str]) -> float:
    """For how long a file is kept. Raises FieldError for a field of the form that cannot be."""
    for name in fields:
        if name not in _FIELDS:
            raise FieldError(name[:80], "this field is not known", hint=f"use file, {', '.join(_FIELDS)}")
    if fields.get("purpose") != "batch":
        purpose = fields.get("purpose")
        message = "is missing" if purpose is None else f"it is {purpose[:40]!r}"
        raise FieldError("purpose", message, hint="files are for batches here: use batch")
    if fields.get("expires_after[anchor]", "created_at") != "created_at":
        raise FieldError("expires_after[anchor]", "cannot be used", hint="use created_at")
    text = fields.get("expires_after[seconds]", str(_FILE_LIFE_S))
    low, high = _LIFE_RANGE_S
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not low <= int(text) <= high:
        raise FieldError("expires_after[seconds]", f"it is {text[:40]!r}", hint=f"use {low} to {high}")
    return float(text)


def _checked_metadata(metadata: dict[str, str]) -> dict[str, str]:
    too_long = any(len(name) > 64 or len(value) > 512 for name, value in metadata.items())
    if len(metadata) > 16 or too_long:
        hint = "at most 16 names of up to 64 characters, with values of up to 512"
        raise FieldError("metadata", "is too large", hint=hint)
    return metadata


def _page(items: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """A page of a list, of items of which there may be one more than asked."""
    shown = items[:limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(items) > limit,
    }


def _file(file: StoredFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": int(file.created_s),
        "expires_at": _seconds(file.expires_s),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def _batch(batch: Batch) -> dict[str, Any]:
    ended = {each: batch.ended_s if batch.status == each else None for each in ("completed", "failed")}
    faults = [
        {"code": each.code, "message": each.message, "param": each.param, "line": each.line}
        for each in batch.faults
    ]
    has_files = batch.has_ended
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model or None,
        "errors": {"object": "list", "data": faults} if faults else None,
        "input_file_id": batch.input_file_id,
        "completion_window": "24h",
        "status": batch.status,
        "output_file_id": batch.output_file_id or None if has_files else None,
        "error_file_id": batch.error_file_id or None if has_files else None,
        "created_at": int(batch.created_s),
        "in_progress_at": _seconds(batch.in_progress_s),
        "expires_at": int(batch.expires_s),
        "finalizing_at": _seconds(batch.finalizing_s),
        "completed_at": _seconds(ended["completed"]),
        "failed_at": _seconds(ended["failed"]),
        "expired_at": _seconds(batch.ended_s if batch.status == "expired" else None),
        "cancelling_at": _seconds(batch.cancelling_s),
        "cancelled_at": _seconds(batch.ended_s if batch.status == "cancelled" else None),
        "request_counts": {
            "total": batch.num_lines,
            "completed": batch.num_answered,
            "failed": batch.num_errored,
        },
        "usage": {
            "input_tokens": batch.num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": batch.num_cached_tokens},
            "output_tokens": batch.num_output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": batch.num_prompt_tokens + batch.num_output_tokens,
        },
        "metadata": dict(batch.metadata) or None,
    }


def _seconds(at_s: float | None) -> int | None:
    return None if at_s is None else int(at_s)
