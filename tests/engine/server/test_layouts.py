"""A server whose model is spread over ranks: one process's answers, and the end of any rank is told, not waited out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from support.serving import Server, running_server, start_process, wait_until

REQUEST = {"prompt": "hello there", "max_tokens": 12, "temperature": 0.8, "seed": 3, "logprobs": 2}


def workers(server: Server) -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process(server.process.pid).children(recursive=True)
        if "mainspring.engine.ranks.worker" in process.cmdline()
    ]


def choice(url: str) -> dict[str, object]:
    answer = httpx.post(f"{url}/v1/completions", json=REQUEST, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, object] = answer.json()["choices"][0]
    return found


def test_stages_answer_as_one_process_and_a_dead_rank_is_503_and_started_again(
    server: Server, tiny_model: Path, tmp_path: Path
) -> None:
    expected = choice(server.url)
    with running_server(tiny_model, tmp_path / "output.txt", "--pp", "2", "--restart", "1") as spread:
        assert "on cpu (pp=2)" in spread.output.read_text()
        assert choice(spread.url) == expected
        first = workers(spread)
        assert len(first) == 1
        os.kill(first[0].pid, signal.SIGKILL)  # while nothing runs
        wait_until(lambda: httpx.get(f"{spread.url}/health").status_code == 503, 10)
        refused = httpx.post(f"{spread.url}/v1/completions", json=REQUEST, timeout=60)
        assert refused.status_code == 503
        assert "rank 1 of the layout has ended" in refused.json()["error"]["message"]
        wait_until(lambda: httpx.get(f"{spread.url}/health").status_code == 200, 60)
        assert choice(spread.url) == expected
        second = workers(spread)
        assert spread.terminate() == 0
        assert psutil.wait_procs([*first, *second], timeout=10)[1] == []


def test_a_layout_that_does_not_divide_the_model_is_refused_with_numbers(
    tiny_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output.txt"
    process = start_process(output, str(tiny_model), "--port", "0", "--tp", "3")
    assert process.wait(60) == 1
    assert "tp 3 does not divide the model's 4 attention heads" in output.read_text()


@pytest.mark.slow
def test_ranks_that_torchrun_starts_serve_and_end_together(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "output.txt"
    source = Path(__file__).parents[3] / "src"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    command += ["-m", "mainspring", "serve", str(tiny_model), "--tp", "2", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(source), "GLOO_SOCKET_IFNAME": "lo", "COLUMNS": "200"}
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        wait_until(lambda: b"Ctrl-C" in output.read_bytes() or process.poll() is not None, 120)
        lines = output.read_text().splitlines()
        [url] = [line.split()[1] for line in lines if line.startswith("API ")]
        assert choice(url.removesuffix("/v1"))["text"]
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        process.kill()
        process.wait()
