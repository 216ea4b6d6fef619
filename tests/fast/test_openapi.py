"""The OpenAPI document: every route is in it with what it takes and answers, and its schemas are sound."""

import json
from typing import Any

import pytest
from starlette.routing import Route

from tokenmill.server.anthropic_api import AnthropicApi
from tokenmill.server.anthropic_batches import AnthropicBatches
from tokenmill.server.dashboard.page import DashboardPages, PageConfig
from tokenmill.server.embeddings import EmbeddingsApi
from tokenmill.server.health import Health
from tokenmill.server.openai_api import OpenAIApi
from tokenmill.server.openai_batches import OpenAIBatches
from tokenmill.server.openapi import OpenApi, document_of
from tokenmill.server.openapi_operations import OPERATIONS
from tokenmill.server.responses import ResponsesApi

NONE: Any = None


def all_routes() -> list[Route]:
    """Every route that a server may have, without what is behind it."""
    routes = [
        *AnthropicApi(NONE, 0).routes(),
        *OpenAIApi(NONE, 0).routes(),
        *ResponsesApi(NONE).routes(),
        *EmbeddingsApi(NONE).routes(),
        *OpenAIBatches(NONE).routes(),
        *AnthropicBatches(NONE).routes(),
        *Health(NONE, NONE).routes(),
        *DashboardPages(PageConfig(version="0"), NONE, NONE).routes(),
    ]
    return [*routes, *OpenApi(routes, ("m",), keyless=True).routes]


DOCUMENT = document_of(all_routes(), ("m",), keyless=False)
OPERATIONS_OF = [
    (path, method, operation)
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
]
IDS = [f"{method} {path}" for path, method, _ in OPERATIONS_OF]


def test_every_route_is_in_it_and_described() -> None:
    for route in all_routes():
        path = route.path.replace(":path}", "}")
        for method in (route.methods or set()) - {"HEAD"}:
            assert method.lower() in DOCUMENT["paths"][path]
            assert (method, path) in OPERATIONS, f"{method} {path} has no description in openapi_operations"


def test_a_route_that_nobody_described_is_in_it_too() -> None:
    """The control of the test before: such a route is found."""
    route = Route("/v1/new/{id}", lambda request: request, methods=["POST"])
    assert ("POST", "/v1/new/{id}") not in OPERATIONS
    found = document_of([route], (), keyless=True)["paths"]["/v1/new/{id}"]["post"]
    assert [each["name"] for each in found["parameters"]] == ["id"]


@pytest.mark.parametrize(("path", "method", "operation"), OPERATIONS_OF, ids=IDS)
def test_operations_say_their_errors(path: str, method: str, operation: dict[str, Any]) -> None:
    statuses = set(operation["responses"])
    assert {"200", "400", "401", "403", "413"} <= statuses
    for status, response in operation["responses"].items():
        assert response["description"]
        if status != "200":
            assert "application/json" in response["content"], status


def test_ids_are_there_once() -> None:
    names = [operation["operationId"] for _, _, operation in OPERATIONS_OF]
    assert len(set(names)) == len(names)


def test_every_reference_leads_somewhere() -> None:
    text = json.dumps(DOCUMENT)
    refs = {part.split('"')[0] for part in text.split('"$ref": "#/components/schemas/')[1:]}
    assert refs <= set(DOCUMENT["components"]["schemas"]) and refs
    assert not [name for name in DOCUMENT["components"]["schemas"] if name.startswith("_")]


def test_schemas_are_sound() -> None:
    jsonschema_rs = pytest.importorskip("jsonschema_rs", reason="comes with Schemathesis")
    for name, schema in DOCUMENT["components"]["schemas"].items():
        jsonschema_rs.meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})
        assert schema["additionalProperties"] is False, name


def test_keys_are_asked_for_where_they_are() -> None:
    assert DOCUMENT["security"] == [{"bearer": []}, {"key": []}]
    assert "security" not in document_of([], (), keyless=True)


def test_a_model_is_one_of_those_that_are_served() -> None:
    schema = DOCUMENT["components"]["schemas"]["MessagesRequest"]
    assert schema["properties"]["model"]["enum"] == ["m"]
