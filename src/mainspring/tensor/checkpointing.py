"""Activation checkpointing: nothing of a function is kept for the backward pass; it is run again there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mainspring.tensor import _tensor as mt
from mainspring.tensor._tensor import AutogradError, Tensor, default_generator, is_grad_enabled
from mainspring.tensor.grad_mode import enable_grad, no_grad


def checkpoint(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """function(*args), whose activations are computed anew in the backward pass (Chen et al., 2016).

    Random numbers of the default generator are drawn again as they were. Gradients of parameters that the function
    reads from elsewhere go to their `.grad`; those of `args` through the tape. At least one of `args` must require
    a gradient.

    Raises:
        AutogradError: gradients are recorded, but no argument requires one: nothing would call the backward pass.
    """
    if not is_grad_enabled():
        return function(*args)
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    if not inputs:
        raise AutogradError(
            "checkpoint: no argument requires a gradient, so that the function would never be differentiated; "
            "call requires_grad_() on the first input, or call the function itself"
        )
    state = default_generator.get_state()
    with no_grad():
        out = function(*args)

    def backward(grad: Tensor) -> list[Tensor | None]:
        later = default_generator.get_state()
        default_generator.set_state(state)
        again = [
            a.detach().requires_grad_() if isinstance(a, Tensor) and a.requires_grad else a for a in args
        ]
        try:
            with enable_grad():
                result = function(*again)
        finally:
            default_generator.set_state(later)
        result.backward(grad)
        return [
            a.grad
            for a, given in zip(again, args, strict=True)
            if isinstance(given, Tensor) and given.requires_grad
        ]

    return mt.record(out, inputs, backward)
