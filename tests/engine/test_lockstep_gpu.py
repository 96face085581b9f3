"""On a GPU, with graphs, steps ahead, chunks, shared prefixes and preemption: every bit is the trainer's."""

from __future__ import annotations

import random

import pytest
import torch
from msgspec.structs import replace

from engine.test_core import FAMILY_NAMES, VOCAB, Job, Result, assert_bitwise_the_trainers, collect
from mainspring.engine.admission import make_request
from mainspring.engine.config import EngineConfig
from mainspring.engine.core import EngineCore
from mainspring.engine.sampling_params import SamplingParams
from mainspring.engine.throughput import SHAPES, random_model
from mainspring.formats.model_config import ModelConfig
from mainspring.model.decoder import Decoder
from mainspring.model.initialise import create_model
from support.families import FAMILIES, model_config

DEVICE = "cuda"

pytestmark = pytest.mark.gpu


def shortened(shape: str, num_layers: int) -> Decoder:
    """A model of a shape's widths, with fewer layers and larger weights, so that its distributions are not flat."""
    config = ModelConfig(**{**SHAPES[shape], "num_layers": num_layers})
    model = random_model(config, DEVICE, torch.bfloat16, "lockstep")
    with torch.no_grad():
        model.output_weight.mul_(4)
    return model


def mixed_jobs(count: int, vocab_size: int) -> list[Job]:
    """Prompts of 1 to 600 tokens, many of which begin alike; 1 to 120 tokens out; all ways of sampling."""
    generator = random.Random(1)
    prefixes = [[generator.randrange(vocab_size) for _ in range(n)] for n in (0, 0, 40, 260)]
    jobs: list[Job] = []
    for number in range(count):
        own = [generator.randrange(vocab_size) for _ in range(generator.randint(1, 340))]
        params = SamplingParams(
            temperature=generator.choice([0.0, 0.6, 1.0, 1.0]),
            top_p=generator.choice([1.0, 1.0, 0.9]),
            top_k=generator.choice([0, 0, 20]),
            frequency_penalty=generator.choice([0.0, 0.0, 0.0, 0.5]),
            seed=number,
            max_tokens=generator.randint(1, 120),
            logprobs=0,
            prompt_logprobs=generator.choice([None, None, None, 0]),
        )
        jobs.append((generator.choice(prefixes) + own, params))
    return jobs


def run_jobs(core: EngineCore, jobs: list[Job]) -> list[Result]:
    """A few requests arrive with every step."""
    results = [Result(prompt, [], [], None, None, None, 0) for prompt, _ in jobs]
    pending = list(enumerate(jobs))
    while pending or core.has_work():
        for number, (prompt, params) in pending[:3]:
            core.add_request(make_request(str(number), prompt, params, core.limits, ()))
        del pending[:3]
        for output in core.step():
            collect(results[int(output.request_id)], output)
    core.check_integrity()
    return results


@pytest.mark.parametrize(("shape", "num_layers"), [("qwen3-0.6b", 4), ("llama-3.1-8b", 2)])
def test_256_mixed_requests_report_the_trainers_bits(shape: str, num_layers: int) -> None:
    model = shortened(shape, num_layers)
    jobs = mixed_jobs(256, 2000)
    # A quarter of what all of them need: some are preempted, prompts are cut to chunks of 700 tokens beside decodes.
    core = EngineCore(
        model, EngineConfig(num_blocks=1100, max_model_len=1024, max_num_batched_tokens=700, max_num_seqs=128)
    )
    results = run_jobs(core, jobs)
    stats = core.stats()
    assert stats.preemptions_total > 0
    assert stats.prefix_cache_hits_total > 1000
    scored = []
    for first in range(0, len(results), 32):
        batch = results[first : first + 32]
        with torch.no_grad():
            scored += model.log_probs([result.prompt + result.tokens for result in batch])
    wrong = 0
    for result, expected in zip(results, scored, strict=True):
        values = expected.tolist()
        got = [entry.logprobs[0] for entry in result.logprobs]
        wrong += sum(a != b for a, b in zip(got, values[len(result.prompt) - 1 :], strict=True))
        if result.prompt_logprobs is not None:
            entries = [entry for entry in result.prompt_logprobs if entry is not None]
            assert len(entries) == len(result.prompt) - 1
            wrong += sum(entry.logprobs[0] != value for entry, value in zip(entries, values, strict=False))
    assert wrong == 0
    # Alone, without graphs, without a cached prefix, without lag.
    plain = EngineConfig(
        max_model_len=1024,
        num_blocks=64,
        cuda_graphs=False,
        async_scheduling=False,
        enable_prefix_caching=False,
    )
    for number in range(0, len(jobs), 16):
        alone = EngineCore(model, plain)
        [single] = run_jobs(alone, [jobs[number]])
        assert single == results[number]


def test_forks_and_fp8_run_and_new_weights_reach_the_graphs() -> None:
    model, other = shortened("qwen3-0.6b", 2), shortened("qwen3-0.6b", 2)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.03)
    params = SamplingParams(temperature=0, max_tokens=40, logprobs=0)
    prompt = [(7 * i) % 1000 for i in range(300)]
    core = EngineCore(model, EngineConfig(max_model_len=1024, num_blocks=400))
    expected = run_jobs(
        EngineCore(other, EngineConfig(max_model_len=1024, num_blocks=400)), [(prompt, params)]
    )
    first = run_jobs(core, [(prompt, params)])
    core.update_weights(other.state_dict())
    assert run_jobs(core, [(prompt, params)]) == expected != first
    core.sleep()
    core.wake()
    assert run_jobs(core, [(prompt, params)]) == expected
    forks = {str(i): Result(prompt, [], [], None, None, None, 0) for i in range(4)}
    for name in forks:
        request = make_request(name, prompt, params, core.limits, ())
        core.add_request(replace(request, fork_of="0" if name != "0" else None))
    while core.has_work():
        for output in core.step():
            collect(forks[output.request_id], output)
    assert all(result == expected[0] for result in forks.values())
    small = EngineCore(model, EngineConfig(max_model_len=1024, num_blocks=400, kv_cache_dtype="fp8"))
    assert not small.is_lockstep
    [result] = run_jobs(small, [(prompt, params)])
    assert len(result.tokens) == 40
    gaps = [
        abs(a.logprobs[0] - b.logprobs[0]) for a, b in zip(result.logprobs, expected[0].logprobs, strict=True)
    ]
    assert gaps[0] < 0.5


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_family_runs_from_graphs_with_the_trainers_bits(name: str) -> None:
    """Experts, sliding windows, biases, scaled RoPE; heads that the CUDA kernels do not take go to Triton's."""
    family = next(family for family in FAMILIES if family.name == name)
    model = create_model(model_config(family), dtype=torch.bfloat16, device=DEVICE, seed=3)
    generator = random.Random(2)
    jobs: list[Job] = []
    for number in range(12):
        prompt = [generator.randrange(VOCAB) for _ in range(generator.randint(1, 30))]
        params = SamplingParams(seed=number, max_tokens=generator.randint(1, 20), logprobs=0)
        jobs.append((prompt, params))
    core = EngineCore(model, EngineConfig(num_blocks=12, max_num_seqs=5, max_num_batched_tokens=40))
    for result in run_jobs(core, jobs):
        assert_bitwise_the_trainers(model, result)
