"""Requests made up from our own OpenAPI document: whatever comes, the server answers, and never with a 5xx."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error

from support.serving import MODEL_NAME, Server

# Generated texts are long by default; these tests are about requests, not about patience.
_LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_PATHS = {
    "/v1/chat/completions": ("max_tokens", "max_completion_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
}


@pytest.fixture(scope="session")
def openapi(server: Server) -> Any:
    """The document of the running server."""
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def check(case: Any, statuses: dict[str, set[int]]) -> None:
    """Sends a case, its text kept short; the answer must be no server error and keep to OpenAI's error shape."""
    # A made-up model is not found, whatever else the request asks.
    if (
        isinstance(case.body, dict)
        and isinstance(case.body.get("model"), str)
        and len(case.body["model"]) % 4
    ):
        case.body["model"] = MODEL_NAME
    names = _PATHS.get(case.operation.path, ())
    if names and isinstance(case.body, dict):
        given = [name for name in names if type(case.body.get(name)) is int and case.body[name] > 4]
        for name in given or [name for name in names[:1] if case.body.get(name) is None]:
            case.body[name] = 4
        if type(case.body.get("n")) is int and case.body["n"] > 4:
            case.body["n"] = 4
    answer = case.call(timeout=60)
    statuses[case.operation.path].add(answer.status_code)
    case.validate_response(answer, checks=[not_a_server_error])
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "examples", [12, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_no_request_is_a_server_error(openapi: Any, examples: int) -> None:
    operations = [result.ok() for result in openapi.get_all_operations()]
    assert len(operations) > 10
    statuses: dict[str, set[int]] = defaultdict(set)

    def send(case: Any) -> None:
        check(case, statuses)

    for operation in operations:
        bounded = settings(
            max_examples=examples,
            deadline=None,
            derandomize=examples < 50,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        bounded(given(case=operation.as_strategy())(send))()
    # Not only refusals: the generated requests get through to the engine.
    for path in ("/v1/completions", "/v1/responses", "/v1/embeddings", "/tokenize"):
        assert 200 in statuses[path], statuses


def test_the_document_tells_of_every_route_and_error(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    paths = document["paths"]
    assert {
        "/v1/embeddings",
        "/v1/responses",
        "/tokenize",
        "/detokenize",
        "/health",
        "/metrics",
        "/pause",
    } <= set(paths)
    for path, methods in paths.items():
        for method, operation in methods.items():
            assert operation["summary"], (method, path)
            assert "4XX" in operation["responses"]
            assert "422" not in operation["responses"]
