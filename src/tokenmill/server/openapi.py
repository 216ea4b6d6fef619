"""The OpenAPI 3.1 document of everything that is served, made of the types that read the requests."""

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.routing import Route

from tokenmill.server.answering import send_json
from tokenmill.server.edge import Asgi, Receive, Scope_, Send
from tokenmill.server.openapi_answers import ANSWERS, ERROR_SCHEMAS
from tokenmill.server.openapi_bounds import bounded
from tokenmill.server.openapi_operations import OPERATIONS, Operation
from tokenmill.wire.fields import encode_json

__all__ = ["OpenApi", "document_of"]

_PARAMETER: Final = re.compile(r"\{(\w+)(?::\w+)?\}")
_REF: Final = "#/components/schemas/"
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
    schemas: dict[str, Any] = {}
    bodies: dict[Any, Any] = {}
    for each in OPERATIONS.values():
        if isinstance(each.body, type):
            refs, components = msgspec.json.schema_components([each.body], ref_template=_REF + "{name}")
            bodies[each.body] = _renamed(refs[0], each.prefix)
            schemas |= _renamed(components, each.prefix)
    schemas = bounded(schemas, models)
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


def _renamed(value: Any, prefix: str) -> Any:
    """Types that begin with `_` under a name for readers, everywhere."""
    if isinstance(value, dict):
        named = {key.replace("_", prefix, 1) if key[:1] == "_" else key: each for key, each in value.items()}
        return {key: _renamed(each, prefix) for key, each in named.items()}
    if isinstance(value, list | tuple):
        return [_renamed(each, prefix) for each in value]
    if isinstance(value, str):
        return value.replace(f"{_REF}_", f"{_REF}{prefix}")
    return value


def _name(method: str, path: str) -> str:
    return method.lower() + "".join(part.capitalize() for part in re.findall(r"\w+", path))


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
        content: dict[str, Any] = {"schema": schema}
        if known.example is not None and models:
            content["example"] = {"model": models[0], **known.example}
        result["requestBody"] = {"required": True, "content": {known.body_type: content}}
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
    if known.answer == "health":
        good["description"] = "It is so"
        return {"200": good, "503": {"description": "It is not so", "content": content}} | _of_errors(known)
    return {"200": good} | _of_errors(known)


def _of_errors(known: Operation) -> dict[str, Any]:
    """The errors of an operation, by status."""
    statuses = {*_ALWAYS, *known.also, *(_OF_CALLS if known.is_call else ())}
    schema = ERROR_SCHEMAS[known.api]
    return {
        str(status): {
            "description": _ERRORS[status],
            "content": {"application/json": {"schema": schema}},
        }
        for status in sorted(statuses)
    }
