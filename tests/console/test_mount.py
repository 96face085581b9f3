"""The files that the console consists of, as they are served."""

from __future__ import annotations

import re
from importlib.resources import files

import httpx
import pytest

from support.serving import MODEL_NAME, Server

NAMES = sorted(entry.name for entry in files("mainspring.console").joinpath("static").iterdir())


@pytest.mark.parametrize("path", ["/", *(f"/console/{name}" for name in NAMES)])
def test_every_file_is_served_under_a_strict_policy(server: Server, path: str) -> None:
    answer = httpx.get(server.url + path)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    again = httpx.get(server.url + path, headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", NAMES)
def test_no_file_names_another_host(name: str) -> None:
    text = files("mainspring.console").joinpath("static", name).read_text()
    addresses = set(re.findall(r"https?://[\w.-]+", text))
    assert addresses <= {"http://www.w3.org"}


@pytest.mark.parametrize(
    "path", ["/console/", "/console/nothing.js", "/console/../mount.py", "/console/%2e%2e/mount.py"]
)
def test_nothing_else_is_served(server: Server, path: str) -> None:
    answer = httpx.get(server.url + path)
    assert answer.status_code == 404
    assert set(answer.json()) == {"error"}


def test_the_live_figures_are_the_engine_s(server: Server) -> None:
    before = httpx.get(f"{server.url}/console/stats").json()
    httpx.post(f"{server.url}/v1/completions", json={"prompt": "abc", "max_tokens": 7}, timeout=60)
    server.wait_idle()
    after = httpx.get(f"{server.url}/console/stats").json()
    assert after["model"] == MODEL_NAME
    assert after["engine_dead"] is None
    assert after["generation_tokens_total"] - before["generation_tokens_total"] == 7
    assert after["prompt_tokens_total"] - before["prompt_tokens_total"] == 3
    assert after["seconds"] > before["seconds"]
    assert (after["running"], after["waiting"], after["kv_blocks_used"]) == (0, 0, 0)
    assert after["kv_blocks_total"] > 0
