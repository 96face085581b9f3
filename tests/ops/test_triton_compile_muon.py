"""Muon's kernels compile for Hopper without a GPU: no spills, all products by warpgroups, states moved in vectors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ops.test_triton_compile import WARPGROUP_PRODUCT, compiled, stack_bytes
from support.triton_kernels import AVAILABLE, INTERPRETED

pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason="Triton is not installed"),
    pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing"),
]

# (left across, right across, added, symmetric): Gram matrices of wide and tall matrices, polynomials, updates.
PRODUCTS = {
    "wide gram": (False, False, False, True),
    "tall gram": (True, True, False, True),
    "polynomial": (False, False, True, True),
    "wide update": (False, True, True, False),
    "tall update": (False, False, True, False),
}
INTEGERS = ("batch", "tiles_each", "rows", "columns", "depth")
FACTORS = dict.fromkeys(("alpha", "weight", "diagonal"), "fp32")


@pytest.mark.parametrize("kind", PRODUCTS)
def test_products(kind: str, tmp_path: Path) -> None:
    import triton.language as tl

    from mainspring.ops.triton.newton_schulz import _CHOICES, product_kernel

    left_across, right_across, add, symmetric = PRODUCTS[kind]
    for tile, _ in _CHOICES:
        half = tile.columns // 2

        def box(height: int, width: int) -> str:
            return f"tensordesc<bf16[1,{height},{width}]>"

        pitches = (
            "left_rows",
            "left_columns",
            "left_pitch",
            "right_rows",
            "right_columns",
            "right_pitch",
            "pitch",
        )
        types = {
            "left": box(tile.k, tile.rows) if left_across else box(tile.rows, tile.k),
            "right": box(tile.k, tile.columns) if right_across else box(tile.columns, tile.k),
            "out": box(tile.rows, half), **dict.fromkeys((*INTEGERS, *pitches), "i32"), **FACTORS,
            **({"added": box(tile.rows, half)} if add else {}),
            **({"mirrored": box(half, tile.rows)} if symmetric else {}),
        }  # fmt: skip
        constants: dict[str, Any] = {
            "scales": None, "LEFT_ACROSS": left_across, "RIGHT_ACROSS": right_across, "ADD": add,
            "SYMMETRIC": symmetric, "DIAGONAL": symmetric and add, "SCALE_POWER": 0, "DTYPE": tl.bfloat16,
            "ROWS": tile.rows, "COLUMNS": tile.columns, "STEP": tile.k, "GROUP": 8, "TMA": True, "FLATTEN": True,
            **({} if add else {"added": None}), **({} if symmetric else {"mirrored": None}),
        }  # fmt: skip
        binary = compiled(product_kernel, types, constants, tile.warps, tile.stages)
        assert stack_bytes(binary, tmp_path) == 0
        assert binary.asm["ptx"].count(WARPGROUP_PRODUCT) >= tile.k // 16
        assert binary.metadata.shared * tile.blocks <= 227 << 10


@pytest.mark.parametrize("kind", PRODUCTS)
def test_products_with_roles(kind: str, tmp_path: Path) -> None:
    gluon = pytest.importorskip("triton.experimental.gluon._runtime")
    import triton
    import triton.experimental.gluon.language as gl
    from triton.backends.compiler import GPUTarget

    from mainspring.ops.triton import hopper_product as hopper

    left_across, right_across, add, symmetric = PRODUCTS[kind]
    layout = gl.NVMMASharedLayout(128, 16, 3)

    def box(height: int, width: int) -> str:
        return f"tensordesc<bf16[1,{height},{width}],{layout!r}>"

    rows, columns, step, chunk = hopper.ROWS, hopper.COLUMNS, hopper.STEP, hopper.CHUNK
    types = {
        "left": box(step, rows) if left_across else box(rows, step),
        "right": box(step, columns) if right_across else box(columns, step),
        "out": box(rows, chunk), **dict.fromkeys(INTEGERS, "i32"), **FACTORS,
        **({"added": box(rows, chunk)} if add else {}), **({"mirrored": box(chunk, rows)} if symmetric else {}),
    }  # fmt: skip
    constants: dict[str, Any] = {
        "scales": None, "LEFT_ACROSS": left_across, "RIGHT_ACROSS": right_across, "ADD": add, "SYMMETRIC": symmetric,
        "DIAGONAL": symmetric and add, "SCALE_POWER": 0, "ROWS": rows, "COLUMNS": columns, "STEP": step,
        "STAGES": hopper.STAGES, "CHUNK": chunk, "GROUP": 8, "LOADER_REGISTERS": hopper._LOADER_REGISTERS,
        "num_warps": hopper._WARPS, **({} if add else {"added": None}), **({} if symmetric else {"mirrored": None}),
    }  # fmt: skip
    names = list(hopper.product_kernel.arg_names)
    source = gluon.GluonASTSource(
        hopper.product_kernel, {n: types.get(n, "constexpr") for n in names}, constexprs=constants
    )
    binary = triton.compile(
        source,
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": hopper._WARPS, "maxnreg": hopper._REGISTERS},
    )
    assert stack_bytes(binary, tmp_path) == 0
    # The first step of a tile stands before the loop over the others.
    assert binary.asm["ptx"].count(WARPGROUP_PRODUCT) == 2 * step // 16
    assert "setmaxnreg" in binary.asm["ptx"]
    assert binary.metadata.shared <= 227 << 10


def test_states_move_in_vectors(tmp_path: Path) -> None:
    import triton.language as tl

    from mainspring.ops.triton.muon import BLOCK, momentum_kernel, update_kernel

    sizes = dict.fromkeys(("rows", "columns", "pitch"), "i32")
    types = {"addresses": "*i64", "x": "i64", "partial": "*fp32", **sizes, "rest": "fp32"}
    common = {"WORK": tl.bfloat16, "PADDED": False, "ALIGNED": True, "BLOCK": BLOCK}
    each = BLOCK // 128 // 4  # vectors of four elements for each of 128 threads
    binary = compiled(momentum_kernel, types, {"GRAD": tl.float32, "NESTEROV": True, **common}, 4, 3)
    assert stack_bytes(binary, tmp_path) == 0
    assert len(re.findall(r"\.v4\.b32", binary.asm["ptx"])) >= 3 * each
    types = {"addresses": "*i64", "x": "i64", "lr": "fp32", **sizes, "decay": "fp32", "scale": "fp32"}
    constants = {"LR_ON_DEVICE": False, "WEIGHT": tl.bfloat16, "HAS_WEIGHT": True, **common}
    binary = compiled(update_kernel, types, constants, 4, 3)
    assert stack_bytes(binary, tmp_path) == 0
    assert len(re.findall(r"\.v4\.b32", binary.asm["ptx"])) >= 2 * each
