"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) over all parameters in one launch.

Weights in float32, in a narrower dtype beside float32 masters, or in bfloat16 alone, then rounded stochastically;
moments in float32 or in 8 bits (see moments8.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mainspring.ops.adamw_parameter import AdamWParameter
from mainspring.ops.triton.moments8 import QUANTUM, load_mean, load_square, store_mean, store_square
from mainspring.ops.triton.support import ALIGNMENT, on_device, require

BLOCK = 1024
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_FIELDS = 7  # of the table of addresses: master, gradient, exp_avg, exp_avg_sq, weight, their two scales


@triton.jit
def _pointer(address, DTYPE: tl.constexpr):
    """The pointer behind an address, a multiple of 16 bytes.

    Triton is told of as many bytes as give four elements: one arrangement over threads serves all tensors, and with
    vectors of eight 16-bit elements a warp's float32 accesses would leave every other 16 bytes to the next access.
    """
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 4 * DTYPE.primitive_bitwidth // 8)


@triton.jit
def _round_stochastically(value, first, owner, seed, step, BLOCK: tl.constexpr):
    """value, rounded up or down to bfloat16 with the probability that makes it right on average.

    The bits that fall away are added to 16 random ones, from the Philox generator (Salmon et al., 2011) by parameter,
    element and step.
    """
    counter = (first // 4).to(tl.int32) + tl.arange(0, BLOCK // 4)
    zero = counter * 0
    a, b, c, d = tl.philox(seed, counter, zero + owner, zero + step, zero, 7)
    noise = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), value.shape)
    bits = value.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    bits = tl.where(finite, bits + (noise & 0xFFFF), bits) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _update(
    row, index, inside, first, owner, decay, lr, beta2, rest1, rest2, eps, correction1, root_correction2, grad_scale,
    seed, step, GRAD: tl.constexpr, WEIGHT: tl.constexpr, HAS_MASTER: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    STOCHASTIC: tl.constexpr, EIGHT_BIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if HAS_MASTER:
        master_at = _pointer(tl.load(row), tl.float32) + index
        master = tl.load(master_at, inside)
    else:
        master = tl.load(_pointer(tl.load(row + 4), WEIGHT) + index, inside).to(tl.float32)
    gradient = tl.load(_pointer(tl.load(row + 1), GRAD) + index, inside).to(tl.float32) * grad_scale
    if EIGHT_BIT:
        mean_at = _pointer(tl.load(row + 2), tl.uint8) + index
        square_at = _pointer(tl.load(row + 3), tl.uint8) + index
        blocks = first // 256 + tl.arange(0, BLOCK // 256)
        has_block = None if inside is None else tl.max(inside.to(tl.int32), 1) > 0
        mean_scale_at = _pointer(tl.load(row + 5), tl.float32) + blocks
        square_scale_at = _pointer(tl.load(row + 6), tl.float32) + blocks
        mean = load_mean(mean_at, mean_scale_at, inside, has_block)
        square = load_square(square_at, square_scale_at, inside, has_block)
        if inside is not None:
            # What lies outside must not enter a block's largest value.
            gradient = tl.where(inside, gradient, 0.0)
    else:
        mean_at = _pointer(tl.load(row + 2), tl.float32) + index
        square_at = _pointer(tl.load(row + 3), tl.float32) + index
        mean = tl.load(mean_at, inside)
        square = tl.load(square_at, inside)
    master = master * (1.0 - lr * decay)
    mean = mean + (gradient - mean) * rest1
    square = square * beta2 + gradient * gradient * rest2
    denominator = tl.sqrt(square) / root_correction2 + eps
    master = master - (lr / correction1) * (mean / denominator)
    if EIGHT_BIT:
        store_mean(mean, mean_at, mean_scale_at, inside, has_block)
        store_square(square, square_at, square_scale_at, inside, has_block)
    else:
        tl.store(mean_at, mean, inside)
        tl.store(square_at, square, inside)
    if HAS_MASTER:
        tl.store(master_at, master, inside)
    if HAS_WEIGHT:
        if STOCHASTIC:
            master = _round_stochastically(master, first, owner, seed, step, BLOCK)
        tl.store(_pointer(tl.load(row + 4), WEIGHT) + index, master.to(WEIGHT), inside)


@triton.jit(do_not_specialize=["seed", "step"])
def adamw_kernel(
    addresses, sizes, decays, owners, offsets, lr, beta2, rest1, rest2, eps, correction1, root_correction2,
    grad_scale, seed, step, GRAD: tl.constexpr, WEIGHT: tl.constexpr, HAS_MASTER: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, STOCHASTIC: tl.constexpr, EIGHT_BIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """addresses: [parameters, 7] int64, see _FIELDS. Program b updates BLOCK elements of parameter owners[b], its block
    offsets[b]. rest1, rest2: 1 - beta1, 1 - beta2. A parameter whose gradient's address is 0 stays."""
    owner = tl.load(owners + tl.program_id(0))
    row = addresses + owner * 7
    if tl.load(row + 1) == 0:
        return
    first = tl.load(offsets + tl.program_id(0)) * BLOCK
    if EIGHT_BIT:  # a row for each scale
        index = first + tl.arange(0, BLOCK // 256)[:, None] * 256 + tl.arange(0, 256)[None, :]
    else:
        index = first + tl.arange(0, BLOCK)
    size = tl.load(sizes + owner)
    decay = tl.load(decays + owner)
    # Without a mask the accesses are vectors; only a parameter's last block may need one.
    if first + BLOCK <= size:
        _update(
            row, index, None, first, owner, decay, lr, beta2, rest1, rest2, eps, correction1, root_correction2,
            grad_scale, seed, step, GRAD, WEIGHT, HAS_MASTER, HAS_WEIGHT, STOCHASTIC, EIGHT_BIT, BLOCK,
        )  # fmt: skip
    else:
        _update(
            row, index, index < size, first, owner, decay, lr, beta2, rest1, rest2, eps, correction1, root_correction2,
            grad_scale, seed, step, GRAD, WEIGHT, HAS_MASTER, HAS_WEIGHT, STOCHASTIC, EIGHT_BIT, BLOCK,
        )  # fmt: skip


class FusedAdamW:
    """Moves all parameters of one device in one launch; tables of addresses take the place of a list of tensors."""

    def __init__(
        self, parameters: Sequence[AdamWParameter], *, stochastic_rounding: bool = False, seed: int = 0
    ) -> None:
        """stochastic_rounding: of the weights, which must be bfloat16; the same for the same seed and steps.

        Raises BackendError for a dtype, layout or mixture that the kernel does not take.
        """
        require("adamw", len(parameters) > 0, "there are no parameters")
        self._parameters = tuple(parameters)
        first = parameters[0]
        self._device = first.exp_avg.device
        self._has_master = first.master is not None
        self._weight_dtype = None if first.weight is None else first.weight.dtype
        self._state_dtype = first.exp_avg.dtype
        self._stochastic, self._seed = stochastic_rounding, seed
        require(
            "adamw",
            not stochastic_rounding or self._weight_dtype is torch.bfloat16,
            f"stochastic rounding is to bfloat16 weights, not to {self._weight_dtype}",
        )
        for parameter in parameters:
            self._check(parameter)
        sizes = [p.exp_avg.numel() for p in parameters]
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
        self._addresses = torch.zeros((len(sizes), _FIELDS), dtype=torch.int64, device=self._device)
        self._known: list[list[int]] = []
        self._prepared: tuple[list[Tensor | None], list[Tensor | None], torch.dtype | None] | None = None

    def prepare(self, gradients: Sequence[Tensor | None]) -> None:
        """Checks them and writes the table of addresses, so that `step` only launches. Raises BackendError."""
        self._prepared = self._laid_out(gradients)

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
        prepared, self._prepared = self._prepared, None
        if prepared is None or not _same(prepared[0], gradients):
            prepared = self._laid_out(gradients)
        dtype = prepared[2]  # the copies in `prepared` live until the launch
        if dtype is None:
            return
        with on_device(self._addresses):
            adamw_kernel[(self._owners.shape[0],)](
                self._addresses, self._sizes, self._decays, self._owners, self._blocks, float(lr), float(beta2),
                1.0 - beta1, 1.0 - beta2, float(eps), 1.0 - beta1**step, (1.0 - beta2**step) ** 0.5, float(grad_scale),
                self._seed, step, GRAD=_TYPES[dtype], WEIGHT=_TYPES[self._weight_dtype or torch.float32],
                HAS_MASTER=self._has_master, HAS_WEIGHT=self._weight_dtype is not None, STOCHASTIC=self._stochastic,
                EIGHT_BIT=self._state_dtype is torch.uint8, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip

    def _laid_out(
        self, gradients: Sequence[Tensor | None]
    ) -> tuple[list[Tensor | None], list[Tensor | None], torch.dtype | None]:
        """(the gradients, their contiguous copies whose addresses the table has, their dtype or None for none)."""
        require(
            "adamw",
            len(gradients) == len(self._parameters),
            f"{len(gradients)} gradients for {len(self._parameters)} parameters",
        )
        dtypes = {g.dtype for g in gradients if g is not None}
        if not dtypes:
            return list(gradients), [], None
        dtype = dtypes.pop()
        require("adamw", not dtypes and dtype in _TYPES, "gradients must all be of one floating dtype")
        held: list[Tensor | None]
        held = [g if g is None else g.contiguous() for g in gradients]
        for p, g in zip(self._parameters, held, strict=True):
            require(
                "adamw",
                g is None
                or (
                    g.shape == p.exp_avg.shape and g.device == self._device and g.data_ptr() % ALIGNMENT == 0
                ),
                f"a gradient must have its parameter's shape {tuple(p.exp_avg.shape)} and device, 16-byte aligned",
            )
        table = [
            [0 if t is None else t.data_ptr() for t in (p.master, g, *_states(p))]
            for p, g in zip(self._parameters, held, strict=True)
        ]
        if table != self._known:
            addresses = torch.tensor(table, dtype=torch.int64)
            if self._device.type == "cuda":  # pinned, so that the host need not wait for the device
                addresses = addresses.pin_memory()
            self._addresses.copy_(addresses, non_blocking=True)
            self._known = table
        return list(gradients), held, dtype

    def _check(self, p: AdamWParameter) -> None:
        states = (p.exp_avg, p.exp_avg_sq)
        scales = [t for t in (p.exp_avg_scale, p.exp_avg_sq_scale) if t is not None]
        every = [t for t in (p.master, *states, p.weight) if t is not None]
        require(
            "adamw",
            (p.master is None or p.master.dtype is torch.float32)
            and self._state_dtype in (torch.float32, torch.uint8)
            and all(t.dtype is self._state_dtype for t in states),
            "master weights are float32, states float32 or uint8",
        )
        require(
            "adamw",
            (None if p.weight is None else p.weight.dtype) == self._weight_dtype
            and (self._weight_dtype is None or self._weight_dtype in _TYPES)
            and (p.master is not None) == self._has_master
            and (self._has_master or p.weight is not None),
            "parameters must all have masters or none, and weights of one floating dtype or, beside masters, none",
        )
        require(
            "adamw",
            all(
                t.shape == p.exp_avg.shape
                and t.is_contiguous()
                and t.device == self._device
                and t.data_ptr() % ALIGNMENT == 0
                for t in every
            ),
            f"a parameter's tensors must be contiguous, 16-byte aligned and of one shape and device; "
            f"got {[tuple(t.shape) for t in every]}",
        )
        count = triton.cdiv(p.exp_avg.numel(), QUANTUM) if self._state_dtype is torch.uint8 else 0
        require(
            "adamw",
            len(scales) == (2 if count else 0)
            and all(
                t.dtype is torch.float32
                and t.numel() == count
                and t.is_contiguous()
                and t.device == self._device
                and t.data_ptr() % ALIGNMENT == 0
                for t in scales
            ),
            f"8-bit states of {p.exp_avg.numel()} elements have two contiguous float32 scales of "
            f"{triton.cdiv(p.exp_avg.numel(), QUANTUM)} elements, float32 states none",
        )


def _same(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _states(p: AdamWParameter) -> tuple[Tensor | None, ...]:
    return p.exp_avg, p.exp_avg_sq, p.weight, p.exp_avg_scale, p.exp_avg_sq_scale
