"""Mixed traffic for a while, with clients that leave: nothing is held at its end, and memory does not grow."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from typing import Any

import httpx
import psutil
import pytest

from support.serving import CONTEXT, Server

HELLO = [{"role": "user", "content": "hello"}]
CLIENTS = 12
# What Python's allocator and caches may take beyond the warm-up.
SLACK_BYTES = 24 * 2**20


def request(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """Something that clients ask, good or bad."""
    kind = draw.randrange(9)
    prompt = "".join(draw.choices("abcdefgh ", k=draw.choice([1, 20, 200, 1500])))
    sampled: dict[str, Any] = {"max_tokens": draw.randint(1, 60), "temperature": draw.choice([0.0, 1.0, 2.0])}
    match kind:
        case 0:
            return "/v1/completions", {"prompt": prompt, "n": draw.randint(1, 5), **sampled}
        case 1:
            return "/v1/completions", {"prompt": [prompt, "a"], "echo": True, "logprobs": 3, **sampled}
        case 2:
            body = {"prompt": prompt, "stop": ["e", "ab"], "presence_penalty": 1.0, "logit_bias": {"97": -5}}
            return "/v1/completions", {**body, **sampled}
        case 3:
            structured = draw.choice(
                [{"regex": "[a-c]{1,9}"}, {"choice": ["yes", "no"]}, {"json_object": True}]
            )
            return "/v1/chat/completions", {"messages": HELLO, "structured_outputs": structured, **sampled}
        case 4:
            return "/v1/embeddings", {"input": [prompt, prompt[:7]], "pooling": draw.choice(["mean", "last"])}
        case 5:
            return "/v1/responses", {"input": prompt, "max_output_tokens": sampled["max_tokens"]}
        case 6:
            return "/v1/completions", {"prompt": "x" * (CONTEXT + 1), **sampled}
        case 7:
            return "/v1/chat/completions", {"messages": HELLO, "temperature": -1}
        case _:
            return "/v1/chat/completions", {"messages": [{"role": "user", "content": prompt}], **sampled}


async def client(url: str, seed: int, until: float, counts: dict[str, int]) -> None:
    """Asks one thing after another; some answers are streamed, and some are not waited for."""
    draw = random.Random(seed)
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        while time.monotonic() < until:
            path, body = request(draw)
            if path != "/v1/embeddings" and draw.random() < 0.5:
                body["stream"] = True
            leaves_after = draw.choice([None, None, 0, 1, 3])
            try:
                async with asyncio.timeout(0.05 if leaves_after == 0 else 60):
                    async with http.stream("POST", path, json=body) as answer:
                        assert answer.status_code in (200, 400), (path, body, answer.status_code)
                        pieces = 0
                        async for _ in answer.aiter_bytes():
                            pieces += 1
                            if leaves_after and pieces >= leaves_after:
                                break
                        counts["left" if leaves_after else "done"] += 1
            except TimeoutError:
                counts["left"] += 1


def resident(server: Server) -> int:
    """Bytes that frontend and engine hold."""
    return sum(process.memory_info().rss for process in (psutil.Process(server.process.pid), server.engine))


async def soak(server: Server, seconds: float) -> tuple[dict[str, int], list[int]]:
    """Traffic for that long; what came of it, and the memory held, second by second."""
    counts = {"done": 0, "left": 0}
    until = time.monotonic() + seconds
    clients = [asyncio.create_task(client(server.url, seed, until, counts)) for seed in range(CLIENTS)]
    held = []
    while time.monotonic() < until:
        await asyncio.sleep(1)
        held.append(resident(server))
    await asyncio.gather(*clients)
    return counts, held


@pytest.mark.parametrize(
    "seconds",
    [
        15,
        pytest.param(60, marks=pytest.mark.slow),  # CI runs it beside the quick suite
        pytest.param(600, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_mixed_traffic_leaves_nothing_behind(server: Server, seconds: int) -> None:
    server.wait_idle()
    # The first requests of each kind fill caches and pools.
    asyncio.run(soak(server, seconds / 3))
    counts, held = asyncio.run(soak(server, seconds * 2 / 3))
    assert counts["done"] > seconds
    assert counts["left"] > seconds / 2
    server.wait_idle()
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert server.metric(name) == 0
    assert server.metric("engine_up") == 1
    third = max(1, len(held) // 3)
    before, after = statistics.median(held[:third]), statistics.median(held[-third:])
    assert after - before < SLACK_BYTES, f"memory grew from {before / 2**20:.1f} to {after / 2**20:.1f} MiB"
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 3}, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] == 3
