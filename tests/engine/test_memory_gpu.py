"""On a GPU: the cache that is sized by default leaves room for the largest steps, and sleep gives everything back."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator

import pytest
import torch

from engine.test_core import Job, run
from mainspring.engine.config import EngineConfig
from mainspring.engine.core import EngineCore
from mainspring.engine.sampling_params import SamplingParams
from mainspring.engine.throughput import SHAPES, random_model
from mainspring.formats.model_config import ModelConfig

pytestmark = pytest.mark.gpu

GIB = 1 << 30
FREE = 6 * GIB
DENSE = ModelConfig(**{**SHAPES["qwen3-0.6b"], "num_layers": 2})
# The widths of Qwen3-30B-A3B.
EXPERTS = ModelConfig(
    **{
        **SHAPES["qwen3-0.6b"],
        "architecture": "Qwen3MoeForCausalLM",
        "hidden_size": 2048,
        "num_layers": 2,
        "num_heads": 32,
        "num_kv_heads": 4,
        "num_experts": 128,
        "num_experts_per_token": 8,
        "moe_intermediate_size": 768,
        "moe_layers": (True, True),
        "tie_word_embeddings": False,
    }
)


def reserved() -> int:
    """What PyTorch holds of the device's memory, once nothing is left that it could give back."""
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


@pytest.fixture
def few_bytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FREE bytes are free beside the model that the test makes, and no more can be had."""
    _, total = torch.cuda.mem_get_info()

    def free(device: object = None) -> tuple[int, int]:
        torch.cuda.set_per_process_memory_fraction((reserved() + FREE) / total)
        return FREE, total

    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("config", [DENSE, EXPERTS], ids=["dense", "experts"])
@pytest.mark.usefixtures("few_bytes")
def test_the_largest_steps_fit_beside_a_cache_of_the_default_size(config: ModelConfig) -> None:
    model = random_model(config, "cuda", torch.bfloat16, "lockstep")
    core = EngineCore(model, EngineConfig(max_model_len=2048))
    seats = core.config.max_num_seqs
    assert seats is not None
    assert seats >= 256
    generator = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [generator.randrange(config.vocab_size) for _ in range(length)]

    # Prompts that fill steps, with a log-probability of each token; then every seat at once, in each way to sample.
    long: list[Job] = [
        (prompt(2000), SamplingParams(max_tokens=2, prompt_logprobs=0 if number % 2 else None))
        for number in range(12)
    ]
    wide: list[Job] = [
        (prompt(generator.randint(1, 64)), params)
        for number in range(seats)
        for params in [
            SamplingParams(seed=number, max_tokens=4, logprobs=5, top_p=0.9, frequency_penalty=0.5)
            if number % 2
            else SamplingParams(seed=number, max_tokens=4)
        ]
    ]
    for jobs in (long, wide, long + wide):
        assert [len(result.tokens) for result in run(core, jobs)] == [p.max_tokens for _, p in jobs]
    assert core.stats().preemptions_total == 0


def test_sleep_gives_the_memory_of_cache_and_graphs_back() -> None:
    model = random_model(DENSE, "cuda", torch.bfloat16, "lockstep")
    jobs: list[Job] = [
        ([number] * 300, SamplingParams(seed=number, max_tokens=20, logprobs=0)) for number in range(8)
    ]
    run(EngineCore(model, EngineConfig(num_blocks=400, max_model_len=1024)), jobs)  # compiles and loads
    before = reserved()
    core = EngineCore(model, EngineConfig(kv_cache_bytes=2 * GIB, max_model_len=1024))
    expected = run(core, jobs)
    assert reserved() - before > 2 * GIB
    core.sleep()
    assert reserved() - before < GIB // 8  # the tables of seats, and what sampling knows of them
    core.wake()
    assert run(core, jobs) == expected
