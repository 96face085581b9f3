"""A small client of OpenAI-compatible servers that costs little per token, so that it measures them and not itself."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import msgspec

from mainspring.errors import MainspringError


class ServerError(MainspringError):
    """A server could not be reached, refused a request, or broke off its answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ApiClient:
    """Talks to one server. Use it as an asynchronous context; all methods raise ServerError."""

    def __init__(self, url: str, api_key: str | None = None, *, timeout_seconds: float = 600.0) -> None:
        """`url`: with or without /v1 at its end."""
        self._url = url.rstrip("/").removesuffix("/v1")
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._session = aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=timeout_seconds),
            # An event is one line, and may hold a long prompt's log-probabilities.
            read_bufsize=2**22,
            # The load decides how many connections there are, not the client.
            connector=aiohttp.TCPConnector(limit=0),
        )

    async def __aenter__(self) -> ApiClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._session.close()

    async def model(self) -> str:
        """The name of the first model that is served."""
        try:
            async with self._session.get(f"{self._url}/v1/models") as answer:
                await _check(answer)
                names = [str(card["id"]) for card in msgspec.json.decode(await answer.read())["data"]]
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError, KeyError, TypeError) as error:
            raise self._failed(error) from error
        if not names:
            raise ServerError(f"{self._url} serves no model")
        return names[0]

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The answer to a request, as plain values."""
        try:
            async with self._session.post(f"{self._url}{path}", json=body) as answer:
                await _check(answer)
                return msgspec.json.decode(await answer.read())
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError) as error:
            raise self._failed(error) from error

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[tuple[float, bytes]]:
        """The data of each event of a streamed answer, and when it came (`time.perf_counter`)."""
        ended = False
        try:
            async with self._session.post(f"{self._url}{path}", json={**body, "stream": True}) as answer:
                await _check(answer)
                async for line in answer.content:
                    if line.startswith(b"data:"):
                        data = line[5:].strip()
                        ended = data == b"[DONE]"
                        if not ended:
                            yield time.perf_counter(), data
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise self._failed(error) from error
        if not ended:
            raise ServerError(f"{self._url} broke off its answer")

    def _failed(self, error: Exception) -> ServerError:
        reason = str(error) or type(error).__name__
        return ServerError(f"{self._url} does not answer as an OpenAI-compatible server: {reason}")


async def _check(answer: aiohttp.ClientResponse) -> None:
    """Raises ServerError, with the server's own words, unless it agreed."""
    if answer.status == 200:
        return
    text = (await answer.text())[:500]
    try:
        text = str(msgspec.json.decode(text)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        text = text or "no reason given"
    raise ServerError(f"{answer.url} answered {answer.status}: {text}", answer.status)
