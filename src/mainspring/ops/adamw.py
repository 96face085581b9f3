"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) over a fixed list of parameters whose states the caller owns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops.policy import LOCKSTEP, Policy
from mainspring.ops.registry import Implementation, Operation, accepts_all
from mainspring.ops.triton.support import refuses as triton_refuses


@dataclass(frozen=True)
class AdamWParameter:
    """A weight and its state, of one shape and contiguous.

    master: float32, updated in place; None if the weight is the parameter itself. exp_avg, exp_avg_sq: running means
    of the gradient and of its square, both float32, or both uint8 codes with their scales (zeros to begin with).
    weight: a rounded copy of the master in a narrower dtype that is refreshed with it, or the parameter, or None.
    exp_avg_scale, exp_avg_sq_scale: float32, one for each 256 elements of a uint8 state.
    Only the Triton kernel takes parameters without masters and states in 8 bits.
    """

    master: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    weight_decay: float
    weight: Tensor | None = None
    exp_avg_scale: Tensor | None = None
    exp_avg_sq_scale: Tensor | None = None


class AdamW(Protocol):
    """Moves its parameters by one step."""

    def prepare(self, gradients: Sequence[Tensor | None]) -> None:
        """Does what `step` with these gradients asks of the host, while the device still computes them. Optional."""
        ...

    def step(
        self,
        gradients: Sequence[Tensor | None],
        *,
        step: int,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        grad_scale: float = 1.0,
    ) -> None: ...


class TorchAdamW:
    """torch's fused kernel, for float32 masters and states."""

    def __init__(self, parameters: Sequence[AdamWParameter]) -> None:
        """Raises BackendError for parameters without masters and for 8-bit states."""
        self._parameters = tuple(parameters)
        self._masters = [p.master for p in parameters if p.master is not None]
        if len(self._masters) < len(parameters) or any(
            p.exp_avg.dtype is not torch.float32 for p in parameters
        ):
            raise BackendError("adamw: torch's kernel takes float32 masters and states only")

    def prepare(self, gradients: Sequence[Tensor | None]) -> None:
        """Nothing is to be prepared."""

    @torch.no_grad()
    def step(
        self,
        gradients: Sequence[Tensor | None],
        *,
        step: int,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        grad_scale: float = 1.0,
    ) -> None:
        """One update, the `step`-th (from 1). gradients: one a parameter, each times grad_scale; None skips one."""
        for decay in dict.fromkeys(p.weight_decay for p in self._parameters):
            moved = [
                (p, master, g.float() * grad_scale if grad_scale != 1.0 else g.float())
                for p, master, g in zip(self._parameters, self._masters, gradients, strict=True)
                if g is not None and p.weight_decay == decay
            ]
            if not moved:
                continue
            device = moved[0][1].device
            torch._fused_adamw_(
                [m for _, m, _ in moved], [g for _, _, g in moved], [p.exp_avg for p, _, _ in moved],
                [p.exp_avg_sq for p, _, _ in moved], [], [torch.tensor(float(step), device=device) for _ in moved],
                lr=lr, beta1=beta1, beta2=beta2, weight_decay=decay, eps=eps, amsgrad=False, maximize=False,
            )  # fmt: skip
            copied = [(p.weight, master) for p, master, _ in moved if p.weight is not None]
            if copied:
                torch._foreach_copy_([w for w, _ in copied], [m for _, m in copied])


def _triton(parameters: Sequence[AdamWParameter]) -> AdamW:
    from mainspring.ops.triton.adamw import FusedAdamW

    return FusedAdamW(parameters)


ADAMW: Operation[[Sequence[AdamWParameter]], AdamW] = Operation(
    "adamw",
    Implementation("triton", _triton, triton_refuses),
    Implementation("torch", TorchAdamW, accepts_all),
)


def make_adamw(parameters: Sequence[AdamWParameter], policy: Policy = LOCKSTEP) -> AdamW:
    """What moves the parameters on their device; there must be one at least."""
    return ADAMW.select(parameters[0].exp_avg, policy)(parameters)
