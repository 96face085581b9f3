"""Steps launched ahead, decode steps of fixed sizes, shared prefixes and forks change no token and no bit."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from engine.test_core import (
    FAMILY_NAMES,
    VOCAB,
    Job,
    Result,
    assert_bitwise_the_trainers,
    collect,
    random_params,
    run,
    tiny_model,
)
from mainspring.engine import model_runner
from mainspring.engine.admission import make_request
from mainspring.engine.config import EngineConfig
from mainspring.engine.core import EngineCore
from mainspring.engine.sampling_params import SamplingParams
from mainspring.errors import ConfigError
from mainspring.ops.decode_order import Ints, decode_order

# As on a GPU: one step of lag, decode steps of fixed sizes.
AHEAD: dict[str, Any] = {"async_scheduling": True, "cuda_graphs": True}


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(FAMILY_NAMES),
    budget=st.integers(5, 40),
    block_size=st.sampled_from([1, 4, 16]),
    num_blocks=st.sampled_from([48, 64, 400]),
    shared=st.integers(0, 20),
    jobs=st.lists(
        st.tuples(
            st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=10), random_params, st.integers(0, 9)
        ),
        min_size=1,
        max_size=6,
    ),
)
def test_whatever_runs_ahead_and_is_shared_tokens_and_bits_are_those_of_each_request_alone(
    name: str,
    budget: int,
    block_size: int,
    num_blocks: int,
    shared: int,
    jobs: list[tuple[list[int], SamplingParams, int]],
) -> None:
    model = tiny_model(name)
    prefix = [(3 * i + 1) % VOCAB for i in range(shared)]
    requests = [(prefix + prompt, params) for prompt, params, _ in jobs]
    config = EngineConfig(
        max_num_seqs=5, max_num_batched_tokens=budget, block_size=block_size, num_blocks=num_blocks, **AHEAD
    )
    core = EngineCore(model, config)
    arrivals = [arrival for _, _, arrival in jobs]
    results = run(core, requests, arrivals)
    alone = [run(EngineCore(model), [request])[0] for request in requests]
    for _ in range(2):
        for result, single in zip(results, alone, strict=True):
            assert result == single
            assert_bitwise_the_trainers(model, result)
        results = run(core, requests, arrivals)  # once more, now with everything in the cache


def test_rows_that_stand_in_the_order_of_their_lengths_are_each_their_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU, where decode steps are sorted; here, for a device that reads two sequences at a time."""
    monkeypatch.setattr(model_runner, "decode_lanes", lambda heads, device: 2)
    orders: list[list[int]] = []

    def sorted_as_ever(contexts: Ints, lanes: int) -> Ints:
        order = decode_order(contexts, lanes)
        orders.append(order.tolist())
        return order

    monkeypatch.setattr(model_runner, "decode_order", sorted_as_ever)
    model = tiny_model("llama")
    jobs: list[Job] = [
        (
            [(5 * i + j) % VOCAB for j in range(3 + 7 * i % 11)],
            SamplingParams(max_tokens=6 + 3 * i % 8, seed=i, logprobs=2),
        )
        for i in range(6)
    ]
    results = run(EngineCore(model, EngineConfig(num_blocks=200, **AHEAD)), jobs, [0, 0, 1, 2, 2, 3])
    assert any(order != sorted(order) for order in orders)
    for job, result in zip(jobs, results, strict=True):
        assert result == run(EngineCore(model), [job])[0]


def test_preemption_with_a_token_in_flight_loses_nothing() -> None:
    model = tiny_model("llama")
    params = [SamplingParams(max_tokens=20, seed=i, logprobs=2) for i in range(4)]
    jobs: list[Job] = [([i, 5, 9, 2 * i], p) for i, p in enumerate(params)]
    expected = run(EngineCore(model), jobs)
    tight = EngineCore(
        model, EngineConfig(num_blocks=7, block_size=4, max_num_batched_tokens=9, max_num_seqs=4, **AHEAD)
    )
    assert run(tight, jobs) == expected
    assert tight.stats().preemptions_total > 0
    assert tight.stats().generation_tokens_total == 80


def test_a_stop_token_that_is_seen_one_step_late_ends_the_request_all_the_same() -> None:
    model = tiny_model("llama")
    plain: Job = ([3, 1, 4], SamplingParams(temperature=0, max_tokens=12))
    [tokens] = [result.tokens for result in run(EngineCore(model), [plain])]
    stop = tokens[5]
    params = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[stop])
    core = EngineCore(model, EngineConfig(**AHEAD))
    [result] = run(core, [([3, 1, 4], params)])
    assert result.tokens == tokens[: tokens.index(stop) + 1]
    assert (result.finish_reason, result.stop_reason) == ("stop", stop)
    assert core.stats().generation_tokens_total == len(result.tokens)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("length", [1, 4, 13, 16])
def test_forks_share_the_prompts_blocks_and_go_their_own_ways(length: int, ahead: bool) -> None:
    model = tiny_model("llama")
    options = AHEAD if ahead else {}
    core = EngineCore(
        model, EngineConfig(block_size=4, num_blocks=200, enable_prefix_caching=False, **options)
    )
    prompt = [(7 * i) % VOCAB for i in range(length)]
    params = [SamplingParams(seed=i, max_tokens=10, logprobs=0) for i in range(4)]
    results = {str(i): Result(prompt, [], [], None, None, None, 0) for i in range(4)}
    for i, own in enumerate(params):
        request = make_request(str(i), prompt, own, core.limits, ())
        core.add_request(replace(request, fork_of="0" if i else None))
    most = 0
    while core.has_work():
        for output in core.step():
            collect(results[output.request_id], output)
        core.check_integrity()
        most = max(most, core.stats().kv_blocks_used)
    alone = [run(EngineCore(model), [(prompt, own)])[0] for own in params]
    for i in range(4):
        assert results[str(i)] == alone[i]
    shared = (length - 1) // 4
    assert most <= shared + 4 * (-(-(length + 10) // 4) - shared)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_pooled_hidden_states_do_not_depend_on_chunks_or_company(pooling: str) -> None:
    model = tiny_model("qwen3")
    prompts = [[(5 * i + n) % VOCAB for i in range(n)] for n in (1, 9, 33, 64)]
    got: list[dict[str, list[float]]] = []
    for budget in (7, 512):
        core = EngineCore(model, EngineConfig(max_num_batched_tokens=budget, max_num_seqs=3))
        vectors: dict[str, list[float]] = {}
        for number, prompt in enumerate(prompts):
            request = make_request(str(number), prompt, SamplingParams(), core.limits, (), pooling=pooling)
            core.add_request(request)
        core.add_request(make_request("text", [1, 2], SamplingParams(max_tokens=9), core.limits, ()))
        while core.has_work():
            for output in core.step():
                if output.embedding is not None:
                    assert (output.finish_reason, output.token_ids) == ("stop", [])
                    vectors[output.request_id] = output.embedding
        assert core.stats().kv_blocks_used == 0
        got.append(vectors)
    assert got[0] == got[1]
    from mainspring.ops import TokenBatch

    for number, prompt in enumerate(prompts):
        with torch.no_grad():
            hidden = model(torch.tensor(prompt), TokenBatch.packed([len(prompt)])).float()
        expected = hidden.mean(0) if pooling == "mean" else hidden[-1]
        assert torch.equal(torch.tensor(got[0][str(number)]), expected)


def test_mixed_requests_at_random_with_aborts_leave_no_block_behind() -> None:
    generator = random.Random(7)
    core = EngineCore(
        tiny_model("llama"),
        EngineConfig(block_size=4, num_blocks=24, max_num_seqs=6, max_num_batched_tokens=20, **AHEAD),
    )
    alive: set[str] = set()
    for number in range(120):
        name = str(number)
        prompt = [generator.randrange(3) for _ in range(generator.randint(1, 30))]
        params = SamplingParams(
            max_tokens=generator.randint(1, 15), stop_token_ids=[generator.randrange(VOCAB)]
        )
        core.add_request(make_request(name, prompt, params, core.limits, ()))
        alive.add(name)
        if alive and generator.random() < 0.3:
            victim = generator.choice(sorted(alive))
            core.abort(victim)
            alive.discard(victim)
        for _ in range(generator.randint(0, 4)):
            for output in core.step():
                assert output.request_id in alive
                if output.finish_reason is not None:
                    alive.discard(output.request_id)
            core.check_integrity()
    while core.has_work():
        for output in core.step():
            if output.finish_reason is not None:
                alive.discard(output.request_id)
    assert not alive
    assert core.stats().kv_blocks_used == 0
    core.check_integrity()


def test_settings_that_this_machine_cannot_keep_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_dtype is 'fp8'.*cpu"):
        EngineCore(tiny_model("llama"), EngineConfig(kv_cache_dtype="fp8"))
    with pytest.raises(ConfigError, match="scheduling_policy is 'sjf'"):
        EngineConfig(scheduling_policy="sjf")
    core = EngineCore(tiny_model("llama"), EngineConfig(num_blocks=16))
    assert core.is_lockstep
    # Context 64; 17 blocks of 16 tokens, 3 layers of 2 heads of 8 elements, keys and values in float32.
    assert core.describe() == (
        "KV cache: 256 tokens in 16 blocks of 16 (0.00 GiB, float32): 4.0 sequences of the greatest length, 64 tokens"
    )
