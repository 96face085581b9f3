"""What the tests of the C++ CPU kernels share: the error rule, thread counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from mainspring.ops.cpu.extension import kernels, require_kernels, unavailable_reason

requires_kernels = pytest.mark.skipif(kernels() is None, reason=str(unavailable_reason()))

DTYPES = (torch.float32, torch.bfloat16)


def random_tensor(seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal values, the same for the same seed and shape."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def assert_as_exact_as_torch(
    got: Tensor, peer: Tensor, exact: Tensor, roundings: float = 1.0, magnitude: float = 0.0
) -> None:
    """max|got - exact| <= 2 max|peer - exact| + `roundings` half units in the last place of the largest value.

    peer is torch's result in the same dtype, exact the formula in float64. Where terms cancel, give the
    largest sum of their `magnitude`s: two units of float32 in that are allowed as well, for few elements may
    find the peer exact by luck.
    """
    assert got.shape == exact.shape
    assert got.isfinite().all(), "not finite: an output that was never written, or an overflow"
    if exact.numel() == 0:
        return
    error = (got.double() - exact).abs().max().item()
    allowed = 2 * (peer.double() - exact).abs().max().item()
    allowed += roundings * torch.finfo(got.dtype).eps / 2 * exact.abs().max().item()
    allowed += 2 * torch.finfo(torch.float32).eps * magnitude
    assert error <= allowed, f"error {error:.3g} is larger than the allowed {allowed:.3g}"


def bits(x: Tensor) -> Tensor:
    """The bit patterns, so that comparison tells +0 from -0 and takes a NaN as equal to itself."""
    return x.contiguous().view(torch.int16 if x.dtype is torch.bfloat16 else torch.int32)


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    different = int((bits(a) != bits(b)).sum())
    assert different == 0, f"{different} of {a.numel()} elements differ"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """The kernels on `count` threads."""
    module = require_kernels()
    before = module.num_threads()
    module.set_num_threads(count)
    try:
        yield
    finally:
        module.set_num_threads(before)
