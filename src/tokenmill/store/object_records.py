"""Files, batches and their lines as plain values, whatever keeps them.

A line ends in one of four states. What it came to and its line of the ledger are written together, or not at
all, by whoever holds its lease; so it is answered once, and billed once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

__all__ = [
    "Batch",
    "BatchApi",
    "BatchFault",
    "BatchOutcome",
    "BatchStatus",
    "FilePurpose",
    "Line",
    "LineEnd",
    "LineResult",
    "LineState",
    "NewLine",
    "StoredFile",
    "line_request_id",
]

BatchApi: TypeAlias = Literal["openai", "anthropic"]
"""Whose shapes a batch has."""

FilePurpose: TypeAlias = Literal["batch", "batch_output", "messages", "messages_output"]
"""What a file is for. The last two belong to message batches and are no files of the API."""

BatchOutcome: TypeAlias = Literal["completed", "cancelled", "expired", "failed"]
"""How a batch ends. `failed`: none of it was begun, or the server could not finish it."""

BatchStatus: TypeAlias = Literal["validating", "in_progress", "cancelling", "finalizing"] | BatchOutcome
"""Where a batch is."""

LineState: TypeAlias = Literal["pending", "leased", "answered", "errored", "cancelled", "expired"]
"""Where a line is: nobody has it, a worker has it, or one of its four ends."""


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file of a project. Its content lies in the folder of files, under its id."""

    id: str
    project: str
    purpose: FilePurpose
    filename: str
    num_bytes: int
    created_s: float
    expires_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class BatchFault:
    """Why a batch failed before it began: `line` counts from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Many requests that are answered when there is room. Points in time are Unix time, None: not yet.

    `outcome` is what it will be once its files are written. `num_stage_tries` counts how often reading its
    input, or writing its files, was begun in vain.
    """

    id: str
    project: str
    key_id: str
    feature: str = ""
    api: BatchApi
    endpoint: str
    status: BatchStatus = "validating"
    outcome: BatchOutcome = "completed"
    metadata: Mapping[str, str] = field(default_factory=dict)
    model: str = ""
    input_file_id: str
    output_file_id: str = ""
    error_file_id: str = ""
    created_s: float
    expires_s: float
    in_progress_s: float | None = None
    cancelling_s: float | None = None
    finalizing_s: float | None = None
    ended_s: float | None = None
    num_lines: int = 0
    num_answered: int = 0
    num_errored: int = 0
    num_cancelled: int = 0
    num_expired: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_stage_tries: int = 0
    faults: tuple[BatchFault, ...] = ()

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it will change."""
        return self.ended_s is not None


@dataclass(frozen=True, kw_only=True)
class NewLine:
    """A request of a batch: `length` bytes from `offset` on in the input file. Numbers count from 0."""

    number: int
    custom_id: str
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line that a worker holds the lease of. `num_tries` counts this one; `num_failures` have failed."""

    batch_id: str
    number: int
    custom_id: str
    offset: int
    length: int
    num_tries: int
    num_failures: int
    lease: str

    @property
    def request_id(self) -> str:
        """The name of its request, the same at each try: what the ledger knows it by."""
        return line_request_id(self.batch_id, self.number)


def line_request_id(batch_id: str, number: int) -> str:
    """The name of the request that a line is, from the batch and the line alone."""
    return f"{batch_id}_{number}"


@dataclass(frozen=True, kw_only=True)
class LineEnd:
    """How a lease ends. `pending`: given back, to be tried again, `has_failed` if that counts as a failure.

    `status` and `body` are the HTTP answer of a line that was answered or refused.
    """

    state: LineState
    status: int = 0
    body: bytes = b""
    has_failed: bool = False


@dataclass(frozen=True, kw_only=True)
class LineResult:
    """What a line came to."""

    number: int
    custom_id: str
    state: LineState
    status: int
    body: bytes
