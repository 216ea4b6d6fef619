"""OpenAI and Anthropic shapes to and from `core`: one codec for what calls endpoints and for what is one."""

from tokenmill.wire.anthropic_answer import AnthropicHead, AnthropicWriter, write_anthropic_reply
from tokenmill.wire.anthropic_parse import parse_anthropic_call, parse_anthropic_count
from tokenmill.wire.anthropic_read import AnthropicReader, read_anthropic_reply
from tokenmill.wire.anthropic_write import write_anthropic_call
from tokenmill.wire.call import Api, Call, Prompt, ToolChoice
from tokenmill.wire.embedding import read_openai_embeddings, write_openai_embeddings
from tokenmill.wire.errors import (
    UnknownModelError,
    error_of,
    retry_after,
    status_of,
    stream_error,
    write_error,
    write_stream_error,
)
from tokenmill.wire.fields import FieldError, quoted
from tokenmill.wire.openai_answer import OpenAIHead, OpenAIWriter, write_openai_reply
from tokenmill.wire.openai_parse import parse_openai_chat, parse_openai_completion
from tokenmill.wire.openai_read import OpenAIReader, read_models, read_openai_reply
from tokenmill.wire.openai_write import write_openai_call
from tokenmill.wire.reply import (
    Begin,
    CallText,
    Choice,
    Finish,
    Piece,
    Reply,
    ReplyBuilder,
    TextPiece,
    TokenText,
    ToolPiece,
    Totals,
    reply_of,
)
from tokenmill.wire.sse import SseEvent, SseParser, encode_sse

__all__ = [
    "AnthropicHead",
    "AnthropicReader",
    "AnthropicWriter",
    "Api",
    "Begin",
    "Call",
    "CallText",
    "Choice",
    "FieldError",
    "Finish",
    "OpenAIHead",
    "OpenAIReader",
    "OpenAIWriter",
    "Piece",
    "Prompt",
    "Reply",
    "ReplyBuilder",
    "SseEvent",
    "SseParser",
    "TextPiece",
    "TokenText",
    "ToolChoice",
    "ToolPiece",
    "Totals",
    "UnknownModelError",
    "encode_sse",
    "error_of",
    "parse_anthropic_call",
    "parse_anthropic_count",
    "parse_openai_chat",
    "parse_openai_completion",
    "quoted",
    "read_anthropic_reply",
    "read_models",
    "read_openai_embeddings",
    "read_openai_reply",
    "reply_of",
    "retry_after",
    "status_of",
    "stream_error",
    "write_anthropic_call",
    "write_anthropic_reply",
    "write_error",
    "write_openai_call",
    "write_openai_embeddings",
    "write_openai_reply",
    "write_stream_error",
]
