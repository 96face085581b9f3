"""Matrix products: every path of the kernels (few rows, few terms, few columns, panels), every dtype, any strides."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import mainspring.tensor as mt

# (m, n, k): one row; a row wider than a stretch; outer products; narrow results; more rows than a block; tails.
SHAPES = [
    (1, 37, 50), (1, 1500, 9), (2, 40, 33), (70, 130, 1), (33, 20, 2), (100, 24, 70), (64, 32, 64), (50, 17, 600),
    (230, 70, 40), (13, 65, 31), (7, 3, 5),
]  # fmt: skip
STEPS = {"float64": 2.0**-50, "float32": 2.0**-21, "bfloat16": 2.0**-7, "float16": 2.0**-10}


def laid_out(values: np.ndarray, kind: str, layout: str) -> mt.Tensor:
    """The matrix as a contiguous tensor, a transposed view, or every other row and column of a larger one."""
    if layout == "transposed":
        return mt.from_numpy(np.ascontiguousarray(values.T)).to(getattr(mt, kind)).T
    if layout == "spread":
        wide = np.zeros((2 * values.shape[0], 2 * values.shape[1]))
        wide[::2, ::2] = values
        return mt.from_numpy(wide).to(getattr(mt, kind))[::2, ::2]
    return mt.from_numpy(values.copy()).to(getattr(mt, kind))


def check(kind: str) -> None:
    """Every shape in every layout against float64, with the bound of one rounding and of a float32 sum."""
    rng = np.random.default_rng(0)
    for m, n, k in SHAPES:
        for a_layout, b_layout in (
            ("plain", "plain"),
            ("transposed", "plain"),
            ("plain", "transposed"),
            ("spread", "spread"),
        ):
            a = laid_out(rng.standard_normal((m, k)), kind, a_layout)
            b = laid_out(rng.standard_normal((k, n)), kind, b_layout)
            exact_a, exact_b = a.double().numpy(), b.double().numpy()
            bound = STEPS[kind] * (np.abs(exact_a) @ np.abs(exact_b)) + (
                2.0**-24 if kind == "float16" else 1e-30
            )  # its subnormal steps
            error = np.abs((a @ b).double().numpy() - exact_a @ exact_b)
            assert (error <= bound).all(), (kind, m, n, k, a_layout, b_layout, float((error / bound).max()))


@pytest.mark.parametrize("kind", STEPS)
def test_products_are_exact_within_a_rounding(kind: str) -> None:
    check(kind)


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_products_are_exact_in_lower_instruction_sets(isa: str) -> None:
    code = "from tensor.test_products import STEPS, check\nfor kind in STEPS: check(kind)"
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "MAINSPRING_CPU_ISA": isa, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_what_is_not_finite_shows_in_its_own_column_only(rows: int) -> None:
    a, b = mt.zeros(rows, 6), mt.ones(6, 40)
    b[3, 7] = float("inf")
    out = a @ b
    assert mt.isnan(out[:, 7]).all().item()
    assert (out[:, :7] == 0).all().item()
    assert (out[:, 8:] == 0).all().item()


def test_a_narrow_product_is_that_of_its_columns_alone() -> None:
    """A result of few columns reads its left factor where it lies: the same bits as through panels."""
    a, b = mt.randn(100, 90), mt.randn(90, 200)
    whole = a @ b
    for first in (0, 32, 64):
        assert (a @ b[:, first : first + 32] == whole[:, first : first + 32]).all().item()
