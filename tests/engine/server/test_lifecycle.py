"""Clients that leave, servers that are told to end, and processes that die."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from support.serving import CONTEXT, Server, running_server, start_process, wait_until

# Far more tokens than any of these tests waits for.
LONG: dict[str, Any] = {"prompt": "hello", "max_tokens": CONTEXT - 5, "ignore_eos": True}


@contextmanager
def open_stream(server: Server, body: dict[str, Any] | None = None) -> Iterator[Iterator[str]]:
    """The lines of a streamed completion that has begun."""
    request = {**(body or LONG), "stream": True}
    with (
        httpx.Client(timeout=60) as client,
        client.stream("POST", f"{server.url}/v1/completions", json=request) as answer,
    ):
        assert answer.status_code == 200
        lines = answer.iter_lines()
        assert next(lines).startswith("data: {")
        yield lines


def engine_and_children(server: Server) -> list[psutil.Process]:
    """Every process that the server has started."""
    return psutil.Process(server.process.pid).children(recursive=True)


def private_directory(server: Server) -> Path:
    """Where the sockets between frontend and engine lie."""
    return Path(server.engine.cmdline()[-1])


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_command_that_is_shown_works(server: Server) -> None:
    (command,) = [line for line in server.output.read_text().splitlines() if line.startswith("curl ")]
    done = subprocess.run(["sh", "-c", command], capture_output=True, check=True, timeout=120)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_a_client_that_leaves_a_stream_frees_its_blocks(server: Server) -> None:
    server.wait_idle()
    before = server.metric("generation_tokens_total")
    with open_stream(server):
        assert server.metric("num_requests_running") == 1
        assert server.metric("kv_cache_usage_perc") > 0
    server.wait_idle()
    assert server.metric("generation_tokens_total") - before < LONG["max_tokens"]


def test_a_client_that_does_not_wait_for_its_answer_frees_its_blocks(server: Server) -> None:
    server.wait_idle()
    before = server.metric("generation_tokens_total")
    body = json.dumps({**LONG, "n": 4}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + body)
        wait_until(lambda: server.metric("num_requests_running") == 4)
    server.wait_idle()
    assert server.metric("generation_tokens_total") - before < 4 * LONG["max_tokens"]


def test_two_hundred_clients_that_leave_do_not_block_the_next_one(server: Server) -> None:
    server.wait_idle()

    def leave() -> None:
        with httpx.Client(timeout=0.05) as client:
            for _ in range(25):
                with pytest.raises(httpx.TimeoutException):
                    client.post(f"{server.url}/v1/completions", json=LONG)

    threads = [threading.Thread(target=leave) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    before, began = server.metric("engine_steps_total"), time.monotonic()
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 3}, timeout=60)
    print(f"the next one had its answer after {time.monotonic() - began:.2f} s")
    assert answer.json()["usage"]["completion_tokens"] == 3
    # Three tokens, and what ran while those who left were taken out; none of them runs to its end.
    assert server.metric("engine_steps_total") - before < 200
    server.wait_idle()


def test_sigterm_finishes_what_runs_and_refuses_the_rest(tiny_model: Path, tmp_path: Path) -> None:
    with running_server(tiny_model, tmp_path / "output.txt") as server:
        started = engine_and_children(server)
        directory = private_directory(server)
        with open_stream(server, {**LONG, "max_tokens": 1500}) as lines:
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
            refused = httpx.post(f"{server.url}/v1/completions", json=LONG)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "draining"
            events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(60) == 0
        _, alive = psutil.wait_procs(started, timeout=10)
        assert not alive
        assert not directory.exists()


def test_a_request_that_outlasts_the_drain_is_told(tiny_model: Path, tmp_path: Path) -> None:
    with running_server(tiny_model, tmp_path / "output.txt", "--drain-seconds", "0.2") as server:
        started = engine_and_children(server)
        with open_stream(server, {**LONG, "n": 8}) as lines:
            server.process.send_signal(signal.SIGINT)
            events = [line.removeprefix("data: ") for line in lines if line]
        assert json.loads(events[-1])["error"]["type"] == "service_unavailable_error"
        assert server.process.wait(60) == 0
        assert not psutil.wait_procs(started, timeout=10)[1]


def test_a_second_signal_ends_at_once(tiny_model: Path, tmp_path: Path) -> None:
    with running_server(tiny_model, tmp_path / "output.txt") as server:
        started = engine_and_children(server)
        directory = private_directory(server)
        with open_stream(server, {**LONG, "n": 8}) as lines:
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        assert server.process.wait(60) == 128 + signal.SIGTERM
        assert not psutil.wait_procs(started, timeout=10)[1]
        assert not directory.exists()


def test_the_death_of_the_engine_is_told_to_everyone(tiny_model: Path, tmp_path: Path) -> None:
    with running_server(tiny_model, tmp_path / "output.txt") as server:
        with open_stream(server) as lines:
            server.engine.kill()
            events = [line.removeprefix("data: ") for line in lines if line]
        error = json.loads(events[-1])["error"]
        assert error["code"] == "engine_dead"
        assert "SIGKILL" in error["message"]
        for answer in (
            httpx.get(f"{server.url}/health"),
            httpx.post(f"{server.url}/v1/completions", json=LONG),
            httpx.post(f"{server.url}/v1/completions", json={**LONG, "stream": True}),
        ):
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "engine_dead"
        assert server.metric("engine_up") == 0
        assert server.terminate() == 0


def test_the_engine_ends_with_its_parent(tiny_model: Path, tmp_path: Path) -> None:
    with running_server(tiny_model, tmp_path / "output.txt") as server:
        started = engine_and_children(server)
        directory = private_directory(server)
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        with open_stream(server):
            server.process.kill()
            server.process.wait()
            assert not psutil.wait_procs(started, timeout=30)[1]
        assert not directory.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-model"], ["no-such-model", "smollm2"]),
        (["{broken}"], ["model.safetensors"]),
        (["{tiny}", "--max-model-len", "999999"], ["999999", str(CONTEXT)]),
        (["{tiny}", "--numerics", "loose"], ["loose", "lockstep"]),
        (["{tiny}", "--tool-parser", "qwen"], ["qwen", "hermes"]),
        (["{tiny}", "--chat-template", "/nowhere.jinja"], ["/nowhere.jinja"]),
        (["{tiny}", "--lora", "tuned"], ["tuned", "NAME=DIRECTORY"]),
        (["{tiny}", "--replicas", "2"], ["--ray"]),
        (["{tiny}", "--api-key", ""], ["empty key"]),
        (["{tiny}", "--port", "{taken}"], ["{taken}", "--port"]),
        (["{tiny}", "--host", "999.1.1.1"], ["999.1.1.1", "--host"]),
    ],
)
def test_a_start_that_cannot_succeed_says_why(
    tiny_model: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_model.iterdir():
        if file.suffix == ".json":
            (broken / file.name).write_bytes(file.read_bytes())
    weights = (tiny_model / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {"{tiny}": tiny_model, "{broken}": broken, "{taken}": taken.getsockname()[1]}
        named = [str(names.get(argument, argument)) for argument in arguments]
        options = [] if "--port" in named else ["--port", "0"]
        process = start_process(tmp_path / "output.txt", *named, *options)
        assert process.wait(120) == 1
    text = (tmp_path / "output.txt").read_text()
    assert "Traceback" not in text
    for word in words:
        assert str(names.get(word, word)) in text


def test_the_frontend_does_not_wait_for_pytorch() -> None:
    code = (
        "import sys\n"
        "import mainspring.engine.server.app, mainspring.engine.server.serve, mainspring.console.mount\n"
        "import mainspring.cli.serve, mainspring.engine.server.model_source\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
