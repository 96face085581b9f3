"""Muon's step on a GPU: element-wise kernels over all matrices of a shape around batched Newton–Schulz products.

A group of equal shapes is moved in batches of limited workspace. A batch takes two element-wise launches, one for
the norms and three a Newton–Schulz step, however many matrices it holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mainspring.ops.triton.newton_schulz import newton_schulz, workspace, workspace_bytes
from mainspring.ops.triton.support import ALIGNMENT, interpreted, on_device, require

BLOCK = 1024
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# What a row of the table of addresses holds.
_MATRIX, _GRADIENT, _BUFFER, _WEIGHT, _FIELDS = 0, 1, 2, 3, 4


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer behind an address, which is a multiple of 16 bytes if ALIGNED.

    Triton is told of as many bytes as give four elements: one arrangement over threads serves all tensors, and with
    vectors of eight 16-bit elements a warp's float32 accesses would leave every other 16 bytes to the next access.
    """
    pointer = address.to(tl.int64).to(tl.pointer_type(DTYPE))  # an address below 2^31 comes as an int32
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 4 * DTYPE.primitive_bitwidth // 8)
    return pointer


@triton.jit
def _inside_workspace(x, index, matrix, rows, columns, pitch, DTYPE: tl.constexpr, PADDED: tl.constexpr):
    """Where element `index` of a matrix lies in the workspace at address x, whose rows are `pitch` elements apart."""
    base = _pointer(x, DTYPE, True) + matrix.to(tl.int64) * rows * pitch
    if PADDED:
        return base + index // columns * pitch + index % columns
    return base + index


@triton.jit(do_not_specialize=["x"])
def momentum_kernel(
    addresses, x, partial, rows, columns, pitch, rest,
    GRAD: tl.constexpr, WORK: tl.constexpr, NESTEROV: tl.constexpr, PADDED: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Moves BLOCK elements of the momentum of matrix program_id(1) and puts its update, rounded, into
    the workspace at address x.

    partial: [matrices, blocks] fp32 sums of squares of the update. rest: 1 - momentum.
    """
    matrix = tl.program_id(1)
    row = addresses + matrix * 4
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < rows * columns
    buffer_at = _pointer(tl.load(row + 2), tl.float32, ALIGNED) + index
    gradient = tl.load(_pointer(tl.load(row + 1), GRAD, ALIGNED) + index, inside, 0.0).to(tl.float32)
    momentum = tl.load(buffer_at, inside, 0.0)
    momentum += (gradient - momentum) * rest
    tl.store(buffer_at, momentum, inside)
    update = momentum
    if NESTEROV:
        update += (gradient - momentum) * rest
    tl.store(_inside_workspace(x, index, matrix, rows, columns, pitch, WORK, PADDED), update.to(WORK), inside)
    tl.store(partial + matrix * tl.num_programs(0) + tl.program_id(0), tl.sum(update * update, 0))


@triton.jit
def scale_kernel(partial, scales, count, factor, eps, BLOCK: tl.constexpr):
    """scales[matrix] = 1 / (factor · Frobenius norm), from the `count` partial sums of a matrix, in order."""
    matrix = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        total += tl.load(partial + matrix * count + first + index, first + index < count, 0.0)
    tl.store(scales + matrix, 1.0 / (factor * tl.maximum(tl.sqrt(tl.sum(total, 0)), eps)))


@triton.jit(do_not_specialize=["x"])
def update_kernel(
    addresses, x, lr, rows, columns, pitch, decay, scale,
    LR_ON_DEVICE: tl.constexpr, WORK: tl.constexpr, WEIGHT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    PADDED: tl.constexpr,    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """matrix <- matrix · (1 - lr · decay) - lr · scale · x, and its rounded copy if it has one."""
    matrix = tl.program_id(1)
    row = addresses + matrix * 4
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < rows * columns
    if LR_ON_DEVICE:
        lr = tl.load(lr)
    at = _pointer(tl.load(row), tl.float32, ALIGNED) + index
    step = tl.load(_inside_workspace(x, index, matrix, rows, columns, pitch, WORK, PADDED), inside, 0.0)
    value = tl.load(at, inside, 0.0) * (1.0 - lr * decay) - lr * scale * step.to(tl.float32)
    tl.store(at, value, inside)
    if HAS_WEIGHT:
        tl.store(_pointer(tl.load(row + 3), WEIGHT, ALIGNED) + index, value.to(WEIGHT), inside)


class FusedMuon:
    """Moves matrices of one shape, all of one device, in batches."""

    def __init__(
        self,
        matrices: Sequence[Tensor],
        buffers: Sequence[Tensor],
        weights: Sequence[Tensor] | None,
        *,
        momentum: float,
        nesterov: bool,
        weight_decay: float,
        coefficients: Sequence[tuple[float, float, float]],
        norm_factor: float,
        eps: float,
        scale: float,
        limit: int,
    ) -> None:
        """matrices, buffers: float32 [rows, columns] each, contiguous; weights: their rounded copies, or None.

        scale: of the update, beside the learning rate. limit: bytes of workspace. Raises BackendError.
        """
        self._matrices, self._buffers, self._weights = tuple(matrices), tuple(buffers), weights
        self._rows, self._columns = matrices[0].shape
        self._device = matrices[0].device
        self._weight_dtype = torch.float32 if weights is None else weights[0].dtype
        self._rest, self._nesterov, self._weight_decay = 1.0 - momentum, nesterov, weight_decay
        self._coefficients, self._norm_factor, self._eps = tuple(coefficients), norm_factor, eps
        self._scale = scale
        # The interpreter has no bf16 arithmetic.
        self._dtype = torch.float32 if interpreted() else torch.bfloat16
        for tensors in (self._matrices, self._buffers, () if weights is None else weights):
            for tensor in tensors:
                self._check(tensor)
        require(
            "muon",
            all(t.dtype is torch.float32 for t in (*self._matrices, *self._buffers)),
            "matrices and momenta are float32",
        )
        require("muon", self._weight_dtype in _DTYPES, f"weights of {self._weight_dtype} are not supported")
        require("muon", self._rows * self._columns < 2**31, "a matrix must have fewer than 2^31 elements")
        fit = max(1, limit // workspace_bytes(self._rows, self._columns))
        batches = triton.cdiv(len(matrices), fit)
        self._batch = triton.cdiv(len(matrices), batches)
        self._addresses = torch.zeros((len(matrices), _FIELDS), dtype=torch.int64, device=self._device)
        self._known: list[list[int]] = []
        self._aligned = False

    def step(self, gradients: Sequence[Tensor], lr: float | Tensor) -> None:
        """One update. gradients: one a matrix, of one floating dtype; lr: a number or a float32 scalar there."""
        dtype = gradients[0].dtype
        held = [g.contiguous() for g in gradients]
        for gradient in held:
            self._check(gradient)
            require(
                "muon",
                gradient.dtype is dtype and dtype in _DTYPES,
                "gradients must be of one floating dtype",
            )
        table = [
            [
                m.data_ptr(),
                g.data_ptr(),
                b.data_ptr(),
                0 if self._weights is None else self._weights[i].data_ptr(),
            ]
            for i, (m, g, b) in enumerate(zip(self._matrices, held, self._buffers, strict=True))
        ]
        if table != self._known:
            self._addresses.copy_(torch.tensor(table, dtype=torch.int64))
            self._known = table
            self._aligned = all(address % ALIGNMENT == 0 for row in table for address in row)
        for first in range(0, len(held), self._batch):
            self._move(first, min(self._batch, len(held) - first), _DTYPES[dtype], lr)

    def _move(self, first: int, count: int, gradient_dtype: tl.dtype, lr: float | Tensor) -> None:
        """Moves matrices first .. first + count."""
        addresses = self._addresses[first:]
        blocks = triton.cdiv(self._rows * self._columns, BLOCK)
        x = workspace(count, self._rows, self._columns, self._dtype, self._device)
        partial = torch.empty((count, blocks), dtype=torch.float32, device=self._device)
        scales = torch.empty((count,), dtype=torch.float32, device=self._device)
        shape = (self._rows, self._columns, x.stride(1))
        padded = x.stride(1) != self._columns
        with on_device(x):
            momentum_kernel[(blocks, count)](
                addresses, x.data_ptr(), partial, *shape, self._rest,
                GRAD=gradient_dtype, WORK=_DTYPES[self._dtype], NESTEROV=self._nesterov, PADDED=padded,
                ALIGNED=self._aligned, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
            scale_kernel[(count,)](partial, scales, blocks, self._norm_factor, self._eps, BLOCK=1024)
            x = newton_schulz(x, scales, self._coefficients)
            update_kernel[(blocks, count)](
                addresses, x.data_ptr(), lr, *shape, self._weight_decay, self._scale,
                LR_ON_DEVICE=isinstance(lr, Tensor), WORK=_DTYPES[self._dtype], WEIGHT=_DTYPES[self._weight_dtype],
                HAS_WEIGHT=self._weights is not None, PADDED=padded,
                ALIGNED=self._aligned, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip

    def _check(self, tensor: Tensor) -> None:
        require(
            "muon",
            tensor.shape == (self._rows, self._columns)
            and tensor.is_contiguous()
            and tensor.device == self._device,
            f"tensors of a {self._rows} x {self._columns} matrix must have its shape and device and be contiguous; "
            f"got {tuple(tensor.shape)} of strides {tensor.stride()} on {tensor.device}",
        )
