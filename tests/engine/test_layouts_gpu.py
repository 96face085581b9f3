"""The engine over two GPUs (NCCL): tokens and, to the bit, log-probabilities of one, with CUDA graphs and without."""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from engine.test_core import Job, Result, run
from mainspring.engine.config import EngineConfig, KVCacheDtype
from mainspring.engine.core import EngineCore
from mainspring.engine.ranks.layout import serving_layout
from mainspring.engine.ranks.lead import LeadModel
from mainspring.engine.sampling_params import SamplingParams
from mainspring.engine.throughput import SHAPES
from mainspring.errors import EngineDeadError
from mainspring.formats.model_config import ModelConfig
from mainspring.model.checkpoint import load_model, save_model
from mainspring.model.initialise import create_model
from parallel.models import tiny

VOCAB = 4096
CONFIG = {
    "max_model_len": 512,
    "num_blocks": 70,
    "max_num_batched_tokens": 200,
    "max_num_seqs": 12,
}  # tight: prompts are cut, requests preempted

pytestmark = pytest.mark.gpu
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a layout of two ranks needs two GPUs")


@pytest.fixture(autouse=True)
def _ends_in_time() -> Iterator[None]:
    """A collective that hangs must not take the machine's time with it."""

    faulthandler.dump_traceback_later(100, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def checkpoint(directory: Path, config: ModelConfig) -> Path:
    model = create_model(config, device="cuda", dtype=torch.bfloat16, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embedding" not in name:
                parameter.mul_(2)  # distributions that are not flat
    save_model(model, directory)
    return directory


def jobs(vocab_size: int) -> list[Job]:
    generator = random.Random(1)
    shared = [generator.randrange(vocab_size) for _ in range(90)]
    found: list[Job] = []
    for number in range(24):
        own = [generator.randrange(vocab_size) for _ in range(generator.randint(1, 150))]
        params = SamplingParams(
            temperature=generator.choice([0.0, 0.7, 1.0]),
            top_p=generator.choice([1.0, 1.0, 0.9]),
            frequency_penalty=generator.choice([0.0, 0.0, 0.5]),
            seed=number,
            max_tokens=generator.randint(2, 48),
            logprobs=0,
            prompt_logprobs=generator.choice([None, None, 0]),
        )
        found.append(((shared if number % 2 else []) + own, params))
    return found


@contextmanager
def led(directory: Path, **degrees: int | bool) -> Iterator[LeadModel]:
    layout = serving_layout(None, **degrees)
    assert layout is not None
    began = time.monotonic()
    model = LeadModel(directory, layout, device="cuda")
    print(f"{layout}: {layout.world} ranks up after {time.monotonic() - began:.1f} s")
    try:
        yield model
    finally:
        model.close()


def served(
    model: LeadModel, graphs: bool | None, vocab_size: int, cache: KVCacheDtype = "auto"
) -> list[Result]:
    began = time.monotonic()
    core = EngineCore(model, EngineConfig(cuda_graphs=graphs, kv_cache_dtype=cache, **CONFIG))
    ready = time.monotonic()
    results = run(core, jobs(vocab_size), [number // 3 for number in range(24)])
    stats = core.stats()
    print(
        f"{model.layout}, graphs {graphs}: engine {ready - began:.1f} s, {stats.steps_total} steps in "
        f"{time.monotonic() - ready:.2f} s, {stats.preemptions_total} preemptions"
    )
    assert stats.preemptions_total > 0
    assert stats.prefix_cache_hits_total > 0
    core.sleep()  # gives the cache back, here and on the other rank
    return results


def differing(got: list[Result], expected: list[Result]) -> list[int]:
    return [number for number, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b]


def first_gap(got: list[Result], expected: list[Result]) -> float:
    """Of the log-probabilities of the first tokens, where those are the same."""
    pairs = [(a.logprobs[0], b.logprobs[0]) for a, b in zip(got, expected, strict=True)]
    same = [(a, b) for a, b in pairs if a.token_ids[0] == b.token_ids[0]]
    assert len(same) > len(pairs) // 2
    return max(abs(a.logprobs[0] - b.logprobs[0]) for a, b in same)


def test_one_rank_of_a_layout_serves_from_an_fp8_cache(tmp_path: Path) -> None:
    config = ModelConfig(**{**SHAPES["qwen3-0.6b"], "num_layers": 4, "vocab_size": VOCAB})
    directory = checkpoint(tmp_path / "model", config)
    with led(directory, tp_invariant=True) as model:
        expected = served(model, None, VOCAB)
        assert 0 < first_gap(served(model, None, VOCAB, "fp8"), expected) < 0.5


@needs_two
def test_two_gpus_give_one_gpus_bits(tmp_path: Path) -> None:
    config = ModelConfig(**{**SHAPES["qwen3-0.6b"], "num_layers": 4, "vocab_size": VOCAB})
    directory = checkpoint(tmp_path / "model", config)
    with led(directory, tp_invariant=True) as model:
        expected = served(model, None, VOCAB)
    with led(directory, tp=2, tp_invariant=True) as model:
        assert differing(served(model, False, VOCAB), expected) == []
        assert model.supports_graphs
        assert differing(served(model, True, VOCAB), expected) == []
        assert 0 < first_gap(served(model, True, VOCAB, "fp8"), expected) < 0.5


@needs_two
def test_two_stages_give_one_gpus_bits_and_one_that_dies_is_noticed(tmp_path: Path) -> None:
    config = ModelConfig(**{**SHAPES["qwen3-0.6b"], "num_layers": 3, "vocab_size": VOCAB})
    directory = checkpoint(tmp_path / "model", config)
    plain = EngineConfig(cuda_graphs=False, **CONFIG)
    expected = run(EngineCore(load_model(directory, device="cuda"), plain), jobs(VOCAB))
    with led(directory, pp=2) as model:
        assert differing(run(EngineCore(model, plain), jobs(VOCAB)), expected) == []

        # The cache takes what the GPU with less memory leaves.
        core = EngineCore(model, EngineConfig(max_model_len=512, max_num_seqs=12))
        assert core.limits.max_cache_tokens == 12 * 512
        [pid] = model.worker_pids
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="rank 1 of the layout has ended"):
            run(core, jobs(VOCAB))


@needs_two
def test_experts_on_two_gpus_give_one_gpus_bits(tmp_path: Path) -> None:
    config = tiny(
        "moe",
        vocab_size=VOCAB,
        hidden_size=256,
        head_dim=64,
        intermediate_size=512,
        moe_intermediate_size=256,
        num_experts=8,
        max_position_embeddings=512,
    )
    directory = checkpoint(tmp_path / "model", config)
    plain = EngineConfig(cuda_graphs=False, **CONFIG)
    expected = run(EngineCore(load_model(directory, device="cuda"), plain), jobs(VOCAB))
    with led(directory, ep=2) as model:
        assert differing(run(EngineCore(model, plain), jobs(VOCAB)), expected) == []
