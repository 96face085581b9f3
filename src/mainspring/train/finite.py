"""When a loss is no longer finite: which module was the first to give something that is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def first_non_finite(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """Runs `forward`, which calls the model, and names the first module with an output that is not finite.

    A weight that is not finite is named before any module. None if everything is finite: the gradient alone is not.
    """
    for name, parameter in model.named_parameters():
        if parameter.numel() and not bool(torch.isfinite(parameter).all()):
            return f"the weight {name}"
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def check(module: nn.Module, args: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not found and any(
                isinstance(t, Tensor) and not bool(torch.isfinite(t).all()) for t in tensors
            ):
                found.append(f"the output of {name}")

        return check

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
