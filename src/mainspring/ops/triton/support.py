"""Which calls the Triton kernels serve, and what every launch of one needs. Imports no Triton."""

from __future__ import annotations

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mainspring.ops.checks import reject
from mainspring.ops.registry import Call

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)  # bf16 matrix instructions
TMA_CAPABILITY = (9, 0)
DEPENDENT_LAUNCH_CAPABILITY = (9, 0)
ALIGNMENT = 16  # bytes: what a vector load and a tensor descriptor ask of addresses and strides


def refuses(call: Call) -> str | None:
    """None if the Triton kernels serve such a call, or the reason why not."""
    if call.device_type != "cuda" and not (interpreted() and call.policy.backend == "triton"):
        return (
            f"runs on CUDA devices, not on {call.device_type} (there only in tests, under TRITON_INTERPRET=1)"
        )
    if call.dtype not in DTYPES:
        return f"computes in float32, bfloat16 and float16, not in {call.dtype}"
    return _unavailable() or (None if interpreted() else _too_old())


def refuses_fast_numerics(call: Call) -> str | None:
    """As `refuses`, for products that cuBLAS computes faster where their order is free."""
    if call.policy.numerics == "fast" and call.policy.backend != "triton":
        return "cuBLAS, which is free to choose its order, is faster"
    return refuses(call)


def refuses_fast_training(call: Call) -> str | None:
    """As `refuses`, for kernels without a backward pass of their own."""
    if call.policy.numerics == "fast" and call.needs_grad and call.policy.backend != "triton":
        return "torch's kernels, which have backward passes of their own, train faster"
    return refuses(call)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels (on the CPU, slowly, for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: `pip install triton`"
    return None


@functools.cache
def _too_old() -> str | None:
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return f"needs compute capability 8.0 or later, not {capability[0]}.{capability[1]}"
    return None


@functools.lru_cache(maxsize=64)
def has_tma(device: torch.device) -> bool:
    """Whether the device copies tiles by tensor descriptors (Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= TMA_CAPABILITY


@functools.lru_cache(maxsize=64)
def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel can be brought up while the one before it still runs (Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= DEPENDENT_LAUNCH_CAPABILITY


@functools.lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """How many blocks a persistent kernel starts: one a multiprocessor (2 in the interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.lru_cache(maxsize=64)
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have (all there is to have in the interpreter)."""
    if device.type != "cuda":
        return 1 << 30
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)  # type: ignore[attr-defined]  # not in its stub


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Launches go to the current device; this makes it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def require(operation: str, condition: bool, problem: str) -> None:
    """Raises BackendError with the problem unless the condition holds."""
    if not condition:
        raise reject(operation, problem)


def check_dtype(operation: str, tensor: Tensor) -> None:
    """Raises BackendError for a dtype that the kernels do not compute in."""
    if tensor.dtype not in DTYPES:
        raise reject(operation, f"takes float32, bfloat16 and float16, not {tensor.dtype}")


def aligned(tensor: Tensor) -> bool:
    """Whether the address and all strides but the last are multiples of 16 bytes, and the last one is 1."""
    size = tensor.element_size()
    return (
        tensor.stride(-1) == 1
        and tensor.data_ptr() % ALIGNMENT == 0
        and all(s * size % ALIGNMENT == 0 for s in tensor.stride()[:-1])
    )


def canonical_rows(x: Tensor) -> Tensor:
    """x [..., H], copied unless its rows lie as vector loads like them.

    Triton arranges a row over threads by what it knows of addresses and strides, and that arrangement is
    the order of a sum over the row. So what it knows may depend on H alone: rows of a multiple of 16
    elements have strides that are one too, other rows lie end to end; addresses are multiples of 16 bytes.
    """
    h = x.shape[-1]
    if x.data_ptr() % ALIGNMENT or x.stride(-1) != 1:
        return x.clone(memory_format=torch.contiguous_format)
    if h % 16 == 0 and all(n == 1 or s % 16 == 0 for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True)):
        return x
    return x.contiguous()
