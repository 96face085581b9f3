"""How large the cache is, how many requests run at once, and which sizes steps are padded to."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from mainspring.engine import decode_graphs, sizing, step_graphs
from mainspring.engine.config import EngineConfig
from mainspring.engine.throughput import shape_config
from mainspring.errors import ConfigError


def test_the_cache_leaves_a_gpu_what_the_largest_step_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    config = shape_config("llama-3.1-8b")
    block_bytes = 2 * 32 * 16 * 8 * 128 * 2

    def blocks(free: int, longest: int = 4096, **options: int) -> int:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
        engine = EngineConfig(**options)
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


def test_a_gpu_has_seats_for_as_many_requests_as_its_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    config = shape_config("llama-3.1-8b")

    def seats(free: int, longest: int = 4096, device: torch.device = gpu, **options: int) -> int:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
        engine = EngineConfig(**options)
        resolved = sizing.with_seats(engine, config, torch.bfloat16, device, longest)
        assert resolved.max_num_seqs is not None
        if not options and device == gpu:
            # What is left beside the seats' own memory still holds that many.
            blocks = sizing.num_cache_blocks(resolved, config, torch.bfloat16, gpu, longest)
            assert (
                resolved.max_num_seqs <= 256 or blocks * 16 >= 0.9 * min(960, longest) * resolved.max_num_seqs
            )
        return resolved.max_num_seqs

    counts = [seats(gibibytes << 30) for gibibytes in (8, 30, 45, 60, 78, 140)]
    assert counts == sorted(counts)
    assert counts[0] == 256
    assert counts[-1] == 1024
    assert 384 <= counts[3] <= 512
    assert all(count % 64 == 0 for count in counts)
    assert seats(60 << 30, longest=256) == 1024  # short sequences: more of them
    assert seats(60 << 30, num_blocks=400) == 256
    assert seats(60 << 30, max_num_seqs=7) == 7
    assert seats(60 << 30, max_num_batched_tokens=100) == 100
    assert seats(60 << 30, device=torch.device("cpu")) == 64


@pytest.mark.parametrize("most", [1, 5, 64, 256, 300, 640, 1000])
def test_steps_are_padded_little(most: int) -> None:
    decodes, steps = decode_graphs.sizes_up_to(most), step_graphs.sizes_up_to(16 * most)
    for sizes, largest, share in ((decodes, most, 1 / 8), (steps, 16 * most, 1 / 2)):
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == largest
        for smaller, size in pairwise(sizes):
            assert size - smaller <= max(8, share * smaller) or size <= 16
    assert all(b - a <= a / 4 for a, b in pairwise(steps) if a >= 512)
