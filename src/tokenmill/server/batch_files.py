"""What a batch reads and writes: its input file to lines of the store, rows of the store to its files.

Rows are read some at a time, and files written beside the others and renamed when they are whole, under names
that the batch was given before: writing them again after a crash makes the same files.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from tokenmill.core import NotFoundError
from tokenmill.server.batch_lines import InputReader, output_line
from tokenmill.server.files import Draft, FileFolder, FilesConfig
from tokenmill.store import Batch, FilePurpose, Line, LineResult, NewLine, ObjectStore, StoredFile

__all__ = ["BatchFiles"]

_PAGE: Final = 200


class BatchFiles:
    """The files of all batches, in a folder. `now_s` gives Unix time."""

    def __init__(
        self, objects: ObjectStore, folder: FileFolder, config: FilesConfig, now_s: Callable[[], float]
    ) -> None:
        self.objects = objects
        self.folder = folder
        self.config = config
        self._now_s = now_s

    async def sweep(self) -> int:
        """Remove content that no file names; returns how many. Before anything else is begun."""
        return await asyncio.to_thread(self.folder.sweep, await self.objects.file_ids())

    async def forget_expired(self, now_s: float) -> None:
        """Remove files whose time is over."""
        for file in await self.objects.expired_files(now_s):
            await self.objects.delete_file(file.project, file.id)
            await asyncio.to_thread(self.folder.remove, file.id)

    async def read(self, batch: Batch) -> None:
        """Make lines of its input, and start it; or end it with what is wrong with its input.

        Lines that an earlier try has kept are not written again, so that each try gets further.
        """
        last = await self.objects.last_line(batch.id)
        reader = InputReader(self.folder.path(batch.input_file_id), batch.endpoint, self.config)
        chunks = reader.chunks()

        def next_chunk() -> list[NewLine] | None:
            return next(chunks, None)

        while (chunk := await asyncio.to_thread(next_chunk)) is not None:
            if not reader.faults and chunk[-1].number > last:
                await self.objects.add_lines(batch.id, chunk)
        if reader.faults:
            await self.objects.fail_batch(batch.id, reader.faults, self._now_s())
        else:
            await self.objects.start_batch(batch.id, batch.model or reader.model, self._now_s())

    async def line(self, batch: Batch, line: Line) -> bytes:
        """The bytes of a line in the input."""
        path = self.folder.path(batch.input_file_id)

        def read() -> bytes:
            with path.open("rb") as file:
                file.seek(line.offset)
                return file.read(line.length)

        try:
            return await asyncio.to_thread(read)
        except FileNotFoundError:
            raise NotFoundError("the content of the input file is gone") from None

    async def write(self, batch: Batch) -> None:
        """Write its output and its errors, and end it."""
        output = await asyncio.to_thread(self.folder.draft)
        errors = await asyncio.to_thread(self.folder.draft)
        try:
            after = -1
            while page := await self.objects.results(batch.id, after, _PAGE):
                await asyncio.to_thread(_write_page, batch, page, output, errors)
                after = page[-1].number
            files = [
                await self._keep(batch, output, batch.output_file_id, "output"),
                await self._keep(batch, errors, batch.error_file_id, "error"),
            ]
            await self.objects.end_batch(batch, [each for each in files if each], self._now_s())
        finally:
            output.drop()
            errors.drop()
        while await self.objects.clear_lines(batch.id):
            await asyncio.sleep(0)

    async def _keep(self, batch: Batch, draft: Draft, file_id: str, what: str) -> StoredFile | None:
        """Make a draft a file; None if it is empty."""
        if not draft.num_bytes:
            return None
        await asyncio.to_thread(draft.keep, file_id)
        purpose: FilePurpose = "messages_output" if batch.api == "anthropic" else "batch_output"
        return StoredFile(
            id=file_id,
            project=batch.project,
            purpose=purpose,
            filename=f"{batch.id}_{what}.jsonl",
            num_bytes=draft.num_bytes,
            created_s=self._now_s(),
        )


def _write_page(batch: Batch, page: Sequence[LineResult], output: Draft, errors: Draft) -> None:
    for result in page:
        is_output = batch.api == "anthropic" or result.state == "answered"
        (output if is_output else errors).write(output_line(batch, result))
