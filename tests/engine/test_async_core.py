"""Steps launched ahead, decode steps of fixed sizes, shared prefixes and forks change no token and no bit."""

from __future__ import annotations

import random

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
from mainspring.engine.admission import make_request
from mainspring.engine.config import EngineConfig
from mainspring.engine.core import EngineCore
from mainspring.engine.sampling_params import SamplingParams
from mainspring.engine.weights import weights_checksum
from mainspring.errors import CheckpointError, ConfigError
from mainspring.model.initialise import create_model

# As on a GPU: one step of lag, decode steps of fixed sizes.
AHEAD = {"async_scheduling": True, "cuda_graphs": True}


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


def test_the_second_request_with_a_prompt_computes_only_its_last_block() -> None:
    core = EngineCore(tiny_model("qwen3"), EngineConfig(block_size=4))
    prompt = [(5 * i) % VOCAB for i in range(23)]
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=0)
    cached = []
    for number in range(3):
        longer = prompt + [7] * number
        core.add_request(make_request("r", longer, params, core.limits, ()))
        while core.has_work():
            cached += [output.num_cached_tokens for output in core.step() if output.rope_length is not None]
    assert cached == [0, 20, 24]  # the second one's prompt filled a block more
    assert core.stats().prefix_cache_queries_total == 23 + 24 + 25
    assert core.stats().prefix_cache_hits_total == 44
    core.check_integrity()


def test_a_conversation_that_goes_on_finds_the_generated_tokens_in_the_cache() -> None:
    core = EngineCore(tiny_model("llama"), EngineConfig(block_size=4, **AHEAD))
    params = SamplingParams(temperature=0, max_tokens=15)
    [first] = run(core, [([1, 2, 3], params)])
    [second] = run(core, [([1, 2, 3, *first.tokens, 9], params)])
    assert core.stats().prefix_cache_hits_total == 16  # 3 + 15 tokens, of which the last was never computed
    assert second.tokens == run(EngineCore(tiny_model("llama")), [(second.prompt, params)])[0].tokens


def test_salts_adapters_and_turning_it_off_keep_prefixes_apart() -> None:
    core = EngineCore(tiny_model("llama"), EngineConfig(block_size=4))
    off = EngineCore(tiny_model("llama"), EngineConfig(block_size=4, enable_prefix_caching=False))

    def hits(core: EngineCore, **fields: object) -> int:
        before = core.stats().prefix_cache_hits_total
        request = make_request("r", list(range(20)), SamplingParams(max_tokens=1), core.limits, ())
        core.add_request(replace(request, **fields))
        while core.has_work():
            core.step()
        return core.stats().prefix_cache_hits_total - before

    assert [hits(core), hits(core), hits(core, cache_salt="a"), hits(core, cache_salt="a")] == [0, 16, 0, 16]
    assert [hits(off), hits(off)] == [0, 0]


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


def test_priority_goes_before_arrival_and_keeps_its_blocks() -> None:
    model = tiny_model("llama")
    core = EngineCore(model, EngineConfig(max_num_seqs=1, scheduling_policy="priority"))
    for name, priority in (("late", 5), ("urgent", -1), ("normal", 0), ("normal too", 0)):
        request = make_request(name, [1, 2], SamplingParams(max_tokens=1), core.limits, ())
        core.add_request(replace(request, priority=priority))
    order = []
    while core.has_work():
        order += [output.request_id for output in core.step()]
    assert order == ["urgent", "normal", "normal too", "late"]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_pooled_hidden_states_do_not_depend_on_chunks_or_company(pooling: str) -> None:
    model = tiny_model("qwen3")
    prompts = [[(5 * i + n) % VOCAB for i in range(n)] for n in (1, 9, 33, 64)]
    got: list[dict[str, list[float]]] = []
    for budget in (7, 512):
        core = EngineCore(model, EngineConfig(max_num_batched_tokens=budget, max_num_seqs=3))
        vectors: dict[str, list[float]] = {}
        for number, prompt in enumerate(prompts):
            request = make_request(str(number), prompt, SamplingParams(), core.limits, (), pooling=pooling)  # type: ignore[arg-type]
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


def test_new_weights_are_used_at_once_and_old_prefixes_are_forgotten() -> None:
    model, other = tiny_model("llama"), create_model(tiny_model("llama").config, seed=5)
    served = create_model(model.config, seed=3)
    core = EngineCore(served, EngineConfig(block_size=4))
    job: Job = (list(range(20)), SamplingParams(temperature=0, max_tokens=8, logprobs=0))
    assert run(core, [job]) == run(EngineCore(model), [job])
    address = served.embedding.data_ptr()
    checksum = core.update_weights(other.state_dict())
    assert served.embedding.data_ptr() == address
    assert checksum == weights_checksum(other) != weights_checksum(model)
    assert run(core, [job]) == run(EngineCore(other), [job])
    assert core.stats().prefix_cache_hits_total == 0


def test_a_request_that_outlives_new_weights_shares_nothing_afterwards() -> None:
    served, other = (
        create_model(tiny_model("llama").config, seed=3),
        create_model(tiny_model("llama").config, seed=5),
    )
    core = EngineCore(served, EngineConfig(block_size=4))
    core.add_request(
        make_request("old", list(range(9)), SamplingParams(temperature=0, max_tokens=20), core.limits, ())
    )
    for _ in range(5):
        core.step()
    core.update_weights(other.state_dict())
    tokens = []
    while core.has_work():
        tokens += core.step()
    prompt = list(range(9))
    [result] = run(core, [(prompt, SamplingParams(temperature=0, max_tokens=8, logprobs=0))])
    assert core.stats().prefix_cache_hits_total == 0
    assert_bitwise_the_trainers(other, result)


def test_weights_that_do_not_fit_change_nothing() -> None:
    served = create_model(tiny_model("llama").config, seed=3)
    core = EngineCore(served)
    before = weights_checksum(served)
    state = dict(create_model(served.config, seed=5).state_dict())
    state["model.norm.weight"] = torch.ones(3)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*\[3\]"):
        core.update_weights(state)
    with pytest.raises(CheckpointError, match="no tensor 'other'"):
        core.update_weights({"other": torch.ones(3)})
    assert weights_checksum(served) == before


def test_the_checksum_sees_every_element_and_its_place() -> None:
    model = create_model(tiny_model("llama").config, seed=3)
    seen = {weights_checksum(model)}
    with torch.no_grad():
        row = model.embedding[3].clone()
        model.embedding[3] = model.embedding[4]
        model.embedding[4] = row
        seen.add(weights_checksum(model))
        model.embedding[4, 1] = torch.nextafter(model.embedding[4, 1], torch.tensor(1.0))
        seen.add(weights_checksum(model))
    assert len(seen) == 3


@pytest.mark.parametrize("ahead", [False, True])
def test_sleeping_gives_the_cache_back_and_waking_goes_on_with_the_same_tokens(ahead: bool) -> None:
    model = tiny_model("llama")
    jobs: list[Job] = [([i, 2], SamplingParams(seed=i, max_tokens=12, logprobs=0)) for i in range(3)]
    expected = run(EngineCore(model), jobs)
    core = EngineCore(model, EngineConfig(num_blocks=64, **(AHEAD if ahead else {})))
    results = [Result(prompt, [], [], None, None, None, 0) for prompt, _ in jobs]
    for number, (prompt, params) in enumerate(jobs):
        core.add_request(make_request(str(number), prompt, params, core.limits, ()))
    outputs = [output for _ in range(4) for output in core.step()]
    outputs += core.sleep()
    assert core.is_sleeping
    assert core.stats().kv_blocks_used == 0
    assert not core.has_work()
    assert core.step() == []
    with pytest.raises(ConfigError, match="sleeps"):
        core.resume()
    core.wake()
    while core.has_work():
        outputs += core.step()
    for output in outputs:
        collect(results[int(output.request_id)], output)
    assert results == expected


def test_a_paused_engine_hands_out_what_is_under_way_and_nothing_else() -> None:
    core = EngineCore(tiny_model("llama"), EngineConfig(**AHEAD))
    core.add_request(make_request("r", [1, 2], SamplingParams(max_tokens=5), core.limits, ()))
    assert core.step() == []
    core.pause()
    assert [len(output.token_ids) for output in core.step()] == [1]
    assert not core.has_work()
    assert core.step() == []
    core.resume()
    tokens = 1
    while core.has_work():
        tokens += sum(len(output.token_ids) for output in core.step())
    assert tokens == 5


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
