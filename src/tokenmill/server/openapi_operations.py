"""What the document says of each route: its body's type, its answer, its parameters.

A route that is not here is described by its path and method alone (`openapi`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from tokenmill.server.openapi_answers import Schema
from tokenmill.wire.anthropic_types import CountTokensRequest, MessagesRequest
from tokenmill.wire.openai_embeddings import EMBEDDING_REQUEST
from tokenmill.wire.openai_parse import CHAT_REQUEST, COMPLETION_REQUEST
from tokenmill.wire.responses_parse import RESPONSE_REQUEST

__all__ = ["OPERATIONS", "Operation"]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One method of one path. `body` is the type of its JSON, or a schema of it; `answer` names a schema.

    `streams` with `"stream": true`. `answer_type` is the media type, `also` are further statuses of errors.
    `example` is a body without its model. `prefix` is put before the names of its types that begin with `_`.
    """

    name: str
    summary: str
    tag: str
    api: Literal["openai", "anthropic", "both"] = "openai"
    body: type | Schema | None = None
    body_type: str = "application/json"
    answer: str = "anything"
    answer_type: str = "application/json"
    streams: bool = False
    query: Mapping[str, Schema] = field(default_factory=dict)
    also: tuple[int, ...] = ()
    example: Schema | None = None
    is_call: bool = False
    prefix: str = "OpenAI"


def _limit(most: int) -> Schema:
    return {"type": "integer", "minimum": 1, "maximum": most}


_TEXT: Final[Schema] = {"type": "string"}
_OF_ANTHROPIC: Final[Schema] = {**_TEXT, "description": "Of Anthropic's API; passed over elsewhere"}
_NEW_BATCH: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "input_file_id": {"type": "string"},
        "endpoint": {"type": "string"},
        "completion_window": {"enum": ["24h"]},
        "metadata": {
            "anyOf": [
                {"type": "object", "additionalProperties": {"type": "string", "maxLength": 512}},
                {"type": "null"},
            ]
        },
    },
    "required": ["input_file_id", "endpoint", "completion_window"],
    "additionalProperties": False,
}
_UPLOAD: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": ["batch"]},
    },
    "required": ["file", "purpose"],
}
_OBJECT: Final[dict[str, Any]] = {"type": "object"}
_TURNS: Final = [{"role": "user", "content": "Count."}]

OPERATIONS: Final[Mapping[tuple[str, str], Operation]] = {
    ("POST", "/v1/chat/completions"): Operation(
        name="createChatCompletion", summary="Answer a conversation", tag="OpenAI",
        body=CHAT_REQUEST, answer="chat", streams=True, is_call=True,
        example={"messages": _TURNS, "max_completion_tokens": 16},
    ),
    ("POST", "/v1/completions"): Operation(
        name="createCompletion", summary="Continue a text", tag="OpenAI",
        body=COMPLETION_REQUEST, answer="completion", streams=True, is_call=True,
        example={"prompt": "Count:", "max_tokens": 16},
    ),
    ("POST", "/v1/responses"): Operation(
        name="createResponse", summary="Answer a conversation, as a response", tag="OpenAI",
        body=RESPONSE_REQUEST, prefix="Responses", answer="response", streams=True, is_call=True,
        example={"input": "Count.", "max_output_tokens": 16},
    ),
    ("GET", "/v1/responses/{response}"): Operation(
        name="getResponse", summary="Always 404: none is stored", tag="OpenAI", also=(404,),
    ),
    ("DELETE", "/v1/responses/{response}"): Operation(
        name="deleteResponse", summary="Always 404: none is stored", tag="OpenAI", also=(404,),
    ),
    ("POST", "/v1/responses/{response}/cancel"): Operation(
        name="cancelResponse", summary="Always 404: none is stored", tag="OpenAI", also=(404,),
    ),
    ("GET", "/v1/responses/{response}/input_items"): Operation(
        name="getInputItems", summary="Always 404: none is stored", tag="OpenAI", also=(404,),
    ),
    ("POST", "/v1/embeddings"): Operation(
        name="createEmbedding", summary="Vectors of texts", tag="OpenAI",
        body=EMBEDDING_REQUEST, prefix="Embeddings", answer="embeddings", is_call=True,
        example={"input": "Count."},
    ),
    ("GET", "/v1/models"): Operation(
        name="listModels", summary="What is served, in the shape of the API of the request's headers",
        tag="Models", api="both", answer="models",
        query={"limit": _OF_ANTHROPIC, "after_id": _OF_ANTHROPIC, "before_id": _OF_ANTHROPIC},
    ),
    ("GET", "/v1/models/{model}"): Operation(
        name="getModel", summary="One model", tag="Models", api="both", answer="model", also=(404,),
    ),
    ("POST", "/v1/messages"): Operation(
        name="createMessage", summary="Answer a conversation", tag="Anthropic", api="anthropic",
        body=MessagesRequest, answer="message", streams=True, is_call=True,
        example={"messages": _TURNS, "max_tokens": 16},
    ),
    ("POST", "/v1/messages/count_tokens"): Operation(
        name="countTokens", summary="The tokens of a prompt, by the model's template", tag="Anthropic",
        api="anthropic", body=CountTokensRequest, answer="input_tokens", is_call=True,
        example={"messages": _TURNS},
    ),
    ("POST", "/v1/messages/batches"): Operation(
        name="createMessageBatch", summary="Answer many conversations later", tag="Anthropic",
        api="anthropic", body=_OBJECT, answer="message_batch", is_call=True, also=(409,),
    ),
    ("GET", "/v1/messages/batches"): Operation(
        name="listMessageBatches", summary="Batches, the newest first", tag="Anthropic", api="anthropic",
        answer="message_batches",
        query={"limit": _limit(1000), "after_id": _TEXT, "before_id": _TEXT},
    ),
    ("GET", "/v1/messages/batches/{id}"): Operation(
        name="getMessageBatch", summary="One batch", tag="Anthropic", api="anthropic",
        answer="message_batch", also=(404,),
    ),
    ("DELETE", "/v1/messages/batches/{id}"): Operation(
        name="deleteMessageBatch", summary="Forget a batch that has ended", tag="Anthropic",
        api="anthropic", answer="deleted", also=(404, 409),
    ),
    ("POST", "/v1/messages/batches/{id}/cancel"): Operation(
        name="cancelMessageBatch", summary="Give up what is not answered yet", tag="Anthropic",
        api="anthropic", answer="message_batch", also=(404, 409),
    ),
    ("GET", "/v1/messages/batches/{id}/results"): Operation(
        name="getMessageBatchResults", summary="One line an answer", tag="Anthropic", api="anthropic",
        answer_type="application/x-jsonl", also=(404,),
    ),
    ("POST", "/v1/files"): Operation(
        name="createFile", summary="Upload the lines of a batch", tag="OpenAI", body=_UPLOAD,
        body_type="multipart/form-data", answer="file", also=(409, 429),
    ),
    ("GET", "/v1/files"): Operation(
        name="listFiles", summary="Files of the key's project", tag="OpenAI", answer="files",
        query={
            "limit": _limit(10_000), "after": _TEXT, "purpose": _TEXT,
            "order": {"type": "string", "enum": ["asc", "desc"]},
        },
    ),
    ("GET", "/v1/files/{id}"): Operation(
        name="getFile", summary="One file", tag="OpenAI", answer="file", also=(404,),
    ),
    ("DELETE", "/v1/files/{id}"): Operation(
        name="deleteFile", summary="Delete a file", tag="OpenAI", answer="deleted", also=(404, 409),
    ),
    ("GET", "/v1/files/{id}/content"): Operation(
        name="getFileContent", summary="A file's bytes", tag="OpenAI",
        answer_type="application/jsonl", also=(404,),
    ),
    ("POST", "/v1/batches"): Operation(
        name="createBatch", summary="Answer the lines of a file later", tag="OpenAI", body=_NEW_BATCH,
        answer="batch", is_call=True, also=(409,),
    ),
    ("GET", "/v1/batches"): Operation(
        name="listBatches", summary="Batches, the newest first", tag="OpenAI", answer="batches",
        query={"limit": _limit(100), "after": _TEXT},
    ),
    ("GET", "/v1/batches/{id}"): Operation(
        name="getBatch", summary="One batch", tag="OpenAI", answer="batch", also=(404,),
    ),
    ("POST", "/v1/batches/{id}/cancel"): Operation(
        name="cancelBatch", summary="Give up what is not answered yet", tag="OpenAI", answer="batch",
        also=(404, 409),
    ),
    ("GET", "/health"): Operation(
        name="getHealth", summary="Whether it takes calls", tag="Operations", answer="health",
    ),
    ("GET", "/health/live"): Operation(
        name="getLive", summary="Whether the process turns", tag="Operations", answer="health",
    ),
    ("GET", "/health/ready"): Operation(
        name="getReady", summary="Whether it takes calls", tag="Operations", answer="health",
    ),
    ("GET", "/health/drained"): Operation(
        name="getDrained", summary="Whether nothing is left to do", tag="Operations", answer="health",
    ),
    ("GET", "/metrics"): Operation(
        name="getMetrics", summary="Counts for Prometheus", tag="Operations", answer_type="text/plain",
    ),
    ("GET", "/"): Operation(
        name="getDashboard", summary="The dashboard", tag="Operations", answer_type="text/html",
    ),
    ("GET", "/dashboard/data.json"): Operation(
        name="getDashboardData", summary="What the dashboard shows", tag="Operations",
    ),
    ("GET", "/dashboard/style.css"): Operation(
        name="getDashboardStyle", summary="A part of the dashboard", tag="Operations",
        answer_type="text/css",
    ),
    ("GET", "/dashboard/app.js"): Operation(
        name="getDashboardScript", summary="A part of the dashboard", tag="Operations",
        answer_type="text/javascript",
    ),
    ("GET", "/openapi.json"): Operation(
        name="getOpenApi", summary="This document", tag="Operations",
    ),
}  # fmt: skip
"""What is known of each route."""
