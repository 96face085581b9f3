"""One server for all tests that leave it as they found it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from mainspring.formats.tokenizer import Tokenizer
from support.serving import Server, running_server, write_adapter, write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny random model."""
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that reads bodies of up to 1 MiB."""
    output = tmp_path_factory.mktemp("server") / "output.txt"
    with running_server(tiny_model, output, "--max-body-mb", "1") as running:
        yield running


API_KEY, ADMIN_KEY = "key-of-the-api", "key-of-the-administration"


@pytest.fixture(scope="session")
def keyed_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with keys, an adapter and speculation, which starts a dead engine again and gives five choices."""
    output = tmp_path_factory.mktemp("keyed") / "output.txt"
    adapter = write_adapter(tmp_path_factory.mktemp("adapters") / "tuned", tiny_model)
    options = ("--api-key", API_KEY, "--admin-key", ADMIN_KEY, "--restart", "5", "--max-choices", "5")
    options += ("--lora", f"tuned={adapter}", "--speculative", "ngram", "--scheduling-policy", "priority")
    with running_server(tiny_model, output, *options, api_key=API_KEY) as running:
        yield running


@pytest.fixture
def admin(keyed_server: Server) -> Iterator[httpx.Client]:
    """An administrator of that server."""
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    with httpx.Client(base_url=keyed_server.url, headers=headers, timeout=60) as client:
        yield client


@pytest.fixture
def keyed(keyed_server: Server) -> Iterator[httpx.Client]:
    """A client of that server that has its key."""
    headers = {"Authorization": f"Bearer {API_KEY}"}
    with httpx.Client(base_url=keyed_server.url, headers=headers, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def http(server: Server) -> Iterator[httpx.Client]:
    """A plain HTTP client of the server."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[openai.OpenAI]:
    """OpenAI's own client, without its retries."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as found:
        yield found


@pytest.fixture(scope="session")
def tiny_tokens(tiny_model: Path) -> Callable[[str], list[int]]:
    """The tokenizer of the tiny model."""
    return Tokenizer.from_directory(tiny_model).encode
