"""The OpenAPI 3.1 document of everything that is served, made of the types that read the requests.

Bounds of numbers that a type does not say are those of `core.SamplingParams`, by the field's name: a test
asks for each bound's neighbours and must be refused.
"""

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.routing import Route

from tokenmill.core.sampling import MAX_COMPLETIONS, MAX_LOGPROBS, MAX_STOP_STRINGS
from tokenmill.server.answering import send_json
from tokenmill.server.edge import Asgi, Receive, Scope_, Send
from tokenmill.server.openapi_answers import ANSWERS, ERROR_SCHEMAS
from tokenmill.server.openapi_operations import OPERATIONS, Operation
from tokenmill.wire.fields import encode_json

__all__ = ["OpenApi", "bounds_of", "document_of"]

_PARAMETER: Final = re.compile(r"\{(\w+)(?::\w+)?\}")
_REF: Final = "#/components/schemas/"
_MOST_TOKENS: Final = 1 << 20
_MOST_INT: Final = (1 << 63) - 1
_BOUNDS: Final[dict[str, dict[str, Any]]] = {
    "max_tokens": {"minimum": 1, "maximum": _MOST_TOKENS},
    "max_completion_tokens": {"minimum": 1, "maximum": _MOST_TOKENS},
    "min_tokens": {"minimum": 0, "maximum": _MOST_TOKENS},
    "temperature": {"minimum": 0, "maximum": 100},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"minimum": 0, "maximum": _MOST_TOKENS},
    "min_p": {"minimum": 0, "maximum": 1},
    "repetition_penalty": {"minimum": 0.01, "maximum": 100},
    "presence_penalty": {"minimum": -2, "maximum": 2},
    "frequency_penalty": {"minimum": -2, "maximum": 2},
    "seed": {"minimum": 0, "maximum": _MOST_INT},
    "n": {"minimum": 1, "maximum": MAX_COMPLETIONS},
    "best_of": {"minimum": 1, "maximum": MAX_COMPLETIONS},
    "logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
    "top_logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
    "prompt_logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
}
_LISTS: Final[dict[str, dict[str, Any]]] = {
    "messages": {"minItems": 1},
    "stop": {"maxItems": MAX_STOP_STRINGS, "items": {"type": "string", "minLength": 1, "maxLength": 256}},
    "bad_words": {"maxItems": 256, "items": {"type": "string", "minLength": 1, "maxLength": 256}},
    "stop_token_ids": {"maxItems": 256, "items": {"type": "integer", "minimum": 0, "maximum": 1 << 31}},
}
_LOGIT_BIAS: Final = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "maxProperties": 1024,
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}
_NUMBERS: Final = ("integer", "number")
_ERRORS: Final = {
    400: "A field that cannot be used; the message names it",
    401: "A key is needed, or not valid",
    402: "The budget of the key does not have what this may come to",
    403: "The key may not do this",
    404: "There is no such thing",
    405: "The path has another method",
    409: "It cannot be done now",
    413: "The body is too large",
    415: "The body is compressed",
    421: "This server has another name",
    429: "A limit of the key, or of the server, was reached",
    502: "What should have answered failed",
    503: "It takes no calls at the moment",
    504: "The time was up",
    529: "The server is full",
}
_ALWAYS: Final = (400, 401, 403, 404, 413, 415, 421)
_OF_CALLS: Final = (402, 429, 502, 503, 504, 529)


class OpenApi:
    """Serves the document of these routes at GET /openapi.json. `models` are names that are served."""

    def __init__(self, routes: Sequence[Route], models: Sequence[str], *, keyless: bool) -> None:
        route = Route("/openapi.json", self.document, methods=["GET"])
        self.routes = [route]
        self._body = encode_json(document_of([*routes, route], models, keyless=keyless))

    async def document(self, request: Request) -> Asgi:
        """GET /openapi.json."""
        return self._send

    async def _send(self, scope: Scope_, receive: Receive, send: Send) -> None:
        await send_json(send, 200, self._body)


def document_of(routes: Sequence[Route], models: Sequence[str], *, keyless: bool) -> dict[str, Any]:
    """The document; a route that `OPERATIONS` does not know is described by path and method."""
    kinds = [each.body for each in OPERATIONS.values() if isinstance(each.body, type)]
    refs, components = msgspec.json.schema_components(kinds, ref_template=_REF + "{name}")
    schemas = _bounded(components, models)
    bodies = dict(zip(kinds, refs, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = _PARAMETER.sub(r"{\1}", route.path)
        for method in sorted((route.methods or set()) - {"HEAD"}):
            known = OPERATIONS.get(
                (method, path), Operation(name=_name(method, path), summary=path, tag="Other")
            )
            paths.setdefault(path, {})[method.lower()] = _operation(known, path, bodies, models)
    security = {"bearer": {"type": "http", "scheme": "bearer"}, "key": _KEY}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "tokenmill", "version": version("tokenmill"), "description": _ABOUT},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": security},
    }
    if not keyless:
        document["security"] = [{"bearer": []}, {"key": []}]
    return document


_KEY: Final = {"type": "apiKey", "in": "header", "name": "x-api-key"}
_ABOUT: Final = (
    "Chat, completions, messages and what belongs to them, as OpenAI's and Anthropic's clients ask."
)


def bounds_of(name: str) -> Mapping[str, Any]:
    """The bounds of a number of this name in requests of the OpenAI API; empty if it has none of its own."""
    return _BOUNDS.get(name, {})


def _name(method: str, path: str) -> str:
    return method.lower() + "".join(part.capitalize() for part in re.findall(r"\w+", path))


def _bounded(components: dict[str, Any], models: Sequence[str]) -> dict[str, Any]:
    """The components with the bounds that their types do not say."""
    for schema in components.values():
        for name, field in schema.get("properties", {}).items():
            _bound(name, field)
            if name == "model" and models:
                field["enum"] = list(models)
            if name == "logit_bias":
                field["anyOf"] = [_LOGIT_BIAS, {"type": "null"}]
    return components


def _bound(name: str, field: dict[str, Any]) -> None:
    for each in field.get("anyOf", [field]):
        kind = each.get("type")
        if kind in _NUMBERS and not {"minimum", "exclusiveMinimum"} & each.keys():
            each.update(_BOUNDS.get(name, {"minimum": 0, "maximum": _MOST_INT}))
        if kind == "array":
            each.update(_LISTS.get(name, {}))
        if kind == "string" and name == "stop":
            each.update(minLength=1, maxLength=256)


def _operation(
    known: Operation, path: str, bodies: Mapping[Any, Any], models: Sequence[str]
) -> dict[str, Any]:
    """One method of a path."""
    result: dict[str, Any] = {
        "operationId": known.name,
        "summary": known.summary,
        "tags": [known.tag],
        "responses": _responses(known),
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in _PARAMETER.findall(path)
    ]
    parameters += [
        {"name": name, "in": "query", "required": False, "schema": schema}
        for name, schema in known.query.items()
    ]
    if known.api != "openai":
        parameters.append(_VERSION)
    if parameters:
        result["parameters"] = parameters
    if known.body is not None:
        schema = bodies[known.body] if isinstance(known.body, type) else known.body
        result["requestBody"] = {"required": True, "content": {known.body_type: {"schema": schema}}}
    return result


_VERSION: Final = {
    "name": "anthropic-version",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "enum": ["2023-06-01", "2026-10-21"]},
}


def _responses(known: Operation) -> dict[str, Any]:
    content: dict[str, Any] = {known.answer_type: {"schema": ANSWERS[known.answer]}}
    if known.answer_type != "application/json":
        content = {known.answer_type: {}}
    if known.streams:
        content["text/event-stream"] = {}
    good: dict[str, Any] = {"description": "The answer", "content": content}
    if known.name == "listModels":
        parameters = {"model": "$response.body#/data/0/id"}
        good["links"] = {"model": {"operationId": "getModel", "parameters": parameters}}
    statuses = {*_ALWAYS, *known.also, *(_OF_CALLS if known.is_call else ())}
    error = ERROR_SCHEMAS["both"]
    return {"200": good} | {
        str(status): {
            "description": _ERRORS[status],
            "content": {
                "application/json": {"schema": error if known.api == "both" else ERROR_SCHEMAS[known.api]}
            },
        }
        for status in sorted(statuses)
    }
