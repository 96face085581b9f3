"""Triton's rotary embedding: its sines and cosines, its rotation and gradient, and its writes to a paged cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops import Policy, RopeAngles, rope
from support.cpu_kernels import assert_as_exact_as_torch
from support.triton_kernels import (
    DEVICE,
    DTYPES,
    EXAMPLES,
    INTERPRETED,
    assert_same_bits,
    needs_triton,
    poisoned_memory,
    random_tensor,
)

pytestmark = needs_triton

TRITON = Policy("lockstep", "triton")


@pytest.fixture(autouse=True, scope="module")
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def _cos_and_sin(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """What the kernel turns by: it rotates (1, 0)."""
    one = torch.zeros(positions.shape[0], 1, 2 * inv_freq.shape[0], device=DEVICE)
    one[..., : inv_freq.shape[0]] = 1
    turned, _ = rope(one, one.clone(), RopeAngles(positions, inv_freq), policy=TRITON)
    cos, sin = turned[:, 0].chunk(2, -1)
    return cos, sin


@pytest.mark.parametrize("longest", [1000, 1 << 20])
@pytest.mark.parametrize("base", [1e4, 1e6])
def test_sines_and_cosines_within_two_units_in_the_last_place(base: float, longest: int) -> None:
    count = 64 if INTERPRETED else 65536
    generator = torch.Generator().manual_seed(longest)
    positions = torch.randint(0, longest + 1, (count,), generator=generator).to(DEVICE)
    positions[:3] = torch.tensor([0, 1, longest], device=DEVICE)
    inv_freq = base ** -(torch.arange(64, device=DEVICE) / 64)
    angle = (positions.float()[:, None] * inv_freq).double()
    for got, exact in zip(_cos_and_sin(positions, inv_freq), (angle.cos(), angle.sin()), strict=True):
        nearest = exact.float().abs().clamp_min(1e-30)
        unit = torch.nextafter(nearest, torch.full_like(nearest, torch.inf)) - nearest
        assert float(((got.double() - exact).abs() / unit.double()).max()) < 2


@settings(max_examples=2 * EXAMPLES, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    tokens=st.sampled_from([1, 2, 15, 130]),
    heads=st.sampled_from([(1, 1), (9, 3), (4, 2)]),
    half=st.sampled_from([4, 8, 12, 32]),
    rest=st.sampled_from([0, 8, 10]),
    interleaved=st.booleans(),
    rowed=st.booleans(),
    scale=st.sampled_from([1.0, 1.1]),
    seed=st.integers(0, 99),
)
def test_rope_and_its_gradient(
    dtype: torch.dtype,
    tokens: int,
    heads: tuple[int, int],
    half: int,
    rest: int,
    interleaved: bool,
    rowed: bool,
    scale: float,
    seed: int,
) -> None:
    from mainspring.ops.rope import _rotate

    fused = random_tensor(seed, tokens, sum(heads) + heads[1], 2 * half + rest, dtype=dtype)
    q, k, _ = fused.split((*heads, heads[1]), 1)
    positions = torch.arange(tokens, device=DEVICE) * 37
    inv_freq = 10000.0 ** -(torch.arange(half, device=DEVICE) / half)
    rows = None
    if rowed:
        inv_freq = torch.stack((inv_freq, inv_freq / 3))
        rows = torch.arange(tokens, device=DEVICE) % 2
    angles = RopeAngles(positions, inv_freq, rows, scale)
    angle = (positions.float()[:, None] * (inv_freq if rows is None else inv_freq[rows])).double()

    def run(q: Tensor, k: Tensor, ours: bool) -> list[Tensor]:
        a, b = q.detach().requires_grad_(), k.detach().requires_grad_()
        if ours:
            out = rope(a, b, angles, interleaved=interleaved, policy=TRITON)
        else:
            wide = torch.float64 if q.dtype is torch.float64 else torch.float32
            cos, sin = ((f(angle) * scale).to(wide) for f in (torch.cos, torch.sin))
            out = _rotate(a, cos, sin, interleaved), _rotate(b, cos, sin, interleaved)
        grads = torch.autograd.grad(out, (a, b), [torch.ones_like(t) * 0.7 for t in out])
        return [*(t.detach() for t in out), *grads]

    ours = run(q, k, True)
    for a, b, c in zip(ours, run(q, k, False), run(q.double(), k.double(), False), strict=True):
        assert_as_exact_as_torch(a, b, c, roundings=6 if dtype is torch.float32 else 2)
    part = slice(tokens - 1, tokens)
    alone = RopeAngles(positions[part], inv_freq, None if rows is None else rows[part], scale)
    one = rope(q[part].clone(), k[part].clone(), alone, interleaved=interleaved, policy=TRITON)
    assert_same_bits(one[0], ours[0][part])
    in_place = rope(q, k, angles, interleaved=interleaved, policy=TRITON)
    assert in_place[0].data_ptr() == q.data_ptr()
    assert_same_bits(in_place[0], ours[0])
    assert_same_bits(in_place[1], ours[1])


def test_bad_input_is_refused() -> None:
    from mainspring.ops.triton.rope import rope as triton_rope

    q, positions, inv_freq = (
        random_tensor(0, 3, 2, 8),
        torch.arange(3, device=DEVICE),
        torch.ones(4, device=DEVICE),
    )
    with pytest.raises(BackendError, match="does not fit q"):
        triton_rope(q, q[:2], positions, inv_freq)
    with pytest.raises(BackendError, match="positions must be"):
        triton_rope(q, q, positions.float(), inv_freq)
    with pytest.raises(BackendError, match="inv_freq must be"):
        triton_rope(q, q, positions, inv_freq.double())
    with pytest.raises(BackendError, match="a head has 8"):
        triton_rope(q, q, positions, torch.ones(5, device=DEVICE))
    with pytest.raises(BackendError, match="rows must be"):
        triton_rope(q, q, positions, inv_freq[None], positions[:2])
