"""The OpenAPI document is valid and complete, and matches the structs that validate requests."""

from typing import Any

import aiohttp
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from meshd.api.http.routes import ROUTES


@pytest.fixture
async def document(http: aiohttp.ClientSession) -> dict[str, Any]:
    async with http.get("/openapi.json") as response:
        assert response.status == 200
        return await response.json()


async def test_the_document_is_valid(document: dict[str, Any]) -> None:
    OpenAPIV31SpecValidator(document).validate()


async def test_the_document_has_every_route(document: dict[str, Any]) -> None:
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert described == {(route.method, route.path.replace("{id:.+}", "{id}")) for route in ROUTES}
    ids = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(set(ids)) == len(ids)


async def test_the_fields_of_a_chat_are_described(document: dict[str, Any]) -> None:
    schema = document["components"]["schemas"]["ChatRequest"]
    assert "additionalProperties" not in schema
    assert schema["required"] == ["model", "messages"]
    number = schema["properties"]["temperature"]["anyOf"][0]
    assert (number["type"], number["minimum"], number["maximum"]) == ("number", 0, 2)
    assert schema["properties"]["tools"]["x-unsupported"] is True
    headers = document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["headers"]
    assert set(headers) == {"x-request-id", "x-meshd-ignored"}
    assert "/v1/chat/completions" in document["paths"]
    content = document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert content["application/json"]["schema"]["$ref"].endswith("/ChatCompletion")
    assert content["text/event-stream"]["schema"]["$ref"].endswith("/ChatCompletionChunk")


async def test_reading_a_stored_answer_is_described(document: dict[str, Any]) -> None:
    operation = document["paths"]["/v1/responses/{id}"]["get"]
    assert {(one["name"], one["in"]) for one in operation["parameters"]} == {
        ("id", "path"), ("stream", "query"), ("starting_after", "query"), ("include", "query"),
    }  # fmt: skip
    content = operation["responses"]["200"]["content"]
    assert [one["$ref"].rpartition("/")[2] for one in content["application/json"]["schema"]["anyOf"]] == [
        "Response", "ChatCompletion", "Completion",
    ]  # fmt: skip
    events = document["paths"]["/v1/responses"]["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"]
    assert "response.output_text.delta" in events["discriminator"]["mapping"]
