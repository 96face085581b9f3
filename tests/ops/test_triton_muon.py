"""Muon in Triton: the products behind it, its steps against torch.optim.Muon and float64, batches, graphs, errors."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops import Policy
from mainspring.ops.muon import CLASSIC, Muon, MuonSettings, NewtonSchulz, orthogonalise, polar_express
from support.cpu_kernels import assert_as_exact_as_torch
from support.memory import in_poisoned_memory
from support.triton_kernels import (
    DEVICE,
    INTERPRETED,
    assert_same_bits,
    needs_triton,
    random_tensor,
)

pytestmark = [*needs_triton, in_poisoned_memory]
gpu_only = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")

TRITON = Policy("lockstep", "triton")
WORK = torch.float32 if INTERPRETED else torch.bfloat16  # what the products compute in
METHODS = [CLASSIC, polar_express()]
# A square, both kinds of long ones, odd sizes, a single row, one that is many tiles long.
SHAPES = [(16, 16), (33, 40), (40, 7)] + (
    [] if INTERPRETED else [(1, 9), (12, 100), (333, 70), (384, 1000), (520, 520)]
)


def exact_steps(start: Tensor, gradients: list[Tensor], settings: MuonSettings, lr: float) -> Tensor:
    """The formula in float64, of one matrix."""
    matrix, buffer = start.double(), torch.zeros_like(start, dtype=torch.float64)
    for gradient in gradients:
        buffer.lerp_(gradient.double(), 1 - settings.momentum)
        update = gradient.double().lerp(buffer, settings.momentum) if settings.nesterov else buffer
        direction = orthogonalise(update[None], settings.newton_schulz, torch.float64)[0]
        matrix = matrix * (1 - lr * settings.weight_decay) - lr * settings.scale(*start.shape) * direction
    return matrix


@pytest.mark.parametrize(
    ("rows", "depth"), [(40, 70), (33, 7), (1, 5)] + ([] if INTERPRETED else [(300, 136), (1000, 520)])
)
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("tile", [None, 0, 1, 2, "roles"])
def test_products(rows: int, depth: int, across: bool, tile: int | str | None) -> None:
    from mainspring.ops.triton import newton_schulz
    from mainspring.ops.triton.newton_schulz import _CHOICES, workspace

    if INTERPRETED and tile is not None:
        pytest.skip("the interpreter is slow, and its one tile is the default")
    device = torch.device(DEVICE)
    if tile == "roles" and not newton_schulz._has_roles(device):
        pytest.skip("needs a Hopper GPU")
    chosen = _CHOICES[tile][0] if isinstance(tile, int) else None
    _product = partial(newton_schulz._product, tile=chosen, roles=tile == "roles")
    x = workspace(3, *((depth, rows) if across else (rows, depth)), WORK, device)
    x.copy_(random_tensor(0, *x.shape) / depth**0.5)
    wide = x.double().transpose(1, 2) if across else x.double()
    scales = random_tensor(1, 3).abs() + 0.5

    def compare(got: Tensor, formula: Tensor) -> None:
        peer = formula.to(WORK)
        assert_as_exact_as_torch(got, peer, formula, roundings=2 if WORK is torch.bfloat16 else 64)

    gram = workspace(3, rows, rows, WORK, device)
    _product(
        x, x, gram, left_across=across, right_across=across, symmetric=True, scales=scales, power=2, alpha=0.5,
    )  # fmt: skip
    compare(gram, 0.5 * (wide @ wide.transpose(1, 2)) * scales.double()[:, None, None] ** 2)
    assert_same_bits(gram, gram.transpose(1, 2))
    polynomial = workspace(3, rows, rows, WORK, device)
    _product(gram, gram, polynomial, added=gram, alpha=2.0, weight=-3.0, diagonal=1.5, symmetric=True)
    g = gram.double()
    identity = torch.eye(rows, dtype=torch.float64, device=DEVICE)
    compare(polynomial, 2 * (g @ g - 3 * g) + 1.5 * identity)
    assert_same_bits(polynomial, polynomial.transpose(1, 2))
    out = workspace(3, *x.shape[1:], WORK, device)
    left, right = (x, polynomial) if across else (polynomial, x)
    _product(left, right, out, added=x, weight=0.5, right_across=not across, scales=scales, power=1)
    compare(out, (left.double() @ right.double() + 0.5 * x.double()) * scales.double()[:, None, None])
    _product(left, right, out, right_across=not across)
    compare(out, left.double() @ right.double())


@pytest.mark.parametrize(
    ("method", "scaling"),
    [(METHODS[0], "original"), (METHODS[1], "match_rms_adamw")],
    ids=["classic", "polar"],
)
def test_steps_are_those_of_the_formula(method: NewtonSchulz, scaling: str) -> None:
    settings = MuonSettings(weight_decay=0.1, newton_schulz=method, scaling=scaling)
    steps = 2 if INTERPRETED else 20
    starts = [random_tensor(i, *shape) for i, shape in enumerate(SHAPES)]
    gradients = [
        [random_tensor(100 + 7 * s + i, *m.shape) for i, m in enumerate(starts)] for s in range(steps)
    ]
    ours, theirs = [m.clone() for m in starts], [m.clone() for m in starts]
    narrow = [m.to(torch.float16) for m in starts]
    muon = Muon(ours, settings, weights=narrow, policy=TRITON)
    reference = Muon(theirs, settings, policy=Policy("lockstep", "reference"))
    for given in gradients:
        muon.step(given, 0.05)
        reference.step(given, 0.05)
    for i, (start, mine, other) in enumerate(zip(starts, ours, theirs, strict=True)):
        exact = exact_steps(start, [g[i] for g in gradients], settings, 0.05)
        assert_as_exact_as_torch(mine, other, exact, roundings=4 + 16 * steps * INTERPRETED)
        assert_same_bits(narrow[i], mine.to(torch.float16))


@gpu_only
def test_steps_are_those_of_torch_muon() -> None:
    shapes = [(256, 512), (512, 256), (256, 512), (384, 384), (100, 44)]
    starts = [random_tensor(i, *shape) for i, shape in enumerate(shapes)]
    ours, theirs = [m.clone() for m in starts], [torch.nn.Parameter(m.clone()) for m in starts]
    settings = MuonSettings(weight_decay=0.05)
    muon = Muon(ours, settings)
    oracle = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.05)
    every: list[list[Tensor]] = []
    for step in range(20):
        every.append([random_tensor(50 + 10 * step + i, *shape) for i, shape in enumerate(shapes)])
        for parameter, gradient in zip(theirs, every[-1], strict=True):
            parameter.grad = gradient.clone()
        oracle.step()
        muon.step(every[-1], 0.02)
        for i, (mine, other, start) in enumerate(zip(ours, theirs, starts, strict=True)):
            exact = exact_steps(start, [g[i] for g in every], settings, 0.02)
            moved = (exact - start).norm()
            assert (mine - exact).norm() <= 1.5 * (other.detach() - exact).norm() + 1e-3 * moved


@gpu_only
@pytest.mark.parametrize("kind", ["power", "exponential", "low rank"])
@pytest.mark.parametrize("method", METHODS, ids=["classic", "polar express"])
def test_small_singular_values_keep_their_accuracy(kind: str, method: NewtonSchulz) -> None:
    n, m = 512, 1408
    k = torch.arange(n, device=DEVICE)
    values = {
        "power": 1.0 / (1 + k),
        "exponential": torch.exp(-8.0 * k / n),
        "low rank": torch.where(k < n // 8, 1.0, 1e-3),
    }[kind]
    u, v = torch.linalg.qr(random_tensor(0, n, n))[0], torch.linalg.qr(random_tensor(1, m, n))[0]
    gradient = (u * values) @ v.T
    exact = orthogonalise(gradient[None], method, torch.float64)[0]
    for matrix in (gradient, gradient.T.contiguous()):
        target = exact if matrix is gradient else exact.T
        peer = orthogonalise(matrix[None], method)[0]
        mine = torch.zeros_like(matrix)
        settings = MuonSettings(momentum=0.0, newton_schulz=method)
        Muon([mine], settings).step([matrix], -1.0 / settings.scale(*matrix.shape))
        assert (mine - target).norm() <= 2 * (peer - target).norm()


def test_batches_and_a_rate_on_the_device_change_no_bit() -> None:
    starts = [random_tensor(i, 40, 24) for i in range(5)]
    gradients = [random_tensor(10 + i, 40, 24) for i in range(5)]
    whole, pieces = [m.clone() for m in starts], [m.clone() for m in starts]
    stack = torch.stack(starts)
    one, two = Muon(whole, policy=TRITON), Muon(pieces, policy=TRITON, workspace=1)
    experts = Muon([stack], policy=TRITON)
    for _ in range(2):
        one.step(gradients, 0.1)
        two.step(gradients, torch.tensor(0.1, device=DEVICE))
        experts.step([torch.stack(gradients)], 0.1)
    for a, b, c in zip(whole, pieces, stack, strict=True):
        assert_same_bits(a, b)
        assert_same_bits(a, c)


@pytest.mark.parametrize("scale", [1e-6, 1e12])
def test_the_size_of_a_gradient_does_not_matter(scale: float) -> None:
    gradient = random_tensor(0, 24, 40)
    moved = [torch.zeros(24, 40, device=DEVICE) for _ in range(2)]
    Muon(moved[:1], policy=TRITON).step([gradient], 1.0)
    Muon(moved[1:], policy=TRITON).step([gradient * scale], 1.0)
    assert float((moved[0] - moved[1]).abs().max()) < 0.02 * float(moved[0].abs().max()) + 0.01


def test_a_gradient_of_zero_only_decays_and_narrow_gradients_are_taken() -> None:
    matrix = random_tensor(0, 20, 12)
    before = matrix.clone()
    muon = Muon([matrix], MuonSettings(weight_decay=0.5), policy=TRITON)
    muon.step([torch.zeros(20, 12, dtype=torch.float16, device=DEVICE)], 0.1)
    torch.testing.assert_close(matrix, before * 0.95)


@gpu_only
def test_steps_replay_in_a_graph() -> None:
    shapes = [(300, 300), (512, 256)]
    eager, graphed = ([random_tensor(i, *s) for i, s in enumerate(shapes)] for _ in range(2))
    gradients = [random_tensor(9 + i, *s) for i, s in enumerate(shapes)]
    rate = torch.tensor(0.02, device=DEVICE)
    one, two = Muon(eager), Muon(graphed)
    one.step(gradients, rate)
    two.step(gradients, rate)  # compiles, and uploads the tables of addresses
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        two.step(gradients, rate)
    for factor in (1.0, 0.5, 2.0):
        rate.fill_(0.02 * factor)
        graph.replay()
        one.step(gradients, 0.02 * factor)
    for a, b in zip(eager, graphed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_bad_input_is_refused() -> None:
    matrix = random_tensor(0, 8, 12)
    with pytest.raises(BackendError, match="contiguous"):
        Muon([random_tensor(0, 12, 8).t()], policy=TRITON)
    muon = Muon([matrix], policy=TRITON)
    with pytest.raises(BackendError, match=r"gradients\[0\] must be \(8, 12\)"):
        muon.step([matrix[:4]], 0.1)
    with pytest.raises(BackendError, match="gradients"):
        muon.step([matrix.double()], 0.1)
    with pytest.raises(BackendError, match="float32"):
        Muon([matrix.half()], policy=TRITON)
