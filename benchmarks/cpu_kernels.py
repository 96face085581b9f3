"""The C++ CPU kernels against PyTorch's own, on the shapes of SmolLM2-135M: `python benchmarks/cpu_kernels.py`.

Each pair runs interleaved, so that a busy neighbour hurts both; the best of the repetitions counts. Weights of
the memory-bound cases are taken from a pool larger than the caches.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mainspring.ops.cpu.attention import attention
from mainspring.ops.cpu.extension import require_kernels
from mainspring.ops.cpu.linear import linear
from mainspring.ops.cpu.log_probs import token_log_probs
from mainspring.ops.cpu.norm import add_rms_norm
from mainspring.ops.cpu.rope import rope_
from mainspring.ops.cpu.swiglu import swiglu

SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576))  # (N, K)
POOL_BYTES = 160 << 20  # larger than the last-level cache
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """Two ways to do one thing, and how much of `unit` a call is."""

    name: str
    ours: Callable[[], object]
    torchs: Callable[[], object]
    amount: float
    unit: str


def linear_cases(name: str, dtype: torch.dtype) -> Iterator[Case]:
    for n, k in SHAPES:
        size = n * k * dtype.itemsize
        pool = [torch.randn(n, k).to(dtype) for _ in range(max(1, min(64, POOL_BYTES // size)))]
        for m in (1, 8):
            x = torch.randn(m, k).to(dtype)
            ours, torchs = itertools.cycle(pool), itertools.cycle(pool)
            yield Case(
                f"linear {name} M={m} {n}x{k}",
                lambda x=x, ours=ours: linear(x, next(ours)),
                lambda x=x, torchs=torchs: F.linear(x, next(torchs)),
                size / 1e9,
                "GB/s",
            )
        if n < 10_000:
            x, w = torch.randn(512, k).to(dtype), pool[0]
            yield Case(
                f"linear {name} M=512 {n}x{k}",
                lambda x=x, w=w: linear(x, w),
                lambda x=x, w=w: F.linear(x, w),
                2e-9 * 512 * n * k,
                "GFLOP/s",
            )


def attention_cases(name: str, dtype: torch.dtype) -> Iterator[Case]:
    def tensors(tokens: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(torch.randn(n, h, 64).to(dtype) for n, h in ((tokens, 9), (keys, 3), (keys, 3)))

    def heads_first(x: Tensor, sequences: int) -> Tensor:
        return x.view(sequences, -1, *x.shape[1:]).transpose(1, 2)

    q, k, v = tensors(2048, 2048)
    ends, lengths = torch.tensor([0, 2048], dtype=torch.int32), torch.tensor([2048], dtype=torch.int32)
    q1, k1, v1 = (heads_first(x, 1) for x in (q, k, v))
    yield Case(
        f"attention {name} prefill 1x2048",
        lambda: attention(q, k, v, ends, lengths, None, 0.125),
        lambda: F.scaled_dot_product_attention(q1, k1, v1, is_causal=True, enable_gqa=True),
        2e-9 * 2048 * 2048 * 9 * 64,
        "GFLOP/s",
    )
    for sequences, context in ((1, 4096), (8, 1024), (32, 512)):
        blocks = sequences * context // 16
        q, k, v = tensors(sequences, sequences * context)
        paged_k, paged_v = k.view(blocks, 16, 3, 64), v.view(blocks, 16, 3, 64)
        tables = torch.arange(blocks, dtype=torch.int32).view(sequences, -1)
        ends = torch.arange(sequences + 1, dtype=torch.int32)
        lengths = torch.full((sequences,), context, dtype=torch.int32)
        q1, k1, v1 = (heads_first(x, sequences) for x in (q, k, v))
        yield Case(
            f"attention {name} decode {sequences}x{context}",
            lambda q=q, k=paged_k, v=paged_v, e=ends, n=lengths, t=tables: attention(q, k, v, e, n, t, 0.125),
            lambda q=q1, k=k1, v=v1: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
            2e-9 * k.numel() * dtype.itemsize,
            "GB/s",
        )


def small_cases(name: str, dtype: torch.dtype) -> Iterator[Case]:
    for m in (1, 512):
        x, residual = torch.randn(m, 576).to(dtype), torch.randn(m, 576).to(dtype)
        weight = torch.randn(576).to(dtype)
        gate_up = torch.randn(m, 3072).to(dtype)
        qkv = torch.randn(m, 15, 64).to(dtype)
        cos, sin = torch.rand(m, 32), torch.rand(m, 32)
        both = torch.cat((cos, cos), -1)[:, None].to(dtype), torch.cat((sin, sin), -1)[:, None].to(dtype)

        def torch_rope(x: Tensor, both: tuple[Tensor, Tensor] = both) -> Tensor:
            return x * both[0] + torch.cat((-x[..., 32:], x[..., :32]), -1) * both[1]

        def torch_add_norm(x: Tensor = x, r: Tensor = residual, w: Tensor = weight) -> Tensor:
            return F.rms_norm(x + r, (576,), w, 1e-5)

        yield Case(
            f"add_rms_norm {name} M={m}",
            lambda x=x, r=residual, w=weight: add_rms_norm(x, r, w, 1e-5),
            torch_add_norm,
            4e-9 * x.nbytes,
            "GB/s",
        )
        yield Case(
            f"rope {name} T={m}",
            lambda x=qkv, c=cos, s=sin: rope_(x[:, :9], x[:, 9:12], c, s),
            lambda x=qkv, f=torch_rope: f(x[:, :12]),
            2e-9 * 0.8 * qkv.nbytes,
            "GB/s",
        )
        yield Case(
            f"swiglu {name} M={m}",
            lambda g=gate_up: swiglu(g),
            lambda g=gate_up: F.silu(g[:, :1536]) * g[:, 1536:],
            1.5e-9 * gate_up.nbytes,
            "GB/s",
        )


def log_prob_cases() -> Iterator[Case]:
    for m in (1, 64):
        logits, targets = torch.randn(m, 49152) * 4, torch.randint(49152, (m,))
        yield Case(
            f"token_log_probs M={m} V=49152",
            lambda x=logits, t=targets: token_log_probs(x, t),
            lambda x=logits, t=targets: torch.log_softmax(x, -1).gather(1, t[:, None]),
            1e-9 * logits.nbytes,
            "GB/s",
        )


def best_seconds(case: Case, seconds: float) -> tuple[float, float]:
    """Shortest call of ours and of torch's, taking turns in runs of a few calls for about `seconds`."""
    best = [float("inf"), float("inf")]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for side, call in enumerate((case.ours, case.torchs)):
            time.sleep(0.005)  # the other side's threads stop spinning
            for _ in range(8):
                start = time.perf_counter()
                call()
                best[side] = min(best[side], time.perf_counter() - start)
    return best[0], best[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=require_kernels().num_threads())
    parser.add_argument("--seconds", type=float, default=0.4, help="time spent on each row")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    kernels = require_kernels()
    kernels.set_num_threads(arguments.threads)
    print(f"{kernels.isa()}, {arguments.threads} threads, torch {torch.__version__}")
    print(f"{'case':40} {'unit':>8} {'ours':>9} {'torch':>9} {'ratio':>6} {'ours us':>9}")
    groups = [
        make(name, dtype)
        for name, dtype in DTYPES.items()
        for make in (linear_cases, attention_cases, small_cases)
    ]
    for case in itertools.chain(*groups, log_prob_cases()):
        if arguments.only not in case.name:
            continue
        ours, torchs = best_seconds(case, arguments.seconds)
        rates = case.amount / ours, case.amount / torchs
        print(
            f"{case.name:40} {case.unit:>8} {rates[0]:9.1f} {rates[1]:9.1f} {rates[0] / rates[1]:6.2f} "
            f"{ours * 1e6:9.1f}"
        )


if __name__ == "__main__":
    main()
