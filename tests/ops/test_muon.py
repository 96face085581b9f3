"""Muon's update is nearly orthogonal, and what torch.optim.Muon computes one matrix at a time."""

from __future__ import annotations

import math

import pytest
import torch

from mainspring.ops.muon import Muon, MuonSettings, NewtonSchulz, classic, orthogonalise, polar_express


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (8, 40), (40, 8)])
def test_singular_values_come_near_one(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(3)
    matrices = torch.randn(3, rows, columns, generator=generator)
    result = orthogonalise(matrices).float()
    # Square Gaussian matrices have a few tiny singular values that five steps do not lift; the others are near 1.
    values = torch.linalg.svdvals(result)[:, : min(rows, columns) - 3]
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.25
    # The singular vectors stay: the result is positively aligned with U Vᵀ.
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    aligned = (result * (u @ vt)).sum((1, 2)) / (result.norm(dim=(1, 2)) * (u @ vt).norm(dim=(1, 2)))
    assert float(aligned.min()) > 0.9


@pytest.mark.parametrize("method", [classic(), classic(8), polar_express(), polar_express(7)], ids=str)
def test_a_step_is_its_polynomial_of_the_singular_values(method: NewtonSchulz) -> None:
    generator = torch.Generator().manual_seed(1)
    u, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(9, 6, generator=generator, dtype=torch.float64))
    values = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1, 0.01], dtype=torch.float64)
    result = orthogonalise(((u * values) @ v.T)[None], method, torch.float64)[0]
    s = values / (values.norm() * method.norm_factor)
    for a, b, c in method.coefficients:
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(result, (u * s) @ v.T, rtol=1e-9, atol=1e-9)


def test_polar_express_comes_nearer_than_the_classic_steps() -> None:
    matrices = torch.randn(4, 24, 40, generator=torch.Generator().manual_seed(0))
    far = [
        float((torch.linalg.svdvals(orthogonalise(matrices, m, torch.float64)) - 1).abs().max())
        for m in (polar_express(8), classic(8))
    ]
    assert far[0] < 0.02 < 0.15 < far[1]


def polar_express_in_torch(gradient: torch.Tensor, *_: object) -> torch.Tensor:
    """What stands for torch's Newton-Schulz steps, whose coefficients are the same in each."""
    x = gradient.bfloat16() if gradient.shape[0] <= gradient.shape[1] else gradient.bfloat16().T
    x = x / (1.02 * torch.linalg.vector_norm(x, dtype=torch.float32)).bfloat16()
    for a, b, c in polar_express().coefficients:
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if gradient.shape[0] <= gradient.shape[1] else x.T


@pytest.mark.parametrize("method", [classic(), polar_express()], ids=["classic", "polar express"])
@pytest.mark.parametrize("scaling", ["original", "match_rms_adamw"])
def test_steps_equal_those_of_torch_muon(
    scaling: str, method: NewtonSchulz, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method == polar_express():
        monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", polar_express_in_torch)
    generator = torch.Generator().manual_seed(0)
    shapes = [(12, 20), (20, 12), (12, 20), (16, 16)]
    ours = [torch.randn(shape, generator=generator) for shape in shapes]
    theirs = [torch.nn.Parameter(matrix.clone()) for matrix in ours]
    muon = Muon(ours, MuonSettings(momentum=0.9, weight_decay=0.05, scaling=scaling, newton_schulz=method))
    oracle = torch.optim.Muon(
        theirs, lr=0.02, momentum=0.9, weight_decay=0.05, nesterov=True, adjust_lr_fn=scaling
    )
    starts = [matrix.clone() for matrix in ours]
    for _ in range(4):
        gradients = [torch.randn(shape, generator=generator) for shape in shapes]
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.clone()
        oracle.step()
        muon.step(gradients, lr=0.02)
    for mine, other, start in zip(ours, theirs, starts, strict=True):
        # Both iterate in bfloat16, in other batch shapes: the moves agree to bfloat16's accuracy.
        assert float((mine - other.detach()).norm() / (mine - start).norm()) < 2e-2


def test_the_update_of_moonlight_has_the_size_of_adamws() -> None:
    settings = MuonSettings(momentum=0.0, scaling="match_rms_adamw", newton_schulz=polar_express(8))
    matrix = torch.zeros(30, 90)
    Muon([matrix], settings).step([torch.randn(30, 90, generator=torch.Generator().manual_seed(0))], lr=1.0)
    assert float(matrix.square().mean().sqrt()) == pytest.approx(0.2, rel=0.02)
    assert settings.scale(30, 90) == 0.2 * math.sqrt(90)


def test_views_of_fused_storage_are_updated_in_place() -> None:
    fused = torch.zeros(12, 8)
    top, bottom = fused[:4], fused[4:]
    muon = Muon([top, bottom], MuonSettings(momentum=0.9))
    muon.step([torch.ones(4, 8), torch.zeros(8, 8)], lr=0.1)
    assert float(top.abs().sum()) > 0
    assert float(bottom.abs().sum()) == 0
    assert torch.equal(fused[:4], top)


def test_a_stack_of_experts_is_moved_expert_by_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(3, 8, 5, generator=generator)
    alone = [m.clone() for m in stack]
    gradient = torch.randn(3, 8, 5, generator=generator)
    copy = stack.to(torch.bfloat16)
    muon = Muon([stack], weights=[copy])
    muon.step([gradient], lr=0.1)
    assert muon.buffers[0].shape == stack.shape
    for i, matrix in enumerate(alone):
        Muon([matrix]).step([gradient[i]], lr=0.1)
        torch.testing.assert_close(stack[i], matrix, rtol=1e-2, atol=1e-3)
    assert torch.equal(copy, stack.to(torch.bfloat16))
