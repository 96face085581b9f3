"""The engine gives each request what it would get alone, whatever else runs and however small the cache is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mainspring.engine.admission import make_request
from mainspring.engine.config import EngineConfig
from mainspring.engine.core import EngineCore, TokenOutput
from mainspring.engine.messages import TokenLogprobs
from mainspring.engine.ranks.lead import LeadModel
from mainspring.engine.sampling_params import SamplingParams
from mainspring.errors import ConfigError, InvalidRequestError, RequestTooLongError
from mainspring.model.decoder import Decoder
from mainspring.model.initialise import create_model
from support.families import FAMILIES, model_config

VOCAB = 97
FAMILY_NAMES = [family.name for family in FAMILIES]


@lru_cache(maxsize=32)
def tiny_model(name: str, dtype: torch.dtype = torch.float32) -> Decoder:
    family = next(family for family in FAMILIES if family.name == name)
    return create_model(model_config(family), dtype=dtype, seed=3)


@dataclass
class Result:
    """Everything the engine said about one request."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[TokenLogprobs]
    prompt_logprobs: list[TokenLogprobs | None] | None
    finish_reason: str | None
    stop_reason: int | None
    rope_length: int


Job = tuple[list[int], SamplingParams]


def run(
    core: EngineCore, jobs: list[Job], arrivals: list[int] | None = None, eos: tuple[int, ...] = ()
) -> list[Result]:
    """Add each job before the step of its arrival; step until all is done; check the books at the end."""
    arrivals = arrivals or [0] * len(jobs)
    results = [Result(prompt, [], [], None, None, None, 0) for prompt, _ in jobs]
    step = 0
    while core.has_work() or step <= max(arrivals):
        for number, ((prompt, params), arrival) in enumerate(zip(jobs, arrivals, strict=True)):
            if arrival == step:
                core.add_request(make_request(str(number), prompt, params, core.limits, eos))
        for output in core.step():
            collect(results[int(output.request_id)], output)
        core.check_integrity()
        step += 1
    assert core.stats().kv_blocks_used == 0
    return results


def collect(result: Result, output: TokenOutput) -> None:
    assert result.finish_reason is None, "an output came after the last one"
    result.tokens += output.token_ids
    result.logprobs += output.logprobs or []
    result.prompt_logprobs = output.prompt_logprobs or result.prompt_logprobs
    result.finish_reason, result.stop_reason = output.finish_reason, output.stop_reason
    result.rope_length = output.rope_length or result.rope_length


def assert_bitwise_the_trainers(model: Decoder | LeadModel, result: Result) -> None:
    """Every reported log-probability, of the completion and of the prompt, equals `Decoder.log_probs`."""
    [expected] = model.log_probs([result.prompt + result.tokens], rope_length=result.rope_length)
    first = len(result.prompt) - 1
    got = [entry.logprobs[0] for entry in result.logprobs]
    assert got == expected[first:].tolist()
    assert [entry.token_ids[0] for entry in result.logprobs] == result.tokens
    if result.prompt_logprobs is not None:
        assert result.prompt_logprobs[0] is None
        entries = [entry for entry in result.prompt_logprobs if entry is not None]
        assert [entry.token_ids[0] for entry in entries] == result.prompt[1:]
        assert [entry.logprobs[0] for entry in entries] == expected[:first].tolist()


prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30)
random_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.8, 1.3]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.9]),
    seed=st.integers(0, 1000),
    max_tokens=st.integers(1, 12),
    logprobs=st.sampled_from([0, 3]),
    prompt_logprobs=st.sampled_from([None, 0, 2]),
)
small_engines = st.builds(
    EngineConfig,
    max_num_seqs=st.integers(1, 5),
    max_num_batched_tokens=st.integers(1, 40),
    block_size=st.sampled_from([1, 4, 16]),
    num_blocks=st.sampled_from([41, 48, 64]),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(FAMILY_NAMES),
    config=small_engines,
    jobs=st.lists(st.tuples(prompts, random_params, st.integers(0, 6)), min_size=1, max_size=6),
)
def test_lockstep_log_probabilities_are_bitwise_the_trainers(
    dtype: torch.dtype, name: str, config: EngineConfig, jobs: list[tuple[list[int], SamplingParams, int]]
) -> None:
    model = tiny_model(name, dtype)
    requests = [(prompt, params) for prompt, params, _ in jobs]
    results = run(EngineCore(model, config), requests, [arrival for _, _, arrival in jobs])
    for result, (_, params) in zip(results, requests, strict=True):
        assert len(result.tokens) == params.max_tokens
        assert_bitwise_the_trainers(model, result)
    alone = [run(EngineCore(model), [request])[0] for request in requests]
    assert [r.tokens for r in results] == [r.tokens for r in alone]
    assert [r.logprobs for r in results] == [r.logprobs for r in alone]


def test_preempted_requests_go_on_with_the_same_tokens_and_log_probabilities() -> None:
    model = tiny_model("llama")
    params = [SamplingParams(max_tokens=20, seed=i, logprobs=2, prompt_logprobs=1) for i in range(4)]
    jobs: list[Job] = [([i, 5, 9, 2 * i], p) for i, p in enumerate(params)]
    roomy = EngineCore(model, EngineConfig(num_blocks=64, block_size=4))
    expected = run(roomy, jobs)
    assert roomy.stats().preemptions_total == 0
    tight = EngineCore(
        model, EngineConfig(num_blocks=7, block_size=4, max_num_batched_tokens=9, max_num_seqs=4)
    )
    got = run(tight, jobs)
    assert tight.stats().preemptions_total > 0
    assert got == expected
    for result in got:
        assert_bitwise_the_trainers(model, result)
    # A recomputed prompt token counts once.
    assert tight.stats().prompt_tokens_total == 16
    assert tight.stats().generation_tokens_total == 80
    assert tight.stats().finished_total == {"stop": 0, "length": 4, "abort": 0}


def test_the_base_of_dynamic_rope_is_fixed_at_admission_and_reported() -> None:
    model = tiny_model("rope-dynamic")  # 64 positions before the base grows
    params = [SamplingParams(temperature=0, max_tokens=n, logprobs=0, prompt_logprobs=0) for n in (10, 60)]
    prompt = [(7 * i) % VOCAB for i in range(60)]
    results = run(EngineCore(model, EngineConfig(max_num_batched_tokens=64)), [(prompt, p) for p in params])
    assert [result.rope_length for result in results] == [70, 120]
    for result in results:
        assert_bitwise_the_trainers(model, result)
    # The two bases differ, and so do the same prompt's log-probabilities.
    assert results[0].prompt_logprobs != results[1].prompt_logprobs


def test_greedy_tokens_are_the_likeliest_at_every_position() -> None:
    model = tiny_model("qwen3")
    jobs: list[Job] = [([7, 3, 1], SamplingParams(temperature=0, max_tokens=10, logprobs=1))]
    [result] = run(EngineCore(model), jobs)
    for entry in result.logprobs:
        assert entry.rank == 1
        # The generated token, then the likeliest: the same one with the same bits.
        assert entry.token_ids[0] == entry.token_ids[1]
        assert entry.logprobs[0] == entry.logprobs[1]


def test_alternatives_are_sorted_and_the_rank_counts_the_likelier_tokens() -> None:
    model = tiny_model("llama")
    jobs: list[Job] = [([4, 4], SamplingParams(temperature=1.5, seed=1, max_tokens=12, logprobs=20))]
    [result] = run(EngineCore(model), jobs)
    ranks = [entry.rank for entry in result.logprobs]
    assert max(ranks) > 1
    for entry in result.logprobs:
        alternatives = entry.logprobs[1:]
        assert len(alternatives) == 20
        assert alternatives == sorted(alternatives, reverse=True)
        likelier = sum(logprob > entry.logprobs[0] for logprob in alternatives)
        assert likelier == min(entry.rank - 1, 20)


def test_the_same_engine_seed_gives_the_same_tokens_and_requests_differ() -> None:
    model = tiny_model("llama")
    jobs: list[Job] = [([1, 2, 3], SamplingParams(max_tokens=15))] * 3
    first = run(EngineCore(model, EngineConfig(seed=11)), jobs)
    second = run(EngineCore(model, EngineConfig(seed=11)), jobs)
    assert [r.tokens for r in first] == [r.tokens for r in second]
    assert len({tuple(r.tokens) for r in first}) == 3


def greedy_tokens(model: Decoder, prompt: list[int], count: int) -> list[int]:
    [result] = run(EngineCore(model), [(prompt, SamplingParams(temperature=0, max_tokens=count))])
    return result.tokens


def test_end_of_text_stop_tokens_and_length_end_a_request() -> None:
    model = tiny_model("llama")
    prompt = [3, 1, 4]
    tokens = greedy_tokens(model, prompt, 12)
    end = tokens[5]
    cut = tokens[: tokens.index(end) + 1]

    def ended(eos: tuple[int, ...] = (), **params: object) -> tuple[list[int], str | None, int | None]:
        merged = SamplingParams(temperature=0, max_tokens=12, **params)
        [result] = run(EngineCore(model), [(prompt, merged)], eos=eos)
        return result.tokens, result.finish_reason, result.stop_reason

    assert ended() == (tokens, "length", None)
    assert ended(eos=(end,)) == (cut, "stop", None)
    assert ended(stop_token_ids=[end]) == (cut, "stop", end)
    assert ended(eos=(end,), ignore_eos=True) == (tokens, "length", None)
    late, reason, _ = ended(eos=(end,), min_tokens=len(cut))
    assert end not in late[: len(cut)]
    assert len(late) > len(cut) or reason == "length"


def test_abort_frees_the_blocks_at_once_and_nothing_more_comes() -> None:
    core = EngineCore(tiny_model("llama"), EngineConfig(num_blocks=32, block_size=4, max_num_seqs=1))
    for name in ("running", "waiting"):
        core.add_request(make_request(name, [1] * 9, SamplingParams(max_tokens=9), core.limits, ()))
    core.step()
    assert (core.stats().running, core.stats().waiting) == (1, 1)
    assert core.stats().kv_blocks_used == 3
    assert core.abort("waiting")
    assert core.abort("running")
    assert not core.abort("running")
    assert core.stats().kv_blocks_used == 0
    assert not core.has_work()
    assert core.step() == []
    assert core.stats().finished_total["abort"] == 2
    core.check_integrity()


def test_an_id_in_use_is_refused_and_free_again_afterwards() -> None:
    core = EngineCore(tiny_model("llama"))
    request = make_request("x", [1, 2], SamplingParams(max_tokens=1), core.limits, ())
    core.add_request(request)
    with pytest.raises(InvalidRequestError, match="'x' is in use"):
        core.add_request(request)
    core.step()
    core.add_request(request)
    assert len(core.step()) == 1


def test_limits_follow_from_model_and_cache() -> None:
    model = tiny_model("llama")  # context 64
    core = EngineCore(model, EngineConfig(num_blocks=3, block_size=8))
    assert (core.limits.max_model_len, core.limits.max_cache_tokens, core.limits.vocab_size) == (
        64,
        24,
        VOCAB,
    )
    with pytest.raises(RequestTooLongError, match="whole cache holds 24"):
        make_request("r", [1] * 20, SamplingParams(max_tokens=6), core.limits, ())
    [result] = run(core, [([1] * 20, SamplingParams(max_tokens=5))])
    assert len(result.tokens) == 5
    with pytest.raises(ConfigError, match=r"max_model_len is 65.*64"):
        EngineCore(model, EngineConfig(max_model_len=65))
    # 2 (k, v) * 3 layers * 16 tokens * 2 heads * 8 * 4 bytes = 6,144 a block, one of them the null block.
    assert EngineCore(model, EngineConfig(kv_cache_bytes=6144 * 10)).stats().kv_blocks_total == 9
    with pytest.raises(ConfigError, match="kv_cache_bytes is 6144"):
        EngineCore(model, EngineConfig(kv_cache_bytes=6144))
    assert EngineCore(tiny_model("rope-dynamic")).limits.max_model_len == 128


def test_a_request_may_fill_the_context_to_the_last_token() -> None:
    model = tiny_model("llama")
    params = SamplingParams(temperature=0, max_tokens=None, logprobs=0)
    [result] = run(EngineCore(model), [([1] * 60, params)])
    assert len(result.tokens) == 4
    assert result.finish_reason == "length"
    assert_bitwise_the_trainers(model, result)


def test_a_failed_step_leaves_the_engine_able_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    core = EngineCore(model)
    job: Job = ([1, 2, 3], SamplingParams(temperature=0, max_tokens=6))
    core.add_request(make_request("0", *job, core.limits, ()))
    first = core.step()[0].token_ids
    with monkeypatch.context() as patch:
        patch.setattr(model, "logits", lambda hidden: (_ for _ in ()).throw(MemoryError("none left")))
        with pytest.raises(MemoryError):
            core.step()
    core.check_integrity()
    while core.has_work():
        first += core.step()[0].token_ids
    assert first == greedy_tokens(model, [1, 2, 3], 6)
