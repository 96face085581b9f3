"""An engine whose every word the test decides, and the application on it, in the test's own process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai

from mainspring.engine.messages import EngineLimits, EngineRequest, EngineStats, TokenLogprobs, TokenOutput
from mainspring.engine.outputs import FinishReason
from mainspring.engine.server.app import create_app
from mainspring.engine.server.async_llm import AsyncLLM
from mainspring.engine.server.keys import AccessKeys
from mainspring.engine.server.metrics import Metrics
from mainspring.engine.server.middleware import DrainGate
from mainspring.engine.server.protocol import (
    FromEngine,
    Outputs,
    Ready,
    Submit,
    ToEngine,
    decode_from_engine,
    decode_to_engine,
    encode,
)
from mainspring.engine.server.service import Service
from mainspring.engine.server.tool_calls.formats import detect
from mainspring.errors import EngineDeadError
from mainspring.formats.tokenizer import Tokenizer
from support.serving import MODEL_NAME, VOCAB_SIZE

STATS = EngineStats(0, 0, 0, 10, 16, 0, 0, 0, 0, {"stop": 0, "length": 0, "abort": 0})
READY = Ready(EngineLimits(4096, 8192, VOCAB_SIZE, 20), STATS, "cpu", "float32", 1)


class ScriptedEngine:
    """Stands in for EngineProcess: keeps what it is sent, and says what it is told to."""

    def __init__(self) -> None:
        self.sent: list[ToEngine] = []
        self.says: asyncio.Queue[FromEngine | EngineDeadError] = asyncio.Queue()

    def send(self, message: ToEngine) -> None:
        self.sent.append(decode_to_engine(encode(message)))

    async def receive(self) -> FromEngine:
        message = await self.says.get()
        if isinstance(message, EngineDeadError):
            raise message
        return decode_from_engine(encode(message))

    def gives(self, *outputs: TokenOutput) -> None:
        """The next step gives these."""
        self.says.put_nowait(Outputs(list(outputs), STATS))

    @property
    def requests(self) -> list[EngineRequest]:
        """Every request that came."""
        return [
            request for message in self.sent if isinstance(message, Submit) for request in message.requests
        ]


class WritingEngine(ScriptedEngine):
    """Answers every request with `text`, one token a step, each with the log-probability -1."""

    def __init__(self, tokenizer: Tokenizer, text: str, finish_reason: FinishReason = "stop") -> None:
        super().__init__()
        self._tokens = tokenizer.encode(text)
        self._end = tokenizer.eos_token_ids[0]
        self._finish_reason = finish_reason

    def send(self, message: ToEngine) -> None:
        super().send(message)
        if not isinstance(message, Submit):
            return
        for place, token in enumerate(self._tokens):
            is_last = place == len(self._tokens) - 1
            # The end of a text is a token of its own, which is no part of it.
            for request in message.requests:
                logprobs = None if request.params.logprobs is None else [TokenLogprobs([token], [-1.0], 1)]
                ends = self._finish_reason if is_last and self._finish_reason == "length" else None
                self.gives(TokenOutput(request.request_id, [token], logprobs=logprobs, finish_reason=ends))
        if self._finish_reason == "stop":
            for request in message.requests:
                logprobs = (
                    None if request.params.logprobs is None else [TokenLogprobs([self._end], [-1.0], 1)]
                )
                self.gives(
                    TokenOutput(request.request_id, [self._end], logprobs=logprobs, finish_reason="stop")
                )


@dataclass(frozen=True, slots=True)
class Scripted:
    """The application on a scripted engine, and clients of it."""

    engine: ScriptedEngine
    llm: AsyncLLM
    client: openai.AsyncOpenAI
    http: httpx.AsyncClient


@asynccontextmanager
async def scripted_app(
    tokenizer: Tokenizer,
    engine: ScriptedEngine,
    *,
    tool_parser: str = "auto",
    reasoning_parser: str = "auto",
    keys: AccessKeys | None = None,
) -> AsyncIterator[Scripted]:
    """The application on this engine."""
    llm = AsyncLLM(engine, READY, tokenizer, tokenizer.eos_token_ids, Metrics(MODEL_NAME, STATS))
    form = detect(tokenizer.chat_template, tool_parser, reasoning_parser)
    service = Service(llm, MODEL_NAME, DrainGate(), form)
    app = create_app(service, max_body_bytes=2**20, allowed_hosts=(), keys=keys or AccessKeys())
    messages = asyncio.create_task(llm.run())
    transport = httpx.ASGITransport(app)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            client = openai.AsyncOpenAI(
                base_url="http://server/v1", api_key="none", max_retries=0, http_client=http
            )
            yield Scripted(engine, llm, client, http)
    finally:
        messages.cancel()


def play(scenario: Callable[[], Coroutine[Any, Any, None]], seconds: float = 30.0) -> None:
    """Runs a scenario on an event loop of its own."""
    asyncio.run(asyncio.wait_for(scenario(), seconds))
