"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) over a fixed list of parameters whose states the caller owns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops.adamw_parameter import AdamWParameter
from mainspring.ops.checks import described, reject
from mainspring.ops.policy import LOCKSTEP, Policy
from mainspring.ops.registry import Implementation, Operation, accepts_floats
from mainspring.ops.stochastic_rounding import round_stochastically
from mainspring.ops.triton.support import refuses as triton_refuses


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


@dataclass(frozen=True)
class Rounding:
    """Of masters to weights: to the nearest, or, to bfloat16, stochastically, the same for the same seed and steps."""

    stochastic: bool = False
    seed: int = 0


class TorchAdamW:
    """torch's fused kernel, for float32 masters and states."""

    def __init__(self, parameters: Sequence[AdamWParameter], rounding: Rounding = Rounding()) -> None:
        """Raises BackendError for parameters without masters, for 8-bit states, for tensors of several shapes and for
        stochastic rounding to weights that are not bfloat16."""
        self._parameters, self._rounding = tuple(parameters), rounding
        self._masters = [p.master for p in parameters if p.master is not None]
        if len(self._masters) < len(parameters) or any(
            p.exp_avg.dtype is not torch.float32 for p in parameters
        ):
            raise BackendError("adamw: torch's kernel takes float32 masters and states only")
        for p, master in zip(parameters, self._masters, strict=True):
            for tensor in (master, p.exp_avg, p.exp_avg_sq, *(() if p.weight is None else (p.weight,))):
                if tensor.shape != master.shape or tensor.device != master.device:
                    raise reject(
                        "adamw", f"a state or weight {described(tensor)} beside a master {described(master)}"
                    )
            if not master.dtype is p.exp_avg_sq.dtype is torch.float32:
                raise reject("adamw", "torch's kernel takes float32 masters and states only")
            if rounding.stochastic and (p.weight is None or p.weight.dtype is not torch.bfloat16):
                found = None if p.weight is None else p.weight.dtype
                raise reject("adamw", f"stochastic rounding is to bfloat16 weights, not to {found}")

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
        """One update, the `step`-th (from 1). gradients: one a parameter, each times grad_scale; None skips one.

        Raises BackendError for gradients that are not one a parameter and of its shape, and for a step below 1.
        """
        if step < 1:
            raise reject("adamw", f"steps count from 1, got {step}")
        if len(gradients) != len(self._parameters):
            raise reject("adamw", f"{len(gradients)} gradients for {len(self._parameters)} parameters")
        for master, gradient in zip(self._masters, gradients, strict=True):
            if gradient is not None and (gradient.shape != master.shape or not gradient.is_floating_point()):
                raise reject("adamw", f"a gradient {described(gradient)} for a parameter {described(master)}")
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
            if not self._rounding.stochastic:
                copied = [(p.weight, master) for p, master, _ in moved if p.weight is not None]
                if copied:
                    torch._foreach_copy_([w for w, _ in copied], [m for _, m in copied])
        if self._rounding.stochastic:
            for number, (p, master, gradient) in enumerate(
                zip(self._parameters, self._masters, gradients, strict=True)
            ):
                if gradient is not None and p.weight is not None:
                    seed = self._rounding.seed
                    p.weight.copy_(round_stochastically(master, parameter=number, step=step, seed=seed))


def _triton(parameters: Sequence[AdamWParameter], rounding: Rounding) -> AdamW:
    from mainspring.ops.triton.adamw import FusedAdamW

    return FusedAdamW(parameters, stochastic_rounding=rounding.stochastic, seed=rounding.seed)


ADAMW: Operation[[Sequence[AdamWParameter], Rounding], AdamW] = Operation(
    "adamw",
    Implementation("triton", _triton, triton_refuses),
    Implementation("torch", TorchAdamW, accepts_floats),
)


def make_adamw(
    parameters: Sequence[AdamWParameter],
    policy: Policy = LOCKSTEP,
    *,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> AdamW:
    """What moves the parameters on their device.

    stochastic_rounding: of masters to bfloat16 weights, which are then right on average; the same for the same seed,
    steps and order of parameters. Raises BackendError for no parameters, and for what no backend takes.
    """
    if not parameters:
        raise reject("adamw", "there are no parameters")
    rounding = Rounding(stochastic_rounding, seed)
    return ADAMW.select(parameters[0].exp_avg, policy)(parameters, rounding)
