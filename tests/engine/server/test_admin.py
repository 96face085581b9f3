"""Keys, the routes of administration, and an engine that is started again."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from mainspring.engine.measure.api_client import ApiClient
from mainspring.engine.measure.mismatch import ServedText, ask_server, compare
from mainspring.engine.weights import weights_checksum
from mainspring.formats.tokenizer import Tokenizer
from mainspring.model.checkpoint import load_model, save_model
from support.serving import MODEL_NAME, Server, wait_until

COMPLETIONS = "/v1/completions"
SHORT: dict[str, Any] = {"prompt": "hello", "max_tokens": 8, "temperature": 0}


@pytest.fixture(autouse=True)
def _leaves_it_as_it_was(admin: httpx.Client, keyed: httpx.Client, tiny_model: Path) -> Iterator[None]:
    before = keyed.post(COMPLETIONS, json=SHORT).json()["choices"]
    yield
    for path in ("/wake", "/resume"):
        assert admin.post(path).status_code == 200
    assert admin.post("/update_weights", json={"path": str(tiny_model)}).status_code == 200
    assert keyed.post(COMPLETIONS, json=SHORT).json()["choices"] == before


def test_every_route_needs_its_key(keyed_server: Server, keyed: httpx.Client, admin: httpx.Client) -> None:
    schema = keyed.get("/openapi.json").json()["paths"]
    routes = [(method, path.replace("{name}", "x")) for path, found in schema.items() for method in found]
    assert len(routes) > 10
    routes += [
        ("get", "/console/stats"),
        ("get", "/openapi.json"),
        ("get", "/nowhere"),
        ("post", "//v1/models"),
    ]
    for method, path in routes:
        if path == "/health":
            continue
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": f"Basic {keyed_server.api_key}"},
        ):
            answer = httpx.request(method, keyed_server.url + path, headers=headers, json={})
            assert answer.status_code == 401, (method, path)
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
    # The keys are not each other's.
    assert keyed.post("/pause").status_code == 401
    assert admin.get("/v1/models").status_code == 401
    assert keyed.get("/v1/models").status_code == 200
    # Loaded before anybody can be asked for a key.
    for path in ("/health", "/", "/console/main.js"):
        assert httpx.get(keyed_server.url + path).status_code == 200


def test_without_an_admin_key_the_routes_are_closed(http: httpx.Client) -> None:
    for path in ("/pause", "/resume", "/sleep", "/wake", "/update_weights"):
        answer = http.post(path, headers={"Authorization": "Bearer x"}, json={})
        assert answer.status_code == 403
        assert "--admin-key" in answer.json()["error"]["message"]


def test_more_choices_than_the_server_gives_are_refused(keyed: httpx.Client) -> None:
    for path, body in (
        (COMPLETIONS, SHORT),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        error = keyed.post(path, json={**body, "n": 6}).json()["error"]
        assert error["param"] == "n"
        assert "at most 5" in error["message"]


def ask_beside(client: httpx.Client, body: dict[str, Any]) -> tuple[threading.Thread, list[httpx.Response]]:
    """A request that is under way while the test goes on."""
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(client.post(COMPLETIONS, json=body)))
    thread.start()
    return thread, answers


@pytest.mark.parametrize(("stop", "go"), [("/pause", "/resume"), ("/sleep", "/wake")])
def test_a_stopped_engine_keeps_its_requests(
    keyed_server: Server, keyed: httpx.Client, admin: httpx.Client, stop: str, go: str
) -> None:
    body = {"prompt": "once", "max_tokens": 300, "temperature": 0, "ignore_eos": True}
    whole = keyed.post(COMPLETIONS, json=body).json()["choices"][0]
    thread, answers = ask_beside(keyed, body)
    wait_until(lambda: keyed_server.metric("num_requests_running") > 0)
    state = admin.post(stop).json()
    assert state == {"paused": stop == "/pause", "sleeping": stop == "/sleep", "checksum": None}
    steps = keyed_server.metric("engine_steps_total")
    later, more = ask_beside(keyed, SHORT)
    time.sleep(0.3)
    assert keyed_server.metric("engine_steps_total") == steps
    assert not answers
    assert not more
    if stop == "/sleep":
        assert keyed_server.metric("kv_cache_usage_perc") == 0
        assert admin.post("/resume").status_code == 400
    assert admin.post(go).json() == {"paused": False, "sleeping": False, "checksum": None}
    thread.join(60)
    later.join(60)
    assert answers[0].json()["choices"][0] == whole
    assert more[0].status_code == 200


def perturbed(tiny_model: Path, target: Path) -> tuple[Path, str]:
    """The tiny model with one of its weights changed a little, as files, and its checksum."""
    model = load_model(tiny_model)
    with torch.no_grad():
        model.hf_tensors()["model.layers.1.mlp.down_proj.weight"].mul_(1.01)
    save_model(model, target)
    return target, weights_checksum(model)


def test_weights_are_updated_and_their_checksum_is_that_of_both_sides(
    keyed_server: Server, keyed: httpx.Client, admin: httpx.Client, tiny_model: Path, tmp_path: Path
) -> None:
    path, checksum = perturbed(tiny_model, tmp_path / "changed")
    body = {**SHORT, "logprobs": 0, "max_tokens": 40}
    before = keyed.post(COMPLETIONS, json=body).json()["choices"][0]["logprobs"]
    long = {"prompt": "once", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
    thread, answers = ask_beside(keyed, long)
    wait_until(lambda: keyed_server.metric("num_requests_running") > 0)
    answer = admin.post("/update_weights", json={"path": str(path), "checksum": checksum})
    assert answer.json() == {"paused": False, "sleeping": False, "checksum": checksum}
    thread.join(60)
    assert answers[0].status_code == 200
    after = keyed.post(COMPLETIONS, json=body).json()["choices"][0]["logprobs"]
    assert after["token_logprobs"] != before["token_logprobs"]
    model = load_model(path)
    ids = Tokenizer.from_directory(tiny_model).encode("hello" + "".join(after["tokens"]))
    assert model.log_probs([ids])[0][4:].tolist() == after["token_logprobs"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"path": "/nowhere"}, 400, "/nowhere"),
        ({}, 400, "path"),
        ({"path": "{tiny}", "checksum": "0" * 32}, 409, "0" * 32),
    ],
)
def test_an_update_that_cannot_be_says_why(
    admin: httpx.Client, tiny_model: Path, body: dict[str, str], status: int, words: str
) -> None:
    named = {name: value.replace("{tiny}", str(tiny_model)) for name, value in body.items()}
    answer = admin.post("/update_weights", json=named)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]


def served_texts(server: Server, model: Path) -> list[ServedText | None]:
    """What the server writes to a few prompts."""
    tokenizer = Tokenizer.from_directory(model)
    prompts = [tokenizer.encode(text) for text in ("hello", "a longer prompt than that", "x")]

    async def ask() -> list[ServedText | None]:
        async with ApiClient(server.url, server.api_key) as client:
            assert await client.model() == MODEL_NAME
            return await ask_server(
                client, MODEL_NAME, tokenizer, prompts, max_tokens=40, temperature=1.0, seed=3
            )

    return asyncio.run(ask())


def test_our_own_server_is_in_lockstep_and_a_changed_one_is_not(
    keyed_server: Server, admin: httpx.Client, tiny_model: Path, tmp_path: Path
) -> None:
    model, tokenizer = load_model(tiny_model), Tokenizer.from_directory(tiny_model)
    equal = compare(model, "tiny", tokenizer, served_texts(keyed_server, tiny_model), tolerance=0.0)
    assert (equal.tokens, equal.exact, equal.max_abs, equal.diverging) == (120, 120, 0.0, 0)
    assert equal.first is None
    assert equal.histogram["0"] == 120
    path, _ = perturbed(tiny_model, tmp_path / "changed")
    assert admin.post("/update_weights", json={"path": str(path)}).status_code == 200
    texts = served_texts(keyed_server, tiny_model)
    changed = compare(model, "tiny", tokenizer, texts, tolerance=1e-4)
    assert changed.max_abs > 1e-3
    assert changed.first is not None
    assert changed.largest is not None
    first = texts[changed.first.prompt]
    assert first is not None
    assert first.token_ids[changed.first.position] == changed.first.token_id
    assert abs(changed.first.gap) > 1e-4
    assert abs(changed.largest.gap) == changed.max_abs
    assert changed.k3 > 0
    assert sum(changed.histogram.values()) == changed.tokens


def test_a_killed_engine_is_started_again(keyed_server: Server, keyed: httpx.Client) -> None:
    expected = keyed.post(COMPLETIONS, json=SHORT).json()["choices"]
    restarts = keyed_server.metric("engine_restarts_total")
    thread, answers = ask_beside(keyed, {**SHORT, "max_tokens": 3000, "ignore_eos": True})
    wait_until(lambda: keyed_server.metric("num_requests_running") > 0)
    keyed_server.engine.kill()
    thread.join(60)
    assert answers[0].status_code == 503
    assert "SIGKILL" in answers[0].json()["error"]["message"]
    wait_until(lambda: httpx.get(f"{keyed_server.url}/health").status_code == 503, 5)
    refused = keyed.post(COMPLETIONS, json=SHORT)
    assert refused.status_code == 503
    assert "started again" in refused.json()["error"]["message"]
    wait_until(lambda: httpx.get(f"{keyed_server.url}/health").status_code == 200, 60)
    assert keyed.post(COMPLETIONS, json=SHORT).json()["choices"] == expected
    assert keyed_server.metric("engine_restarts_total") == restarts + 1
    assert keyed_server.metric("engine_up") == 1
