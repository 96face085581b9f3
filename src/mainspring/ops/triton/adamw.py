"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) over all parameters in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mainspring.ops.triton.support import ALIGNMENT, on_device, require

BLOCK = 1024
_GRADIENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class AdamWParameter:
    """A weight and its state, of one shape and contiguous.

    master: float32, updated in place. weight: a rounded copy of it in a narrower dtype that is refreshed with
    it, or None. exp_avg, exp_avg_sq: float32 running means of the gradient and of its square.
    """

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    weight_decay: float
    weight: Tensor | None = None


@triton.jit
def _pointer(address, DTYPE: tl.constexpr):
    """The pointer behind an address, known to be a multiple of 16 bytes."""
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def _update(
    row, index, inside, decay, lr, beta2, rest1, rest2, eps, correction1, root_correction2, grad_scale,
    GRAD: tl.constexpr, WEIGHT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    master_at = _pointer(tl.load(row), tl.float32) + index
    mean_at = _pointer(tl.load(row + 2), tl.float32) + index
    square_at = _pointer(tl.load(row + 3), tl.float32) + index
    gradient = tl.load(_pointer(tl.load(row + 1), GRAD) + index, inside).to(tl.float32) * grad_scale
    master = tl.load(master_at, inside)
    mean = tl.load(mean_at, inside)
    square = tl.load(square_at, inside)
    master = master * (1.0 - lr * decay)
    mean = mean + (gradient - mean) * rest1
    square = square * beta2 + gradient * gradient * rest2
    denominator = tl.sqrt(square) / root_correction2 + eps
    master = master - (lr / correction1) * (mean / denominator)
    tl.store(mean_at, mean, inside)
    tl.store(square_at, square, inside)
    tl.store(master_at, master, inside)
    if HAS_WEIGHT:
        tl.store(_pointer(tl.load(row + 4), WEIGHT) + index, master.to(WEIGHT), inside)


@triton.jit
def adamw_kernel(
    addresses, sizes, decays, owners, offsets, lr, beta2, rest1, rest2, eps, correction1, root_correction2,
    grad_scale, GRAD: tl.constexpr, WEIGHT: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """addresses: [parameters, 5] int64 of master, grad, exp_avg, exp_avg_sq, weight. Program b updates BLOCK
    elements of parameter owners[b], its block offsets[b]. rest1, rest2: 1 - beta1, 1 - beta2. A parameter whose
    gradient's address is 0 stays."""
    owner = tl.load(owners + tl.program_id(0))
    row = addresses + owner * 5
    if tl.load(row + 1) == 0:
        return
    first = tl.load(offsets + tl.program_id(0)) * BLOCK
    index = first + tl.arange(0, BLOCK)
    size = tl.load(sizes + owner)
    decay = tl.load(decays + owner)
    # Without a mask the accesses are vectors; only a parameter's last block may need one.
    if first + BLOCK <= size:
        _update(
            row, index, None, decay, lr, beta2, rest1, rest2, eps, correction1, root_correction2, grad_scale,
            GRAD, WEIGHT, HAS_WEIGHT,
        )  # fmt: skip
    else:
        _update(
            row, index, index < size, decay, lr, beta2, rest1, rest2, eps, correction1, root_correction2, grad_scale,
            GRAD, WEIGHT, HAS_WEIGHT,
        )  # fmt: skip


class FusedAdamW:
    """Moves all parameters of one device in one launch; tables of addresses take the place of a list of tensors."""

    def __init__(self, parameters: Sequence[AdamWParameter]) -> None:
        """Raises BackendError for a dtype, layout or mixture that the kernel does not take."""
        require("adamw", len(parameters) > 0, "there are no parameters")
        self._parameters = tuple(parameters)
        first = parameters[0]
        self._device = first.master.device
        self._weight_dtype = None if first.weight is None else first.weight.dtype
        for parameter in parameters:
            self._check(parameter)
        sizes = [p.master.numel() for p in parameters]
        owners = torch.repeat_interleave(
            torch.arange(len(sizes)), torch.tensor([triton.cdiv(n, BLOCK) for n in sizes])
        )
        blocks = torch.cat([torch.arange(triton.cdiv(n, BLOCK)) for n in sizes])
        self._owners = owners.to(torch.int32).to(self._device)
        self._blocks = blocks.to(self._device)
        self._sizes = torch.tensor(sizes, dtype=torch.int64, device=self._device)
        self._decays = torch.tensor(
            [p.weight_decay for p in parameters], dtype=torch.float32, device=self._device
        )
        self._addresses = torch.zeros((len(sizes), 5), dtype=torch.int64, device=self._device)
        self._known: list[list[int]] = []

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
        """One update, the `step`-th (from 1).

        gradients: one a parameter, of its shape, all of one dtype (float32, bfloat16 or float16), each times
        grad_scale; None leaves a parameter and its state as they are. Raises BackendError.
        """
        require("adamw", step >= 1, f"steps count from 1, got {step}")
        require(
            "adamw",
            len(gradients) == len(self._parameters),
            f"{len(gradients)} gradients for {len(self._parameters)} parameters",
        )
        dtypes = {g.dtype for g in gradients if g is not None}
        if not dtypes:
            return
        dtype = dtypes.pop()
        require("adamw", not dtypes and dtype in _GRADIENTS, "gradients must all be of one floating dtype")
        # A copy that a gradient's layout asks for must live until the launch.
        held = [g if g is None else g.contiguous() for g in gradients]
        for p, g in zip(self._parameters, held, strict=True):
            require(
                "adamw",
                g is None
                or (g.shape == p.master.shape and g.device == self._device and g.data_ptr() % ALIGNMENT == 0),
                f"a gradient must have its parameter's shape {tuple(p.master.shape)} and device, 16-byte aligned",
            )
        table = [
            [
                p.master.data_ptr(),
                0 if g is None else g.data_ptr(),
                p.exp_avg.data_ptr(),
                p.exp_avg_sq.data_ptr(),
                0 if p.weight is None else p.weight.data_ptr(),
            ]
            for p, g in zip(self._parameters, held, strict=True)
        ]
        if table != self._known:
            self._addresses.copy_(torch.tensor(table, dtype=torch.int64))
            self._known = table
        with on_device(self._addresses):
            adamw_kernel[(self._owners.shape[0],)](
                self._addresses, self._sizes, self._decays, self._owners, self._blocks, float(lr), float(beta2),
                1.0 - beta1, 1.0 - beta2, float(eps), 1.0 - beta1**step, (1.0 - beta2**step) ** 0.5, float(grad_scale),
                GRAD=_GRADIENTS[dtype], WEIGHT=_GRADIENTS[self._weight_dtype or torch.float32],
                HAS_WEIGHT=self._weight_dtype is not None, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip

    def _check(self, p: AdamWParameter) -> None:
        state = (p.master, p.exp_avg, p.exp_avg_sq)
        every = state if p.weight is None else (*state, p.weight)
        require("adamw", all(t.dtype is torch.float32 for t in state), "master weights and state are float32")
        require(
            "adamw",
            (None if p.weight is None else p.weight.dtype) == self._weight_dtype
            and (self._weight_dtype is None or self._weight_dtype in _GRADIENTS),
            "the weights beside the masters must all be of one floating dtype, or none",
        )
        require(
            "adamw",
            all(
                t.shape == p.master.shape
                and t.is_contiguous()
                and t.device == self._device
                and t.data_ptr() % ALIGNMENT == 0
                for t in every
            ),
            f"a parameter's tensors must be contiguous, 16-byte aligned and of one shape and device; "
            f"got {[tuple(t.shape) for t in every]}",
        )
