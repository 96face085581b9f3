"""Muon's update is nearly orthogonal, and what torch.optim.Muon computes one matrix at a time."""

from __future__ import annotations

import pytest
import torch

from mainspring.train.muon import Muon, orthogonalise


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (8, 40), (40, 8)])
def test_singular_values_come_near_one(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(3)
    matrices = torch.randn(3, rows, columns, generator=generator)
    result = orthogonalise(matrices, 5).float()
    # Square Gaussian matrices have a few tiny singular values that five steps do not lift; the others are near 1.
    values = torch.linalg.svdvals(result)[:, : min(rows, columns) - 3]
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.25
    # The singular vectors stay: the result is positively aligned with U Vᵀ.
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    aligned = (result * (u @ vt)).sum((1, 2)) / (result.norm(dim=(1, 2)) * (u @ vt).norm(dim=(1, 2)))
    assert float(aligned.min()) > 0.9


def test_steps_equal_those_of_torch_muon() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(12, 20), (20, 12), (12, 20), (16, 16)]
    ours = [torch.randn(shape, generator=generator) for shape in shapes]
    theirs = [torch.nn.Parameter(matrix.clone()) for matrix in ours]
    muon = Muon(ours, momentum=0.9, weight_decay=0.05, iterations=5)
    oracle = torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=0.05, nesterov=True)
    starts = [matrix.clone() for matrix in ours]
    for _ in range(4):
        gradients = [torch.randn(shape, generator=generator) for shape in shapes]
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.clone()
        oracle.step()
        muon.step(gradients, lr=0.02)
    for mine, other, start in zip(ours, theirs, starts, strict=True):
        # Both iterate in bfloat16, in other batch shapes: the moves agree to bfloat16's accuracy.
        assert float((mine - other).norm() / (mine - start).norm()) < 2e-2


def test_views_of_fused_storage_are_updated_in_place() -> None:
    fused = torch.zeros(12, 8)
    top, bottom = fused[:4], fused[4:]
    muon = Muon([top, bottom], momentum=0.9, weight_decay=0.0, iterations=5)
    muon.step([torch.ones(4, 8), torch.zeros(8, 8)], lr=0.1)
    assert float(top.abs().sum()) > 0
    assert float(bottom.abs().sum()) == 0
    assert torch.equal(fused[:4], top)
