"""The engine as the routes see it: prompts in, texts out, asynchronously, and every request released at its end."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeAlias

import msgspec

from mainspring.engine.admission import make_request
from mainspring.engine.messages import EngineLimits, EngineRequest, EngineStats, Pooling, TokenOutput
from mainspring.engine.output_processor import OutputProcessor
from mainspring.engine.outputs import RequestOutput
from mainspring.engine.sampling_params import SamplingParams
from mainspring.engine.server.client import EngineProcess, error_of_kind
from mainspring.engine.server.metrics import Metrics, RequestClock
from mainspring.engine.server.protocol import (
    Abort,
    Control,
    ControlAction,
    Controlled,
    Outputs,
    Ready,
    Refused,
    Submit,
)
from mainspring.errors import EngineDeadError, MainspringError
from mainspring.formats.tokenizer import Tokenizer

_Item: TypeAlias = tuple[int, RequestOutput] | MainspringError


@dataclass(frozen=True, slots=True)
class Placement:
    """How a request stands among others.

    Attributes:
        priority: lower is served earlier, where the scheduling policy is "priority".
        cache_salt: prefixes are shared only with requests of the same salt.
        lora_id: the adapter of the linear layers, 0 for none.
    """

    priority: int = 0
    cache_salt: str | None = None
    lora_id: int = 0


_ANYWHERE = Placement()


@dataclass(slots=True)
class _Running:
    """Where the outputs of a request under way belong."""

    generation: Generation
    index: int
    clock: RequestClock


class Generation:
    """The requests of one caller: iterate for `(index, output)` pairs; leaving the context aborts the rest.

    Outputs of different requests arrive interleaved, those of one request in order.
    """

    def __init__(self, llm: AsyncLLM, request_ids: Sequence[str]) -> None:
        self._llm = llm
        self._unfinished = set(request_ids)
        self._items: asyncio.Queue[_Item] = asyncio.Queue()

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._llm.abort(self._unfinished)

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> tuple[int, RequestOutput]:
        """The next output. Raises: what the engine answered instead, EngineDeadError among others."""
        if not self._unfinished:
            raise StopAsyncIteration
        item = await self._items.get()
        if isinstance(item, MainspringError):
            raise item
        index, output = item
        if output.finished:
            self._unfinished.discard(output.request_id)
        return index, output

    def put(self, item: _Item) -> None:
        """Called by `AsyncLLM`: an output, or the error that ends everything."""
        self._items.put_nowait(item)


class AsyncLLM:
    """Tokenizer, text side and clocks of the requests that run in an engine process.

    `run()` must be running for anything to arrive. All methods belong to one event loop.
    """

    def __init__(
        self,
        engine: EngineProcess,
        ready: Ready,
        tokenizer: Tokenizer,
        eos_token_ids: Sequence[int],
        metrics: Metrics,
    ) -> None:
        self.tokenizer = tokenizer
        self.limits: EngineLimits = ready.limits
        self.metrics = metrics
        self.dead: EngineDeadError | None = None
        self._engine = engine
        self._eos_token_ids = tuple(eos_token_ids)
        self._processor = OutputProcessor(tokenizer)
        self._running: dict[str, _Running] = {}
        self._embeddings: dict[str, asyncio.Future[TokenOutput]] = {}
        self._controls: dict[str, asyncio.Future[Controlled]] = {}

    @property
    def stats(self) -> EngineStats:
        """The engine's last snapshot."""
        return self.metrics.stats

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, computed beside the event loop."""
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        *,
        stream: bool,
        choices: int = 1,
        placement: Placement = _ANYWHERE,
    ) -> Generation:
        """Starts one request a prompt: `params[i]` belongs to `prompts[i]`.

        With `stream` every output holds what is new since the one before; without, one output holds it all.
        `choices` neighbours at a time have the same prompt, which is then computed and held once.

        Raises:
            InvalidRequestError, RequestTooLongError: none of them has been started.
            EngineDeadError: there is no engine any more.
        """
        requests: list[EngineRequest] = []
        for index, request in enumerate(self._requests(prompts, params, placement, None)):
            leader = index - index % choices
            fork_of = None if index == leader else requests[leader].request_id
            requests.append(msgspec.structs.replace(request, fork_of=fork_of))
        return self._start(requests, stream)

    async def embed(
        self, prompts: Sequence[Sequence[int]], pooling: Pooling, placement: Placement = _ANYWHERE
    ) -> list[TokenOutput]:
        """The outputs of the prompts in order: each has the pooled hidden states of one.

        Raises: as `generate`, and what the engine answers instead.
        """
        params = [SamplingParams()] * len(prompts)
        requests = self._requests(prompts, params, placement, pooling)
        loop = asyncio.get_running_loop()
        waiting: dict[str, asyncio.Future[TokenOutput]] = {
            request.request_id: loop.create_future() for request in requests
        }
        self._embeddings.update(waiting)
        self._engine.send(Submit(requests))
        try:
            return await asyncio.gather(*waiting.values())
        finally:
            left = [request_id for request_id, future in waiting.items() if not _has_result(future)]
            for request_id in waiting:
                del self._embeddings[request_id]
            if left and self.dead is None:
                self._engine.send(Abort(left))

    def _requests(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        placement: Placement,
        pooling: Pooling | None,
    ) -> list[EngineRequest]:
        if self.dead is not None:
            raise self.dead
        group = uuid.uuid4().hex
        return [
            msgspec.structs.replace(
                make_request(
                    f"{group}-{index}",
                    prompt,
                    param,
                    self.limits,
                    self._eos_token_ids,
                    pooling=pooling,
                    lora_id=placement.lora_id,
                ),
                priority=placement.priority,
                cache_salt=placement.cache_salt,
            )
            for index, (prompt, param) in enumerate(zip(prompts, params, strict=True))
        ]

    def _start(self, requests: list[EngineRequest], stream: bool) -> Generation:
        generation = Generation(self, [request.request_id for request in requests])
        for index, request in enumerate(requests):
            self._processor.add(request, None, "delta" if stream else "final")
            clock = self.metrics.arrived(len(request.prompt_token_ids), request.params)
            self._running[request.request_id] = _Running(generation, index, clock)
        self._engine.send(Submit(requests))
        return generation

    async def control(self, action: ControlAction, path: str | None = None) -> Controlled:
        """Does something to the engine as a whole.

        Raises: EngineDeadError, and what the engine answers instead.
        """
        if self.dead is not None:
            raise self.dead
        control_id = uuid.uuid4().hex
        waiting: asyncio.Future[Controlled] = asyncio.get_running_loop().create_future()
        self._controls[control_id] = waiting
        try:
            self._engine.send(Control(control_id, action, path))
            answer = await waiting
        finally:
            del self._controls[control_id]
        if answer.kind is not None:
            raise error_of_kind(answer.kind, answer.message, None)
        return answer

    def abort(self, request_ids: set[str]) -> None:
        """Drops requests, here and in the engine; ids that have ended are ignored."""
        known = [request_id for request_id in request_ids if request_id in self._running]
        for request_id in known:
            self.metrics.finished(self._running.pop(request_id).clock, "abort")
            self._processor.abort(request_id)
        if known:
            self._engine.send(Abort(known))

    def restarted(self, engine: EngineProcess, ready: Ready) -> None:
        """Another engine has taken the place of the one that died; `run()` is to be called again."""
        self._engine = engine
        self.limits = ready.limits
        self.metrics.stats = ready.stats
        self.metrics.engine_up = True
        self.metrics.restarts += 1
        self.dead = None

    def fail_all(self, error: MainspringError) -> None:
        """Ends every request under way with this error."""
        generations = {id(running.generation): running.generation for running in self._running.values()}
        self.abort(set(self._running))
        for generation in generations.values():
            generation.put(error)
        for control in self._controls.values():
            _fail(control, error)
        for embedding in self._embeddings.values():
            _fail(embedding, error)

    async def run(self) -> None:
        """Hands the engine's messages to those who wait for them, until cancelled or the engine dies."""
        try:
            while True:
                match await self._engine.receive():
                    case Outputs() as message:
                        self._take(message)
                    case Refused() as message:
                        self._refuse(message)
                    case Controlled() as message:
                        waiting = self._controls.get(message.control_id)
                        if waiting is not None and not waiting.done():
                            waiting.set_result(message)
                    case other:
                        raise RuntimeError(f"the engine sent {type(other).__name__} while it was running")
        except MainspringError as error:
            self.dead = error if isinstance(error, EngineDeadError) else EngineDeadError(str(error))
            self.metrics.engine_up = False
            self.fail_all(self.dead)

    def _take(self, message: Outputs) -> None:
        self.metrics.stepped(message.stats)
        for tokens in message.outputs:
            if tokens.embedding is not None:
                embedding = self._embeddings.get(tokens.request_id)
                if embedding is not None and not embedding.done():
                    embedding.set_result(tokens)
                continue
            running = self._running.get(tokens.request_id)
            if running is not None and tokens.token_ids:
                self.metrics.tokens(running.clock, tokens)
        outputs, stopped = self._processor.process(message.outputs)
        if stopped:
            self._engine.send(Abort(stopped))
        for output in outputs:
            running = self._running[output.request_id]
            reason = output.outputs[0].finish_reason
            if reason is not None:
                del self._running[output.request_id]
                self.metrics.finished(running.clock, reason)
            running.generation.put((running.index, output))

    def _refuse(self, message: Refused) -> None:
        embedding = self._embeddings.get(message.request_id)
        if embedding is not None:
            _fail(embedding, error_of_kind(message.kind, message.message, message.param))
        running = self._running.pop(message.request_id, None)
        if running is not None:
            self._processor.abort(message.request_id)
            running.generation.put(error_of_kind(message.kind, message.message, message.param))


def _fail(future: asyncio.Future[Any], error: MainspringError) -> None:
    if not future.done():
        future.set_exception(error)


def _has_result(future: asyncio.Future[TokenOutput]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None
