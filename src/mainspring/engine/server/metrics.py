"""Prometheus metrics. Names after the prefix, and meanings, are vLLM's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mainspring.engine.messages import EngineStats, TokenOutput
from mainspring.engine.outputs import FinishReason
from mainspring.engine.sampling_params import SamplingParams

PREFIX = "mainspring"
LABELS = ["model_name"]
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
TOKEN_BUCKETS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
)
# 1, 2, 5, 10, 20, 50 ... up to a million tokens.
COUNT_BUCKETS = tuple(float(step * 10**power) for power in range(7) for step in (1, 2, 5))
REQUEST_BUCKETS = (
    0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
)  # fmt: skip


@dataclass(slots=True)
class RequestClock:
    """When a request arrived, was first computed, and had its first and last token, in seconds of a monotonic clock."""

    arrived: float
    num_prompt: int
    scheduled: float | None = None
    num_cached: int = 0
    first_token: float | None = None
    last_token: float | None = None
    num_generated: int = 0


class Metrics:
    """What `/metrics` shows: the engine's last snapshot, and latencies as the frontend sees them.

    The registry belongs to this object; nothing is registered globally.
    """

    def __init__(self, model_name: str, stats: EngineStats) -> None:
        self.model_name = model_name
        self.stats = stats
        self.engine_up = True
        self.restarts = 0
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(self))
        ProcessCollector(registry=self._registry)
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", FIRST_TOKEN_BUCKETS
        )
        self._inter_token = self._histogram(
            "inter_token_latency_seconds", "From one token of a request to its next.", TOKEN_BUCKETS
        )
        self._request = self._histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its last token.", REQUEST_BUCKETS
        )
        self._queue = self._histogram(
            "request_queue_time_seconds",
            "From a request's coming to the engine to its first step.",
            REQUEST_BUCKETS,
        )
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "From a request's first step to its first token.", REQUEST_BUCKETS
        )
        self._inference = self._histogram(
            "request_inference_time_seconds",
            "From a request's first step to its last token.",
            REQUEST_BUCKETS,
        )
        self._decode = self._histogram(
            "request_decode_time_seconds", "From a request's first token to its last.", REQUEST_BUCKETS
        )
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds",
            "That time by the number of tokens after the first: a request's mean.",
            TOKEN_BUCKETS,
        )
        self._prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a request.", COUNT_BUCKETS
        )
        self._computed_tokens = self._histogram(
            "request_prefill_kv_computed_tokens",
            "Prompt tokens of a request that were not found in the prefix cache.",
            COUNT_BUCKETS,
        )
        self._generation_tokens = self._histogram(
            "request_generation_tokens", "Tokens generated for a request.", COUNT_BUCKETS
        )
        self._max_tokens = self._histogram(
            "request_params_max_tokens", "max_tokens of the requests that have it.", COUNT_BUCKETS
        )
        self._iteration_tokens = self._histogram(
            "iteration_tokens_total", "Tokens computed in one step, prompts' and new ones.", COUNT_BUCKETS
        )
        # Counted here and not by the engine, which takes the end by a stop string for an abort.
        self._ended = Counter(
            f"{PREFIX}_request_success",
            "Requests ended, by reason.",
            [*LABELS, "finished_reason"],
            registry=self._registry,
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"{PREFIX}_{name}", text, LABELS, buckets=buckets, registry=self._registry)
        return histogram.labels(self.model_name)

    def arrived(self, num_prompt: int, params: SamplingParams) -> RequestClock:
        """A request has come."""
        if params.max_tokens is not None:
            self._max_tokens.observe(params.max_tokens)
        return RequestClock(time.monotonic(), num_prompt)

    def stepped(self, stats: EngineStats) -> None:
        """The engine has sent its state."""
        before, self.stats = self.stats, stats
        if stats.steps_total > before.steps_total:
            self._iteration_tokens.observe(
                stats.prompt_tokens_total
                - before.prompt_tokens_total
                + stats.generation_tokens_total
                - before.generation_tokens_total
            )

    def tokens(self, clock: RequestClock, output: TokenOutput) -> None:
        """A step gave tokens of a request."""
        now, count = time.monotonic(), len(output.token_ids)
        if clock.last_token is None:
            clock.first_token = now
            clock.num_cached = output.num_cached_tokens
            # The engine has measured it: on the way here nothing waits.
            clock.scheduled = clock.arrived + (output.queue_seconds or 0.0)
            self._first_token.observe(now - clock.arrived)
        else:
            for _ in range(count):
                self._inter_token.observe((now - clock.last_token) / count)
        clock.last_token = now
        clock.num_generated += count

    def finished(self, clock: RequestClock, reason: FinishReason) -> None:
        """A request has ended. Aborted ones count, but their duration says nothing."""
        self._ended.labels(self.model_name, reason).inc()
        if reason == "abort":
            return
        self._request.observe(time.monotonic() - clock.arrived)
        self._prompt_tokens.observe(clock.num_prompt)
        self._computed_tokens.observe(clock.num_prompt - clock.num_cached)
        self._generation_tokens.observe(clock.num_generated)
        if clock.first_token is not None and clock.last_token is not None and clock.scheduled is not None:
            self._queue.observe(clock.scheduled - clock.arrived)
            self._prefill.observe(clock.first_token - clock.scheduled)
            self._inference.observe(clock.last_token - clock.scheduled)
            decode = clock.last_token - clock.first_token
            self._decode.observe(decode)
            if clock.num_generated > 1:
                self._per_token.observe(decode / (clock.num_generated - 1))

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the engine's last snapshot when scraped, so that no figure is kept twice."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        stats, model = self._metrics.stats, self._metrics.model_name
        used = stats.kv_blocks_used / max(stats.kv_blocks_total, 1)
        gauges = (
            ("num_requests_running", "Requests that hold KV blocks.", stats.running),
            ("num_requests_waiting", "Requests that wait for a seat or for blocks.", stats.waiting),
            ("kv_cache_usage_perc", "Share of the KV blocks in use, 1 means all.", used),
            ("engine_up", "1 while the engine process runs.", int(self._metrics.engine_up)),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=LABELS)
            gauge.add_metric([model], value)
            yield gauge
        counters = (
            ("prompt_tokens", "Prompt tokens computed.", stats.prompt_tokens_total),
            ("generation_tokens", "Tokens generated.", stats.generation_tokens_total),
            ("num_preemptions", "Requests that gave their blocks back.", stats.preemptions_total),
            ("engine_steps", "Forward passes.", stats.steps_total),
            ("engine_restarts", "Engine processes started after one had died.", self._metrics.restarts),
            (
                "prefix_cache_queries",
                "Prompt tokens looked up in the prefix cache.",
                stats.prefix_cache_queries_total,
            ),
            ("prefix_cache_hits", "Prompt tokens found in it.", stats.prefix_cache_hits_total),
            ("spec_decode_num_drafts", "Times that tokens of a request were drafted.", stats.drafts_total),
            ("spec_decode_num_draft_tokens", "Drafted tokens that were verified.", stats.draft_tokens_total),
            (
                "spec_decode_num_accepted_tokens",
                "Drafted tokens that were accepted.",
                stats.accepted_tokens_total,
            ),
        )
        for name, text, total in counters:
            counter = CounterMetricFamily(f"{PREFIX}_{name}", text, labels=LABELS)
            counter.add_metric([model], total)
            yield counter
        by_position = CounterMetricFamily(
            f"{PREFIX}_spec_decode_num_accepted_tokens_per_pos",
            "Drafts whose token at this position was accepted.",
            labels=[*LABELS, "position"],
        )
        for position, accepted in enumerate(stats.accepted_tokens_per_position):
            by_position.add_metric([model, str(position)], accepted)
        yield by_position
        config = GaugeMetricFamily(
            f"{PREFIX}_cache_config_info",
            "The KV cache's size, as labels.",
            labels=[*LABELS, "block_size", "num_gpu_blocks"],
        )
        config.add_metric([model, str(stats.block_size), str(stats.kv_blocks_total)], 1)
        yield config
