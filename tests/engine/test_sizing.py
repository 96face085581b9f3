"""How large the cache is."""

from __future__ import annotations

import pytest
import torch

from mainspring.engine import sizing
from mainspring.engine.config import EngineConfig
from mainspring.engine.throughput import shape_config
from mainspring.errors import ConfigError


def test_the_cache_leaves_a_gpu_what_the_largest_step_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    config = shape_config("llama-3.1-8b")
    block_bytes = 2 * 32 * 16 * 8 * 128 * 2

    def blocks(free: int, longest: int = 4096, **options: int) -> int:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
        engine = EngineConfig(**options)  # type: ignore[arg-type]
        return sizing.num_cache_blocks(engine, config, torch.bfloat16, gpu, longest)

    roomy = blocks(60 << 30)
    assert 0.85 * (60 << 30) < roomy * block_bytes < 0.92 * (60 << 30)
    assert (
        blocks(60 << 30, max_num_batched_tokens=16_384)
        < roomy
        < blocks(60 << 30, max_num_batched_tokens=2048)
    )
    assert blocks(60 << 30, longest=131_072) < roomy
    # gate and up of one layer alone are 16,384 x 28,672 x 2 bytes.
    assert (roomy - blocks(60 << 30, max_num_batched_tokens=16_384)) * block_bytes > 8192 * 28_672 * 2
    with pytest.raises(ConfigError, match=r"no memory.*lower max_num_batched_tokens"):
        blocks(2 << 30, max_num_batched_tokens=16_384)
