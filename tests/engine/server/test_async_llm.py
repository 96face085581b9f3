"""The frontend's side of the engine, with an engine whose every message the test decides."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from mainspring.engine.messages import EngineLimits, TokenOutput
from mainspring.engine.sampling_params import SamplingParams
from mainspring.engine.server.async_llm import AsyncLLM
from mainspring.engine.server.metrics import Metrics
from mainspring.engine.server.protocol import Abort, Ready, Refused, Submit
from mainspring.errors import EngineDeadError, RequestTooLongError
from mainspring.formats.tokenizer import Tokenizer
from support.scripted_engine import STATS, ScriptedEngine
from support.serving import VOCAB_SIZE

READY = Ready(EngineLimits(64, 160, VOCAB_SIZE, 20), STATS, "cpu", "float32", 1)


@pytest.fixture
def with_llm(tiny_model: Path) -> Callable[..., None]:
    """Runs a scenario, a coroutine function of an AsyncLLM and its engine."""

    def run(scenario: Callable[..., object]) -> None:
        async def play() -> None:
            engine = ScriptedEngine()
            tokenizer = Tokenizer.from_directory(tiny_model)
            llm = AsyncLLM(engine, READY, tokenizer, [], Metrics("tiny", STATS))
            messages = asyncio.create_task(llm.run())
            try:
                await asyncio.wait_for(scenario(llm, engine), 30)
            finally:
                messages.cancel()

        asyncio.run(play())

    return run


def ids_of(engine: ScriptedEngine) -> list[str]:
    """The ids of the requests that the engine was sent last."""
    submit = engine.sent[-1]
    assert isinstance(submit, Submit)
    return [request.request_id for request in submit.requests]


def test_a_refusal_of_the_engine_reaches_its_caller_and_drops_the_rest(with_llm: Callable[..., None]) -> None:
    async def scenario(llm: AsyncLLM, engine: ScriptedEngine) -> None:
        params = [SamplingParams(), SamplingParams()]
        generation = llm.generate([[1], [2]], params, stream=True)
        first, second = ids_of(engine)
        engine.says.put_nowait(Refused(first, "RequestTooLongError", "too long", "prompt"))
        with pytest.raises(RequestTooLongError, match="too long") as refused:
            async with generation:
                await anext(generation)
        assert refused.value.param == "prompt"
        assert engine.sent[-1] == Abort([second])

    with_llm(scenario)


def test_tokens_for_a_request_that_was_dropped_are_ignored(with_llm: Callable[..., None]) -> None:
    async def scenario(llm: AsyncLLM, engine: ScriptedEngine) -> None:
        async with llm.generate([[1]], [SamplingParams()], stream=True):
            (dropped,) = ids_of(engine)
        assert engine.sent[-1] == Abort([dropped])
        async with llm.generate([[1]], [SamplingParams()], stream=True) as generation:
            (kept,) = ids_of(engine)
            engine.gives(TokenOutput(dropped, [65]), TokenOutput(kept, [66], finish_reason="length"))
            outputs = [output async for _, output in generation]
        assert [output.request_id for output in outputs] == [kept]
        # It had ended by itself: nothing is left to abort.
        assert isinstance(engine.sent[-1], Submit)

    with_llm(scenario)


def test_a_stop_string_ends_the_request_in_the_engine(with_llm: Callable[..., None]) -> None:
    async def scenario(llm: AsyncLLM, engine: ScriptedEngine) -> None:
        letters = await llm.encode("abcd")
        async with llm.generate([[1]], [SamplingParams(stop="cd")], stream=False) as generation:
            (request_id,) = ids_of(engine)
            for token in letters:
                engine.gives(TokenOutput(request_id, [token]))
            ((_, output),) = [item async for item in generation]
        assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("ab", "stop")
        assert engine.sent[-1] == Abort([request_id])
        text = llm.metrics.render().decode()
        assert 'mainspring_request_success_total{finished_reason="stop",model_name="tiny"} 1.0' in text

    with_llm(scenario)


def test_everyone_hears_of_the_engine_s_death(with_llm: Callable[..., None]) -> None:
    async def scenario(llm: AsyncLLM, engine: ScriptedEngine) -> None:
        generations = [llm.generate([[1]], [SamplingParams()], stream=stream) for stream in (False, True)]
        engine.says.put_nowait(EngineDeadError("gone"))
        for generation in generations:
            with pytest.raises(EngineDeadError, match="gone"):
                await anext(generation)
        with pytest.raises(EngineDeadError, match="gone"):
            llm.generate([[1]], [SamplingParams()], stream=True)

    with_llm(scenario)


def test_what_the_frontend_can_refuse_never_reaches_the_engine(with_llm: Callable[..., None]) -> None:
    async def scenario(llm: AsyncLLM, engine: ScriptedEngine) -> None:
        with pytest.raises(RequestTooLongError, match="64"):
            llm.generate([[1], [1] * 64], [SamplingParams(), SamplingParams()], stream=True)
        assert engine.sent == []

    with_llm(scenario)
