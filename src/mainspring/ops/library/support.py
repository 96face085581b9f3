"""What every operator needs to know of the call that was traced."""

from __future__ import annotations

import torch

from mainspring.ops.policy import Numerics, Policy


def is_traced() -> bool:
    """Whether a compiler is looking at the calls instead of running them."""
    return torch.compiler.is_compiling()


def policy_of(numerics: str, backend: str | None) -> Policy:
    """The policy that an operator's two plain arguments stand for."""
    choice: Numerics = "lockstep" if numerics == "lockstep" else "fast"
    return Policy(choice, backend)
