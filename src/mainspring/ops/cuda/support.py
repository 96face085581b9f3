"""Which calls the CUDA C++ kernels serve, and why not. Compiles nothing."""

from __future__ import annotations

import functools

import torch

from mainspring.ops.cuda.compiler import find_nvcc
from mainspring.ops.registry import Call

DTYPES = (torch.bfloat16, torch.float16)
HEAD_SIZES = (64, 96, 128, 192, 256)
CANONICAL_HEAD_SIZES = (64, 96, 128)  # beside larger ones there is no shared memory for merged chunks
CAPABILITY = (9, 0)  # warpgroup products and bulk tensor copies exist on Hopper alone


def refuses(call: Call) -> str | None:
    """None if the attention kernels serve such a call, or the reason why not."""
    if call.device_type != "cuda":
        return f"runs on CUDA devices, not on {call.device_type}"
    if call.dtype not in DTYPES:
        return f"computes in bfloat16 and float16, not in {call.dtype}"
    if call.size is not None and call.size not in HEAD_SIZES:
        return f"has head sizes {', '.join(map(str, HEAD_SIZES))}, not {call.size}"
    return _wrong_device() or _no_compiler()


@functools.cache
def _wrong_device() -> str | None:
    capability = torch.cuda.get_device_capability()
    if capability != CAPABILITY:
        return f"is built for compute capability 9.0 (Hopper), not {capability[0]}.{capability[1]}"
    return None


@functools.cache
def _no_compiler() -> str | None:
    if find_nvcc() is None:
        return "needs nvcc to compile its kernels: install the CUDA toolkit, or set CUDA_HOME or CUDACXX"
    return None
