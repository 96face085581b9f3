"""The HTTP API and the MCP tools over a real index: answers, streams, refusals, many clients, a changing index."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from mcp import Client

from mainspring.errors import RetrievalError
from mainspring.rag.generation.language_model import EndpointModel
from mainspring.rag.pipeline import Parts, Pipeline
from mainspring.rag.retrieval.lexical import LexicalIndex
from mainspring.rag.serving.api import make_app
from mainspring.rag.serving.live import LivePipeline
from mainspring.rag.serving.mcp_server import mcp_server
from mainspring.rag.strategy import AnswerStep, Strategy
from rag.fakes import OverlapReranker, ScriptedModel, WordEmbedder
from rag.test_index import open_index, write

ANSWER = "The red fox hunts mice."


@dataclasses.dataclass(frozen=True)
class Served:
    live: LivePipeline
    update: Callable[..., object]


@pytest.fixture
def served(tmp_path: Path) -> Served:
    index = open_index(tmp_path / "index")
    docs = write(tmp_path / "docs", fox="The red fox hunts mice.", whale="The blue whale eats krill.")
    index.update(docs)
    lexical = LexicalIndex.open(tmp_path / "index" / "bm25", index.store)
    reranker = OverlapReranker()
    model = ScriptedModel(*[ANSWER] * 40)
    parts = Parts(WordEmbedder(), index.store, lexical, reranker, reranker, None, model)
    live = LivePipeline(tmp_path / "index", Pipeline(Strategy(answer=AnswerStep(abstain_below=0.0)), parts))

    def update(**files: str) -> object:
        return index.update(write(docs, **files))

    return Served(live, update)


@pytest.fixture
def client(served: Served) -> Iterator[TestClient]:
    with TestClient(make_app(served.live)) as opened:
        yield opened


def test_search_gives_passages_with_their_places_and_obeys_filters(client: TestClient) -> None:
    found = client.post("/v1/search", json={"question": "red fox", "k": 2}).json()["passages"]
    assert found[0]["file"] == "fox.md"
    assert found[0]["place"] == "line 1"
    where = client.post("/v1/search", json={"question": "red fox", "where": ["file^=whale"]}).json()[
        "passages"
    ]
    assert [p["file"] for p in where] == ["whale.md"]


def test_an_answer_comes_whole_or_as_events(client: TestClient) -> None:
    whole = client.post("/v1/ask", json={"question": "What does the red fox hunt?"}).json()
    assert whole["text"] == ANSWER
    assert whole["citations"][0]["quote"] == ANSWER
    response = client.post("/v1/ask", json={"question": "What does the red fox hunt?", "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [block.split("\n") for block in response.text.strip().split("\n\n")]
    kinds = [lines[0].removeprefix("event: ") for lines in events]
    values = [json.loads(lines[1].removeprefix("data: ")) for lines in events]
    assert kinds[-1] == "answer"
    assert "citation" in kinds
    assert "".join(v["text"] for k, v in zip(kinds, values, strict=True) if k == "delta") == ANSWER
    assert values[-1] == whole


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"question": ""}, 422),
        ({"question": "   "}, 400),
        ({"question": "x", "k": 0}, 422),
        ({"question": "x", "colour": 1}, 422),
        ({"question": "x", "where": ["colour=red"]}, 400),
        ({"question": "x" * 5000}, 422),
    ],
)
def test_a_wrong_request_is_refused_with_a_reason(
    client: TestClient, body: dict[str, object], status: int
) -> None:
    response = client.post("/v1/search", json=body)
    assert response.status_code == status
    assert response.json()


def test_many_clients_at_once_get_their_own_answers(client: TestClient) -> None:
    questions = ["red fox", "blue whale"] * 10
    with ThreadPoolExecutor(8) as pool:
        responses = pool.map(
            lambda q: client.post("/v1/search", json={"question": q, "k": 1}).json(), questions
        )
    files = [response["passages"][0]["file"] for response in responses]
    assert files == ["fox.md", "whale.md"] * 10


def test_a_server_sees_what_an_index_run_adds(client: TestClient, served: Served) -> None:
    assert client.get("/health").json()["chunks"] == 2
    served.update(owl="The grey owl sleeps by day.")
    found = client.post("/v1/search", json={"question": "grey owl", "k": 1}).json()["passages"]
    assert found[0]["file"] == "owl.md"
    assert client.get("/health").json()["chunks"] == 3


def test_agents_search_and_ask_over_mcp(served: Served) -> None:
    async def talk() -> None:
        async with Client(mcp_server(served.live)) as agent:
            tools = {tool.name for tool in (await agent.list_tools()).tools}
            assert tools == {"search", "ask"}
            found = await agent.call_tool("search", {"question": "blue whale", "k": 1})
            assert not found.is_error
            assert found.structured_content is not None
            assert found.structured_content["passages"][0]["file"] == "whale.md"
            answer = await agent.call_tool("ask", {"question": "What does the red fox hunt?"})
            assert answer.structured_content is not None
            assert answer.structured_content["text"] == ANSWER
            refused = await agent.call_tool("search", {"question": "x", "k": 1000})
            assert refused.is_error

    asyncio.run(talk())


def test_mcp_is_served_over_http_to_this_machine_only(served: Served) -> None:
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}
    headers = {"Accept": "application/json, text/event-stream", "MCP-Protocol-Version": "2025-06-18"}
    with TestClient(make_app(served.live), base_url="http://127.0.0.1:8001") as local:
        response = local.post("/mcp", json=call, headers=headers)
        assert response.status_code == 200, response.text
        assert {tool["name"] for tool in response.json()["result"]["tools"]} == {"search", "ask"}
        rebound = local.post("/mcp", json=call, headers={**headers, "Host": "evil.example"})
        assert rebound.status_code == 421


def test_without_a_model_agents_can_only_search(served: Served) -> None:
    pipeline = served.live.current()
    silent = dataclasses.replace(pipeline, parts=dataclasses.replace(pipeline.parts, model=None))

    async def names() -> set[str]:
        async with Client(mcp_server(LivePipeline(Path("unused"), silent))) as agent:
            return {tool.name for tool in (await agent.list_tools()).tools}

    assert asyncio.run(names()) == {"search"}


def test_an_endpoint_that_is_not_there_is_a_clear_error() -> None:
    with pytest.raises(RetrievalError, match=r"http://127.0.0.1:9/v1 cannot be reached"):
        EndpointModel("http://127.0.0.1:9/v1", timeout=2)


def test_with_keys_every_route_but_health_wants_one(served: Served) -> None:
    with TestClient(make_app(served.live, api_keys=["one", "two"])) as client:
        assert client.get("/health").status_code == 200
        asked = {"question": "red fox"}
        for headers in ({}, {"Authorization": "Bearer three"}, {"Authorization": "Basic one"}):
            refused = client.post("/v1/search", json=asked, headers=headers)
            assert refused.status_code == 401
            assert "Authorization: Bearer KEY" in refused.json()["error"]["message"]
            assert client.post("/mcp", json={}, headers=headers).status_code == 401
        for key in ("one", "two"):
            found = client.post("/v1/search", json=asked, headers={"Authorization": f"Bearer {key}"})
            assert found.json()["passages"][0]["file"] == "fox.md"
