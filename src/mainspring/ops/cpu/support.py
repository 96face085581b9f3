"""Which calls the C++ CPU kernels serve."""

from __future__ import annotations

import torch

from mainspring.ops.cpu.extension import unavailable_reason
from mainspring.ops.registry import Call

_DTYPES = (torch.float32, torch.bfloat16)


def refuses(call: Call) -> str | None:
    """None if the C++ kernels serve such a call, or the reason why not."""
    if call.device_type != "cpu":
        return f"runs on the CPU, not on {call.device_type}"
    if call.dtype not in _DTYPES:
        return f"computes in float32 and bfloat16, not in {call.dtype}"
    if call.policy.numerics == "fast" and call.needs_grad:
        # A step that alternates between two thread pools waits for one while the other still spins.
        return "a backward pass runs on torch's thread pool, and a step is fastest on one pool"
    return unavailable_reason()
