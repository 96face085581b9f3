"""Which backend serves a call of an operation, and why.

An operation is a table of implementations in order of preference; each can refuse a kind of call and
says why. The tables are constants: nothing is registered at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, ParamSpec, TypeVar

import torch

from mainspring.errors import BackendError
from mainspring.ops.policy import Policy

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Call:
    """What a backend may look at to accept or refuse: the kind of a call, not its data.

    `size` is the extent that kernels are specialised on (attention: the head size), where an operation has one.
    """

    device_type: str
    dtype: torch.dtype
    policy: Policy
    needs_grad: bool
    size: int | None = None


@dataclass(frozen=True)
class Implementation(Generic[P, R]):
    """One backend's version of an operation. `refuses(call)` is None or the reason of the refusal."""

    backend: str
    run: Callable[P, R]
    refuses: Callable[[Call], str | None]


class Operation(Generic[P, R]):
    """A named operation and its implementations, the preferred one first."""

    def __init__(self, name: str, *implementations: Implementation[P, R]) -> None:
        self.name = name
        self.implementations = implementations
        self._chosen: dict[tuple[object, ...], Callable[P, R]] = {}

    def select(
        self, tensor: torch.Tensor, policy: Policy, needs_grad: bool = False, size: int | None = None
    ) -> Callable[P, R]:
        """The implementation that serves calls on tensors like `tensor`. Raises BackendError if none does."""
        # Hashing a Call takes three times as long, at every operation of every layer.
        kind = (tensor.device.type, tensor.dtype, policy.numerics, policy.backend, needs_grad, size)
        run = self._chosen.get(kind)
        if run is None:
            run = self._search(Call(tensor.device.type, tensor.dtype, policy, needs_grad, size))
            self._chosen[kind] = run
        return run

    def explain(self, call: Call) -> list[tuple[str, str | None]]:
        """(backend, reason of refusal or None) for every implementation, in order of preference."""
        return [(i.backend, self._refusal(i, call)) for i in self.implementations]

    def _search(self, call: Call) -> Callable[P, R]:
        for implementation in self.implementations:
            if self._refusal(implementation, call) is None:
                return implementation.run
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.explain(call))
        raise BackendError(f"no backend serves {self.name} on {call.device_type} {call.dtype}: {reasons}")

    @staticmethod
    def _refusal(implementation: Implementation[P, R], call: Call) -> str | None:
        forced = call.policy.backend
        if forced is not None and forced != implementation.backend:
            return f"the policy forces backend {forced!r}"
        return implementation.refuses(call)


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accepts_floats(call: Call) -> str | None:
    """The PyTorch references serve every call on tensors that can be computed with, on every device."""
    return (
        None
        if call.dtype in FLOATS
        else f"computes in floating dtypes of 16 bits and more, not in {call.dtype}"
    )


def any_requires_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd will record a call on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
