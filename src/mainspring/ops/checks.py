"""What the arguments of an operation must be, whichever backend serves it: errors with the value and what is supported.

Kernels trust addresses that they are handed, so shapes, dtypes and devices are looked at before any launch. What can be
told only from a tensor's values is read where that waits for nothing, on the CPU, and on a device where
MAINSPRING_DEBUG=1 asks for it.
"""

from __future__ import annotations

import os
from itertools import pairwise

import torch
from torch import Tensor

from mainspring.errors import BackendError


def debugging() -> bool:
    """Whether the environment has MAINSPRING_DEBUG=1; read at each call, so that a test or a session can set it."""
    return os.environ.get("MAINSPRING_DEBUG") == "1"


def reject(operation: str, problem: str) -> BackendError:
    """An error that names the operation and what is wrong with its arguments."""
    return BackendError(f"{operation}: {problem}")


def described(tensor: Tensor) -> str:
    """dtype, shape and device, as errors show them."""
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"


def check_product(operation: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """x: [M, K], weight: [N, K], bias: [N], of one dtype on one device. Raises BackendError."""
    if (
        x.dim() != 2
        or weight.dim() != 2
        or weight.shape[1] != x.shape[1]
        or weight.dtype is not x.dtype
        or weight.device != x.device
    ):
        raise reject(
            operation,
            f"weight {described(weight)} does not fit x {described(x)}: they must be [N, K] and [M, K]",
        )
    if bias is not None and (
        bias.shape != weight.shape[:1] or bias.dtype is not x.dtype or bias.device != x.device
    ):
        raise reject(operation, f"bias must be [{weight.shape[0]}] of {x.dtype}, not {described(bias)}")


def check_norm(operation: str, x: Tensor, weight: Tensor, eps: float) -> None:
    """x: [..., H], weight: [H], of one dtype on one device; eps at least 0. Raises BackendError."""
    if (
        x.dim() == 0
        or weight.shape != x.shape[-1:]
        or weight.dtype is not x.dtype
        or weight.device != x.device
    ):
        raise reject(
            operation, f"weight must be [{x.shape[-1] if x.dim() else 'H'}] of {x.dtype} on {x.device} for "
            f"x {tuple(x.shape)}, not {described(weight)}"
        )  # fmt: skip
    if not eps >= 0:
        raise reject(operation, f"eps must be at least 0, not {eps}")


def check_heads(operation: str, q: Tensor, k: Tensor, v: Tensor | None = None) -> None:
    """q: [T, Hq, D], k and v: [T, Hkv, D], of one dtype on one device. Raises BackendError."""
    # Looked up once: this runs in every layer.
    shape, wanted, dtype, device = k.shape, q.shape, q.dtype, q.device
    if (
        len(shape) != 3
        or len(wanted) != 3
        or shape[0] != wanted[0]
        or shape[2] != wanted[2]
        or k.dtype is not dtype
        or k.device != device
    ):
        raise _misfit(operation, "k", k, q)
    if v is not None and (v.shape != shape or v.dtype is not dtype or v.device != device):
        raise _misfit(operation, "v", v, q)


def _misfit(operation: str, name: str, x: Tensor, q: Tensor) -> BackendError:
    return reject(
        operation,
        f"{name} {described(x)} does not fit q {described(q)}: k and v must be [T, Hkv, D], q [T, Hq, D]",
    )


def check_targets(operation: str, targets: Tensor, rows: Tensor) -> None:
    """targets: [M] int64 for rows: [M, ...], on one device. Raises BackendError."""
    if targets.dtype is not torch.int64 or targets.shape != rows.shape[:1] or targets.device != rows.device:
        raise reject(
            operation, f"targets must be [{rows.shape[0]}] int64 on {rows.device}, not {described(targets)}"
        )


def check_indices(operation: str, what: str, index: Tensor, limit: int, ignored: int | None = None) -> None:
    """Every element lies from 0 to limit - 1, or is `ignored`. Raises BackendError with the first that does not.

    Reads the index where that is free, on the CPU, or where MAINSPRING_DEBUG=1 asks for it; nothing while the call is
    traced by a compiler or captured in a CUDA graph.
    """
    if not _may_read(index):
        return
    outside = (index < 0) | (index >= limit)
    if ignored is not None:
        outside &= index != ignored
    if bool(outside.any()):
        place = int(outside.flatten().nonzero()[0])
        left_out = "" if ignored is None else f", or {ignored} for none"
        raise reject(
            operation,
            f"{what} {int(index.flatten()[place])} at {place} lies outside 0 to {limit - 1}{left_out}",
        )


def check_boundaries(
    operation: str, what: str, boundaries: Tensor, end: int, longest: int | None = None
) -> None:
    """Boundaries rise from 0 to `end`, in steps of at most `longest`. Raises BackendError; read as
    in `check_indices`."""
    if not _may_read(boundaries):
        return
    found = boundaries.tolist()
    steps = [b - a for a, b in pairwise(found)]
    if not found or found[0] != 0 or found[-1] != end or min(steps, default=0) < 0:
        raise reject(operation, f"{what} must rise from 0 to {end}, not {found[:16]}")
    if longest is not None and max(steps, default=0) > longest:
        raise reject(
            operation, f"{what} has a sequence of {max(steps)}, and at most {longest} were announced"
        )


def _may_read(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    on_device = tensor.is_cuda and debugging() and not torch.cuda.is_current_stream_capturing()
    return tensor.is_cpu or on_device
