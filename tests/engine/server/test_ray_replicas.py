"""Replicas under a Ray of this machine's own: slow, because Ray takes its time to start."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from mainspring.engine.server.ray_replicas import run_replicas
from mainspring.engine.server.settings import ServerSettings
from mainspring.errors import ConfigError
from support.serving import MODEL_NAME, start_process, wait_until

pytest.importorskip("ray", reason="needs mainspring[ray]")
START_SECONDS = 240


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def replicas(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Two replicas, as a user starts them."""
    output = tmp_path_factory.mktemp("ray") / "output.txt"
    port = free_port()
    options = ["--ray", "--replicas", "2", "--port", str(port), "--served-model-name", MODEL_NAME]
    process = start_process(output, str(tiny_model), *options, "--kv-cache-mb", "16", "--threads", "1")
    try:
        wait_until(
            lambda: b"replicas serve" in output.read_bytes() or process.poll() is not None, START_SECONDS
        )
        assert process.poll() is None, output.read_text()
        yield process, f"http://127.0.0.1:{port}"
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0, output.read_text()
        # Ray's processes and the engines in them.
        _, alive = psutil.wait_procs(children, timeout=30)
        assert not alive


@pytest.mark.slow
def test_replicas_answer_as_one_server(replicas: tuple[subprocess.Popen[bytes], str]) -> None:
    process, url = replicas
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        assert [model.id for model in client.models.list()] == [MODEL_NAME]
        # Random, so seeded: the same text from whichever replica answers.
        texts = {
            client.completions.create(model=MODEL_NAME, prompt="hello", max_tokens=20, seed=5).choices[0].text
            for _ in range(8)
        }
        assert len(texts) == 1
        chunks = list(
            client.completions.create(model=MODEL_NAME, prompt="hello", max_tokens=20, seed=5, stream=True)
        )
        assert {"".join(chunk.choices[0].text for chunk in chunks)} == texts
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model=MODEL_NAME, prompt="a", temperature=-1)
        assert refused.value.param == "temperature"
    assert httpx.get(f"{url}/").status_code == 200
    engines = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "mainspring.engine.server.engine_process" in child.cmdline()
    ]
    assert len(engines) == 2


@pytest.mark.slow
def test_what_listens_on_other_addresses_answers_nobody_without_the_token(
    replicas: tuple[subprocess.Popen[bytes], str],
) -> None:
    process, _ = replicas
    open_to_others: list[tuple[str, int]] = []
    for child in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        for connection in child.net_connections("tcp"):
            address = ipaddress.ip_address(connection.laddr.ip.removeprefix("::ffff:"))
            if connection.status == psutil.CONN_LISTEN and not address.is_loopback:
                open_to_others.append((child.name(), connection.laddr.port))
    # Each replica's port for calls between deployments, and nothing else.
    assert len(open_to_others) == 2
    assert all("replica" in name for name, _ in open_to_others)
    import grpc
    from ray.serve.generated import serve_pb2, serve_pb2_grpc

    for _, port in open_to_others:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            service = serve_pb2_grpc.ASGIServiceStub(channel)
            with pytest.raises(grpc.RpcError) as refused:
                service.HandleRequest(serve_pb2.ASGIRequest(), timeout=20)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_a_ray_whose_calls_need_no_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # put back at the end
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ConfigError, match="RAY_AUTH_MODE is 'disabled'"):
        run_replicas(ServerSettings(model="x", port=9), None, 2, None)


@pytest.mark.parametrize(
    ("settings", "count", "word"),
    [
        (ServerSettings(model="x", port=9), 0, "replicas"),
        (ServerSettings(model="x", port=0), 2, "--port"),
        (ServerSettings(model="x", port=9, admin_keys=("k",)), 2, "administration"),
    ],
)
def test_settings_that_do_not_go_with_replicas_are_refused(
    settings: ServerSettings, count: int, word: str
) -> None:
    with pytest.raises(ConfigError, match=word):
        run_replicas(settings, None, count, None)


def test_the_options_of_ray_need_ray() -> None:
    code = "from mainspring.cli.main import main; main()"
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", "x", "--replicas", "2"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 1
    assert "--ray" in done.stderr
