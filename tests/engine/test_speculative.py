"""Speculation changes how fast a text comes and nothing else: tokens and log-probabilities are those without it."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mainspring.engine.admission import make_request
from mainspring.engine.config import EngineConfig
from mainspring.engine.core import EngineCore
from mainspring.engine.messages import EngineRequest, TokenLogprobs
from mainspring.engine.ngram_drafter import NgramDrafter
from mainspring.engine.request import Request
from mainspring.engine.sampling_params import SamplingParams
from mainspring.engine.speculative import SpeculativeConfig
from mainspring.errors import ConfigError
from mainspring.model.decoder import Decoder
from mainspring.model.initialise import create_model
from support.families import FAMILIES, model_config

VOCAB = 97
NGRAM = SpeculativeConfig(num_speculative_tokens=3, prompt_lookup_max=3, prompt_lookup_min=1)
DRAFT = SpeculativeConfig(num_speculative_tokens=3, method="draft_model")

Job = tuple[list[int], SamplingParams]
Results = list[tuple[list[int], list[TokenLogprobs]]]


@lru_cache(maxsize=8)
def tiny_model(name: str, seed: int = 3, dtype: torch.dtype = torch.float32) -> Decoder:
    family = next(family for family in FAMILIES if family.name == name)
    return create_model(model_config(family), dtype=dtype, seed=seed)


def run(core: EngineCore, jobs: list[Job], eos: tuple[int, ...] = ()) -> Results:
    """Tokens and log-probabilities of each job; all are added at once."""
    results: Results = [([], []) for _ in jobs]
    for number, (prompt, params) in enumerate(jobs):
        core.add_request(make_request(str(number), prompt, params, core.limits, eos))
    while core.has_work():
        for output in core.step():
            tokens, logprobs = results[int(output.request_id)]
            tokens += output.token_ids
            logprobs += output.logprobs or []
            assert output.logprobs is None or len(output.logprobs) == len(output.token_ids)
        core.check_integrity()
    assert core.stats().kv_blocks_used == 0
    return results


params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0]),
    top_k=st.sampled_from([0, 4]),
    top_p=st.sampled_from([1.0, 0.9]),
    seed=st.integers(0, 1000),
    max_tokens=st.integers(1, 25),
    min_tokens=st.sampled_from([0, 1]),
    logprobs=st.sampled_from([None, 0, 2]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    stop_token_ids=st.sampled_from([None, [5, 6, 7, 8]]),
)
prompts = st.lists(st.integers(0, 9), min_size=1, max_size=20)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["llama", "mistral-window", "qwen3-moe", "rope-dynamic"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    method=st.sampled_from(["ngram", "itself", "another"]),
    jobs=st.lists(st.tuples(prompts, params), min_size=1, max_size=4),
    blocks=st.sampled_from([12, 40]),
    budget=st.sampled_from([8, 64]),
    ahead=st.booleans(),
)
def test_text_and_log_probabilities_are_bitwise_those_without_speculation(
    name: str, dtype: torch.dtype, method: str, jobs: list[Job], blocks: int, budget: int, ahead: bool
) -> None:
    model = tiny_model(name, dtype=dtype)
    limits = {
        "num_blocks": blocks,
        "block_size": 4,
        "max_num_batched_tokens": budget,
        "max_num_seqs": 3,
        "async_scheduling": ahead,
    }
    expected = run(EngineCore(model, EngineConfig(num_blocks=64)), jobs, eos=(3,))
    draft = {"ngram": None, "itself": model, "another": tiny_model(name, 4, dtype)}[method]
    config = EngineConfig(**limits, speculative=NGRAM if draft is None else DRAFT)
    core = EngineCore(model, config, draft_model=draft)
    assert run(core, jobs, eos=(3,)) == expected
    stats = core.stats()
    assert sum(stats.accepted_tokens_per_position) == stats.accepted_tokens_total <= stats.draft_tokens_total


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_drafts_for_itself_is_always_right(temperature: float) -> None:
    model = tiny_model("llama")
    sampling = SamplingParams(temperature=temperature, seed=5, max_tokens=33)
    core = EngineCore(model, EngineConfig(num_blocks=40, speculative=DRAFT), draft_model=model)
    run(core, [([1, 2, 3], sampling), ([4], sampling)])
    stats = core.stats()
    # The last step drafts only what may still be kept; the same random numbers draw the same tokens.
    assert stats.accepted_tokens_total == stats.draft_tokens_total
    assert stats.steps_total == 1 + 8  # the prompt, then four tokens a step
    assert stats.accepted_tokens_per_position == (16, 16, 16)


@pytest.mark.parametrize("config", [DRAFT, NGRAM], ids=lambda c: c.method)
def test_a_text_goes_on_after_sleep_with_its_drafts(config: SpeculativeConfig) -> None:
    model = tiny_model("llama")
    job = [1, 2, 3], SamplingParams(temperature=1.0, seed=5, max_tokens=33)
    [(expected, _)] = run(EngineCore(model, EngineConfig(num_blocks=40)), [job])
    drafts = model if config is DRAFT else None
    core = EngineCore(model, EngineConfig(num_blocks=40, speculative=config), draft_model=drafts)
    core.add_request(make_request("0", *job, core.limits, ()))
    outputs = [output for _ in range(4) for output in core.step()] + core.sleep()
    assert 0 < sum(len(output.token_ids) for output in outputs) < 33
    before = core.stats().accepted_tokens_total
    core.wake()
    while core.has_work():
        outputs += core.step()
    assert [token for output in outputs for token in output.token_ids] == expected
    assert config is NGRAM or core.stats().accepted_tokens_total > before


def test_a_text_that_repeats_its_prompt_takes_few_steps() -> None:
    model = tiny_model("llama")
    greedy = SamplingParams(temperature=0, max_tokens=40)
    [(tokens, _)] = run(EngineCore(model, EngineConfig(num_blocks=40)), [([1, 2, 3], greedy)])
    # A prompt that holds the whole answer already.
    core = EngineCore(model, EngineConfig(num_blocks=40, speculative=NGRAM))
    [(again, _)] = run(core, [([1, 2, 3], greedy)])
    assert again == tokens
    stats = core.stats()
    assert stats.drafts_total > 0
    assert stats.steps_total == 40 - stats.accepted_tokens_total


def draft(
    tokens: list[int], drafter: NgramDrafter, request_id: str = "r", max_tokens: int = 100
) -> list[int]:
    request = Request(EngineRequest(request_id, tokens, SamplingParams(), (), max_tokens), 0)
    drafter.propose([request])
    return request.draft_token_ids


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 4, 5, 9, 1, 2], [3, 4, 5]),
        ([1, 2, 3, 1, 2, 7, 1, 2], [7, 1, 2]),  # the latest place
        ([8, 1, 2, 3, 9, 1, 2, 5, 8, 1, 2], [3, 9, 1]),  # the longest run
        ([4, 4], [4, 4, 4]),  # it repeats itself
        ([1, 2, 1, 2], [1, 2, 1]),
        ([1, 2, 3], []),
        ([1], []),
    ],
)
def test_the_text_is_looked_up_by_its_longest_end(tokens: list[int], expected: list[int]) -> None:
    assert draft(tokens, NgramDrafter(3, 3, 1)) == expected


def test_a_growing_text_is_looked_up_like_a_whole_one() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 3, (60,), generator=generator).tolist()
    drafter = NgramDrafter(4, 4, 2)
    request = Request(EngineRequest("r", tokens[:1], SamplingParams(), (), 100), 0)
    for i in range(1, 60):
        drafter.propose([request])
        assert request.draft_token_ids == draft(tokens[:i], NgramDrafter(4, 4, 2))
        request.token_ids.append(tokens[i])
    # A new request under an old name starts anew.
    request.is_finished = True
    assert draft([7, 7, 7], drafter) == [7, 7, 7, 7]


def test_no_more_is_drafted_than_may_be_kept() -> None:
    assert draft([4, 4, 4], NgramDrafter(5, 2, 1), max_tokens=3) == [4, 4]
    assert draft([4, 4, 4], NgramDrafter(5, 2, 1), max_tokens=1) == []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_speculative_tokens": 0}, "num_speculative_tokens is 0"),
        ({"num_speculative_tokens": 33}, "1 to 32"),
        ({"prompt_lookup_min": 5, "prompt_lookup_max": 4}, "prompt_lookup_min is 5"),
        ({"method": "crystal ball"}, "crystal ball"),
        ({"model": "x"}, "method='draft_model'"),
    ],
)
def test_speculative_config_refuses(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SpeculativeConfig(**values)


def test_a_draft_model_that_does_not_fit_is_refused() -> None:
    model = tiny_model("llama")
    family = next(family for family in FAMILIES if family.name == "llama")
    config = model_config(family)
    other = create_model(type(config).from_dict({**config.to_dict(), "vocab_size": 98}), seed=1)
    with pytest.raises(ConfigError, match="98 tokens, the model 97"):
        EngineCore(model, EngineConfig(num_blocks=9, speculative=DRAFT), draft_model=other)
    with pytest.raises(ConfigError, match="needs a model"):
        EngineCore(model, EngineConfig(num_blocks=9, speculative=DRAFT))
    with pytest.raises(ConfigError, match="no speculative configuration"):
        EngineCore(model, EngineConfig(num_blocks=9), draft_model=other)
