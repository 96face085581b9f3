"""Load on a server, and what it does under it: latencies and throughput, as its clients see them.

The measures are the field's: TTFT, time to the first token; ITL, inter-token latency, the time between two pieces of a
text; TPOT, a request's mean time for each token after the first.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import msgspec

from mainspring.engine.measure.api_client import ApiClient, ServerError
from mainspring.errors import ConfigError

_WORDS = [
    "time",
    "spring",
    "wheel",
    "gear",
    "watch",
    "hand",
    "hour",
    "minute",
    "second",
    "pin",
    "plate",
    "jewel",
    "barrel",
    "train",
    "escape",
    "lever",
    "balance",
    "hair",
    "wind",
    "tick",
    "case",
    "glass",
    "dial",
    "steel",
    "brass",
    "oil",
    "screw",
    "arbor",
    "pivot",
    "bridge",
    "click",
    "ratchet",
    "crown",
    "stem",
    "cannon",
    "motion",
]
PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """What is asked of a server.

    Attributes:
        request_rate: requests a second, arriving at random (a Poisson process); infinite: all at once.
        max_concurrency: requests under way at most; None: no limit.
        input_tokens, output_tokens: least and most; lengths are drawn from `random.Random(seed)`, all inputs first.
        vocab_size: prompts are token ids below it, of exactly these lengths; None: prompts are words, each of about a
            token.
        chat: ask through /v1/chat/completions.

    Raises:
        ConfigError: a value is out of range.
    """

    num_requests: int = 200
    request_rate: float = math.inf
    max_concurrency: int | None = None
    input_tokens: tuple[int, int] = (100, 1024)
    output_tokens: tuple[int, int] = (100, 1024)
    vocab_size: int | None = None
    chat: bool = False
    temperature: float = 0.6
    ignore_eos: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_requests", "max_concurrency", "vocab_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, but must be at least 1")
        if not self.request_rate > 0:
            raise ConfigError(f"request_rate is {self.request_rate}, but must be above 0")
        for name in ("input_tokens", "output_tokens"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ConfigError(f"{name} is {low} to {high}, but must be at least 1 and in order")
        if self.chat and self.vocab_size is not None:
            raise ConfigError("a chat's messages are text: leave out vocab_size")

    def requests(self) -> list[LoadRequest]:
        """The requests and the seconds after the start at which each arrives; the same for the same plan."""
        draw = random.Random(self.seed)
        inputs = [draw.randint(*self.input_tokens) for _ in range(self.num_requests)]
        outputs = [draw.randint(*self.output_tokens) for _ in range(self.num_requests)]
        arrival = 0.0
        requests = []
        for length, max_tokens in zip(inputs, outputs, strict=True):
            prompt: str | list[int]
            if self.vocab_size is None:
                prompt = " ".join(draw.choices(_WORDS, k=length))
            else:
                prompt = [draw.randrange(self.vocab_size) for _ in range(length)]
            requests.append(LoadRequest(prompt, max_tokens, arrival))
            if math.isfinite(self.request_rate):
                arrival += draw.expovariate(self.request_rate)
        return requests


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One request. `arrival`: seconds after the start."""

    prompt: str | list[int]
    max_tokens: int
    arrival: float


@dataclass(slots=True)
class Timing:
    """When things happened to one request, in seconds after its start."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    pieces: list[float] = field(default_factory=list)
    end: float = 0.0
    error: str | None = None

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies."""
        return [after - before for before, after in zip(self.pieces, self.pieces[1:], strict=False)]

    @property
    def per_token(self) -> float | None:
        """TPOT; None where there is one token only."""
        return (
            (self.pieces[-1] - self.pieces[0]) / (self.output_tokens - 1) if self.output_tokens > 1 else None
        )


@dataclass(frozen=True, slots=True)
class Distribution:
    """A measure over requests or pieces, in seconds."""

    mean: float
    percentiles: dict[str, float]
    max: float
    values: list[float]

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution | None:
        """The distribution of these; None if there are none."""
        if not values:
            return None
        ordered = sorted(values)
        percentiles = {f"p{p}": percentile(ordered, p) for p in PERCENTILES}
        return cls(math.fsum(ordered) / len(ordered), percentiles, ordered[-1], ordered)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of values in order, linear between neighbours (Hyndman and Fan 1996, definition 7)."""
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """What a server did. Rates are by second of `seconds`, from the first request to the last answer."""

    url: str
    model: str
    plan: dict[str, Any]
    seconds: float
    completed: int
    failed: int
    errors: dict[str, int]
    prompt_tokens: int
    output_tokens: int
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    peak_concurrency: int
    ttft: Distribution | None
    itl: Distribution | None
    tpot: Distribution | None
    e2e: Distribution | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are written to a file."""
        return asdict(self)


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: dict[str, Any] | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: dict[str, Any] | None = None


_CHUNKS = msgspec.json.Decoder(_Chunk)


async def run_load(client: ApiClient, url: str, model: str, plan: LoadPlan) -> LoadResult:
    """Sends the plan's requests, each at its time, and waits for all answers."""
    gate = asyncio.Semaphore(plan.max_concurrency or plan.num_requests)
    running = _Running()
    requests = plan.requests()
    began = time.perf_counter()

    async def send(request: LoadRequest) -> Timing:
        await asyncio.sleep(max(0.0, began + request.arrival - time.perf_counter()))
        async with gate, running:
            return await _ask(client, model, plan, request)

    timings = await asyncio.gather(*(send(request) for request in requests))
    return _result(url, model, plan, timings, time.perf_counter() - began, running.peak)


class _Running:
    """Counts the requests under way."""

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0

    async def __aenter__(self) -> None:
        self.now += 1
        self.peak = max(self.peak, self.now)

    async def __aexit__(self, *error: object) -> None:
        self.now -= 1


async def _ask(client: ApiClient, model: str, plan: LoadPlan, request: LoadRequest) -> Timing:
    """One request, timed."""
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": request.max_tokens,
        "temperature": plan.temperature,
        "stream_options": {"include_usage": True},
    }
    if plan.ignore_eos:
        body["ignore_eos"] = True
    path: Literal["/v1/completions", "/v1/chat/completions"]
    if plan.chat:
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": request.prompt}]
    else:
        path, body["prompt"] = "/v1/completions", request.prompt
    timing = Timing()
    start = time.perf_counter()
    try:
        async for when, data in client.stream(path, body):
            chunk = _CHUNKS.decode(data)
            if chunk.error is not None:
                raise ServerError(str(chunk.error.get("message")))
            if chunk.usage is not None:
                timing.prompt_tokens = chunk.usage.prompt_tokens
                timing.output_tokens = chunk.usage.completion_tokens
            if any(_has_text(choice) for choice in chunk.choices):
                timing.pieces.append(when - start)
    except (ServerError, msgspec.DecodeError) as error:
        timing.error = str(error)
    timing.end = time.perf_counter() - start
    return timing


def _has_text(choice: _Choice) -> bool:
    """Whether a piece of text came; the role and the end of an answer have none."""
    if choice.delta is not None:
        return any(choice.delta.get(name) for name in ("content", "reasoning_content", "tool_calls"))
    return bool(choice.text)


def _result(
    url: str, model: str, plan: LoadPlan, timings: Sequence[Timing], seconds: float, peak: int
) -> LoadResult:
    done = [timing for timing in timings if timing.error is None]
    prompt_tokens = sum(timing.prompt_tokens for timing in done)
    output_tokens = sum(timing.output_tokens for timing in done)
    described = asdict(plan)
    if not math.isfinite(plan.request_rate):
        described["request_rate"] = "inf"
    return LoadResult(
        url=url,
        model=model,
        plan=described,
        seconds=seconds,
        completed=len(done),
        failed=len(timings) - len(done),
        errors=dict(Counter(timing.error for timing in timings if timing.error is not None)),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        requests_per_second=len(done) / seconds,
        output_tokens_per_second=output_tokens / seconds,
        total_tokens_per_second=(prompt_tokens + output_tokens) / seconds,
        peak_concurrency=peak,
        ttft=Distribution.of([timing.pieces[0] for timing in done if timing.pieces]),
        itl=Distribution.of([gap for timing in done for gap in timing.gaps]),
        tpot=Distribution.of([t for timing in done if timing.pieces and (t := timing.per_token) is not None]),
        e2e=Distribution.of([timing.end for timing in done]),
    )
