"""Muon: momentum whose matrix update is replaced by (nearly) the closest orthogonal matrix.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). torch.optim.Muon takes one
matrix at a time; here matrices of equal shape are orthogonalised as one batch, and fused weights are seen as the
parts they consist of.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from mainspring.ops.checks import described, reject
from mainspring.ops.policy import LOCKSTEP, Policy
from mainspring.ops.registry import Implementation, Operation, accepts_floats
from mainspring.ops.triton.support import refuses as triton_refuses

Coefficients = tuple[tuple[float, float, float], ...]
Scaling = Literal["original", "match_rms_adamw"]
EPS = 1e-7


@dataclass(frozen=True)
class NewtonSchulz:
    """Coefficients (a, b, c) of each step X <- a X + b (X Xᵀ) X + c (X Xᵀ)² X from X / (norm_factor · ‖X‖)."""

    coefficients: Coefficients
    norm_factor: float = 1.0


def classic(steps: int = 5) -> NewtonSchulz:
    """The quintic of Jordan et al.: its slope at 0 is as large as convergence to about [0.7, 1.2] permits."""
    return NewtonSchulz(((3.4445, -4.7750, 2.0315),) * steps)


CLASSIC = classic()


def polar_express(steps: int = 5) -> NewtonSchulz:
    """Step by step the best quintics for singular values from 1e-3 to 1 (Amsel et al., arXiv 2505.16932).

    Further steps are their limit, the quintic that touches 1 at 1 with two derivatives of 0.
    """
    known = (
        (8.1566, -22.4833, 15.8788),
        (4.0429, -2.8089, 0.5000),
        (3.8917, -2.7725, 0.5061),
        (3.2858, -2.3681, 0.4645),
        (2.3465, -1.7098, 0.4232),
    )
    return NewtonSchulz((known + ((1.875, -1.25, 0.375),) * steps)[:steps], 1.02)


@dataclass(frozen=True)
class MuonSettings:
    """scaling: of the update of a rows x columns matrix, beside the learning rate.

    "original": sqrt(max(1, rows / columns)), that of Jordan et al. and torch's default. "match_rms_adamw":
    0.2 · sqrt(max(rows, columns)), so that AdamW's learning rates fit (Moonlight, arXiv 2502.16982, eq. 4).
    """

    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.0
    newton_schulz: NewtonSchulz = CLASSIC
    scaling: Scaling = "original"

    def scale(self, rows: int, columns: int) -> float:
        """The factor of a matrix's update."""
        if self.scaling == "original":
            return math.sqrt(max(1.0, rows / columns))
        return 0.2 * math.sqrt(max(rows, columns))


def orthogonalise(
    matrices: Tensor, method: NewtonSchulz | None = None, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Newton–Schulz iteration towards U Vᵀ of each matrix's singular value decomposition U S Vᵀ.

    matrices: [N, rows, columns] -> dtype, of the same shape; with the classic coefficients singular values
    within about 0.7 to 1.2 after 5 steps, for all that are not tiny beside the largest.
    """
    method = method or CLASSIC
    x = matrices.to(dtype)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    # The Frobenius norm bounds the spectral norm, and the iteration converges from at most 1.
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=wide).clamp_(min=EPS)
    x = x / (norm * method.norm_factor).to(dtype)
    for a, b, c in method.coefficients:
        gram = torch.bmm(x, x.transpose(1, 2))
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.transpose(1, 2) if tall else x


class _Step(Protocol):
    """Moves the matrices of one shape."""

    def step(self, gradients: Sequence[Tensor], lr: float | Tensor) -> None: ...


@dataclass(frozen=True)
class _Group:
    """Matrices of one shape [rows, columns], their momenta, and rounded copies or None."""

    matrices: list[Tensor]
    buffers: list[Tensor]
    weights: list[Tensor] | None
    settings: MuonSettings
    workspace: int


@dataclass(frozen=True)
class _Reference:
    group: _Group

    def step(self, gradients: Sequence[Tensor], lr: float | Tensor) -> None:
        group, settings = self.group, self.group.settings
        wide = [g.to(b.dtype) for g, b in zip(gradients, group.buffers, strict=True)]
        torch._foreach_lerp_(group.buffers, wide, 1.0 - settings.momentum)
        updates = torch.stack(group.buffers)
        if settings.nesterov:
            updates = torch.stack(wide).lerp_(updates, settings.momentum)
        updates = orthogonalise(updates, settings.newton_schulz)
        scale = settings.scale(*updates.shape[1:])
        for matrix, update in zip(group.matrices, updates.unbind(0), strict=True):
            matrix.mul_(1.0 - lr * settings.weight_decay)
            matrix.sub_(update * (lr * scale))
        if group.weights is not None:
            torch._foreach_copy_(group.weights, group.matrices)


def _triton(group: _Group) -> _Step:
    from mainspring.ops.triton.muon import FusedMuon

    settings = group.settings
    return FusedMuon(
        group.matrices,
        group.buffers,
        group.weights,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        weight_decay=settings.weight_decay,
        coefficients=settings.newton_schulz.coefficients,
        norm_factor=settings.newton_schulz.norm_factor,
        eps=EPS,
        scale=settings.scale(*group.matrices[0].shape),
        limit=group.workspace,
    )


MUON: Operation[[_Group], _Step] = Operation(
    "muon",
    Implementation("triton", _triton, triton_refuses),
    Implementation("reference", _Reference, accepts_floats),
)


class Muon:
    """Muon with decoupled weight decay over a fixed list of matrices and of stacks of matrices.

    Args:
        matrices: float32 [rows, columns] or [experts, rows, columns] each, on one device, updated in place (views of
            fused storage are fine).
        weights: rounded copies of the matrices in a narrower dtype that are refreshed with them, or None.
        workspace: bytes that a step may take beside its state, if a matrix does not need more.

    `buffers` holds the momenta, shaped like the matrices. Raises BackendError for other tensors than these.
    """

    def __init__(
        self,
        matrices: Sequence[Tensor],
        settings: MuonSettings | None = None,
        *,
        weights: Sequence[Tensor] | None = None,
        policy: Policy = LOCKSTEP,
        workspace: int = 2 << 30,
    ) -> None:
        settings = settings or MuonSettings()
        self._shapes = [m.shape for m in matrices]
        for m in matrices:
            if m.dim() not in (2, 3) or not m.is_floating_point() or m.device != matrices[0].device:
                raise reject(
                    "muon",
                    f"matrices are [rows, columns] or stacks of such on one device, not {described(m)}",
                )
        self.buffers = [torch.zeros_like(m, memory_format=torch.contiguous_format) for m in matrices]
        if weights is not None:
            self._check("weights", weights)
        flat = [_unstack(m) for m in matrices]
        buffers = [_unstack(b) for b in self.buffers]
        copies = None if weights is None else [_unstack(w) for w in weights]
        # (which of the matrices, which of its stack) by shape
        members: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        for i, parts in enumerate(flat):
            for j, part in enumerate(parts):
                members[(part.shape[0], part.shape[1])].append((i, j))
        self._groups: list[tuple[list[tuple[int, int]], _Step]] = []
        for places in members.values():
            group = _Group(
                [flat[i][j] for i, j in places],
                [buffers[i][j] for i, j in places],
                None if copies is None else [copies[i][j] for i, j in places],
                settings,
                workspace,
            )
            self._groups.append((places, MUON.select(group.matrices[0], policy)(group)))

    def _check(self, name: str, tensors: Sequence[Tensor]) -> None:
        if len(tensors) != len(self._shapes):
            raise reject("muon", f"{len(tensors)} {name} for {len(self._shapes)} matrices")
        for i, (tensor, shape) in enumerate(zip(tensors, self._shapes, strict=True)):
            if (
                tensor.shape != shape
                or not tensor.is_floating_point()
                or tensor.device != self.buffers[i].device
            ):
                raise reject(
                    "muon",
                    f"{name}[{i}] must be {tuple(shape)} on {self.buffers[i].device}, not {described(tensor)}",
                )

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], lr: float | Tensor) -> None:
        """Moves every matrix; gradients stand in the matrices' order and are not changed.

        lr: a number, or a float32 scalar on the matrices' device (which a CUDA graph reads anew at each replay).
        Raises BackendError for gradients that are not one a matrix and of its shape.
        """
        self._check("gradients", gradients)
        parts = [_unstack(g) for g in gradients]
        for places, group in self._groups:
            group.step([parts[i][j] for i, j in places], lr)


def _unstack(tensor: Tensor) -> list[Tensor]:
    return list(tensor.unbind(0)) if tensor.ndim == 3 else [tensor]
