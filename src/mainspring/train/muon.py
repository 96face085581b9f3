"""Muon: momentum whose matrix update is replaced by (nearly) the closest orthogonal matrix.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). torch.optim.Muon takes one
matrix at a time; here matrices of equal shape are orthogonalised as one batched product, which on small
models is most of an optimizer step's time, and fused weights are seen as the parts they consist of.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

# The quintic of Jordan et al.: its slope at 0 is as large as convergence to about [0.7, 1.2] permits.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_EPS = 1e-7


def orthogonalise(matrices: Tensor, iterations: int) -> Tensor:
    """Newton–Schulz iteration towards U Vᵀ of each matrix's singular value decomposition U S Vᵀ.

    matrices: [N, rows, columns] -> bfloat16 of the same shape, singular values near 1 (within about 0.7 to 1.2
    after 5 iterations, for all that are not tiny beside the largest). X <- a X + (b X Xᵀ + c (X Xᵀ)²) X.
    """
    x = matrices.to(torch.bfloat16)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    # The Frobenius norm bounds the spectral norm, and the iteration converges from at most 1.
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32) + _EPS).to(x.dtype)
    for _ in range(iterations):
        gram = torch.bmm(x, x.transpose(1, 2))
        update = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        x = torch.baddbmm(x, update, x, beta=_A)
    return x.transpose(1, 2) if tall else x


class Muon:
    """Muon with Nesterov momentum and decoupled weight decay over a fixed list of matrices.

    matrices: float32 [rows, columns] each, updated in place (views of fused storage are fine).
    The update of each is scaled by sqrt(max(1, rows / columns)), as in the original.
    """

    def __init__(
        self, matrices: Sequence[Tensor], *, momentum: float, weight_decay: float, iterations: int
    ) -> None:
        self._matrices = list(matrices)
        self._momentum = momentum
        self._weight_decay = weight_decay
        self._iterations = iterations
        self.buffers = [torch.zeros_like(m, memory_format=torch.contiguous_format) for m in self._matrices]
        self._groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, matrix in enumerate(self._matrices):
            self._groups[(matrix.shape[0], matrix.shape[1])].append(index)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], lr: float) -> None:
        """Moves every matrix; gradients stand in the matrices' order and are not changed."""
        torch._foreach_lerp_(self.buffers, list(gradients), 1.0 - self._momentum)
        for (rows, columns), members in self._groups.items():
            momenta = torch.stack([self.buffers[i] for i in members])
            nesterov = torch.stack([gradients[i] for i in members]).lerp_(momenta, self._momentum)
            updates = orthogonalise(nesterov, self._iterations)
            scale = math.sqrt(max(1.0, rows / columns))
            for i, update in zip(members, updates.unbind(0), strict=True):
                matrix = self._matrices[i]
                matrix.mul_(1.0 - lr * self._weight_decay)
                matrix.add_(update, alpha=-lr * scale)
