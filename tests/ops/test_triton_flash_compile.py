"""The flash-attention kernels compile for Hopper without a GPU: no waiting between warpgroup products, few spills."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ops.test_triton_compile import WARPGROUP_PRODUCT, compiled, stack_bytes
from support.triton_kernels import AVAILABLE, INTERPRETED

pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason="Triton is not installed"),
    pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing"),
]
SHARED_BYTES = 227 << 10
OTHERS = [pytest.param(d, marks=pytest.mark.slow) for d in (96, 256)]  # head sizes that are not tuned
SMALL_STACK = 256  # bytes that the masked loops may spill; versions of the assembler differ
INTEGERS = ("window", "num_seqs", "tokens", "pitch", "plane", "heads", "kv_heads", "group", "tiles", "each")
STRIDES = ("q_stride", "k_stride", "v_stride", "dout_stride", "out_stride")
POINTERS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")


def signature(kernel: Any, descriptors: dict[str, str]) -> dict[str, str]:
    """Types of a kernel's arguments by their names, for bfloat16 tensors."""
    known = {
        **dict.fromkeys(POINTERS, "*bf16"), **dict.fromkeys(("lse", "terms"), "*fp32"),
        **dict.fromkeys(("cu_q", "cu_k"), "*i32"), **dict.fromkeys(("scale", "factor", "inner"), "fp32"),
        **dict.fromkeys(INTEGERS + STRIDES, "i32"), **descriptors,
    }  # fmt: skip
    return {name: known[name] for name in kernel.arg_names if name in known}


def for_hopper(
    kernel: Any, descriptors: dict[str, str], constants: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> Any:
    """A Gluon kernel for sm_90, of which the assembler must say that its products run beside each other."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    types = signature(kernel, descriptors)
    names = list(kernel.arg_names)
    pointers = {(names.index(n),): [["tt.divisibility", 16]] for n, t in types.items() if t[0] == "*"}
    full = {name: types.get(name, "constexpr") for name in names}
    source = GluonASTSource(kernel, full, constexprs=constants, attrs=pointers)
    with knobs.nvidia.scope(), knobs.compilation.scope():
        knobs.nvidia.dump_ptxas_log = True

        def compile_now() -> tuple[Any, str]:
            made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
            return made, capfd.readouterr().out

        binary, report = compile_now()
        # What the assembler said lies beside what Triton's cache has, by the same hash of the content.
        kept = Path(knobs.cache.dir) / "reports" / f"{binary.hash}.txt"
        if not report and kept.is_file():
            report = kept.read_text()
        elif not report:
            knobs.compilation.always_compile = True
            binary, report = compile_now()
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        written = kept.with_suffix(f".{os.getpid()}")
        written.write_text(report)
        written.rename(kept)
    assert "Compiling entry function" in report
    assert not re.search("serialized", report), report
    assert binary.metadata.shared <= SHARED_BYTES
    return binary


def described(rows: int, dim: int) -> str:
    from triton.experimental.gluon import language as gl

    return f"tensordesc<bf16[{rows},1,{dim}],{gl.NVMMASharedLayout(128, 16, 3)!r}>"


def options(d: int, dim: int, tile: Any, **others: Any) -> dict[str, Any]:
    return {
        "HEAD_DIM": d, "DIM": dim, "ROWS": tile.rows, "WALK": tile.walk, "GROUPS": tile.groups, "STAGES": tile.stages,
        "CAUSAL": True, "WINDOWED": False, "SOFTCAP": False, "REGISTERS": tile.registers, **others,
    }  # fmt: skip


@pytest.mark.parametrize("d", [64, 128, *OTHERS])
def test_forward_for_hopper(d: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton.experimental.gluon")
    from mainspring.ops.triton.flash_gluon import hopper_padded
    from mainspring.ops.triton.flash_gluon_forward import (
        FORWARD_TILES,
        LONG_FORWARD_TILE,
        forward_kernel,
    )

    dim = hopper_padded(d)
    for tile in (FORWARD_TILES[dim], LONG_FORWARD_TILE) if dim == 64 else (FORWARD_TILES[dim],):
        descriptors = {
            "q_desc": described(tile.rows, dim), "k_desc": described(tile.walk, dim),
            "v_desc": described(tile.walk, dim),
        }  # fmt: skip
        binary = for_hopper(forward_kernel, descriptors, options(d, dim, tile, STAGED=dim < 256), capfd)
        assert stack_bytes(binary, tmp_path) <= SMALL_STACK
        # q kᵀ before the loops, weights v after them, and both in either loop, in each warpgroup's program
        product = dim // 16 + tile.walk // 16
        assert binary.asm["ptx"].count(WARPGROUP_PRODUCT) == 3 * tile.groups * product


@pytest.mark.parametrize("d", [64, 128, OTHERS[-1]])
def test_backward_for_hopper(d: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton.experimental.gluon")
    from triton.experimental.gluon import language as gl

    from mainspring.ops.triton.flash_gluon_backward import BACKWARD_TILES
    from mainspring.ops.triton.flash_gluon_dkdv import dkdv_kernel
    from mainspring.ops.triton.flash_gluon_dq import dq_kernel

    tile = BACKWARD_TILES[d].dkdv
    rows, walk = described(tile.rows, d), described(tile.walk, d)
    terms = f"tensordesc<fp32[{tile.walk}],{gl.NVMMASharedLayout(0, 32, 1)!r}>"
    descriptors = {"q_desc": walk, "do_desc": walk, "k_desc": rows, "v_desc": rows, "terms_desc": terms}
    binary = for_hopper(dkdv_kernel, descriptors, options(d, d, tile), capfd)
    assert stack_bytes(binary, tmp_path) <= 2 * SMALL_STACK
    # scores and dP over the head's columns, dV and dK over the block's queries, in either loop
    product = 2 * (d // 16) + 2 * (tile.walk // 16)
    assert binary.asm["ptx"].count(WARPGROUP_PRODUCT) == 2 * tile.groups * product

    tile = BACKWARD_TILES[d].dq
    rows, walk = described(tile.rows, d), described(tile.walk, d)
    descriptors = {"q_desc": rows, "do_desc": rows, "k_desc": walk, "v_desc": walk}
    binary = for_hopper(dq_kernel, descriptors, options(d, d, tile, STAGED=d <= 128), capfd)
    assert stack_bytes(binary, tmp_path) <= SMALL_STACK
    product = 2 * (d // 16) + tile.walk // 16
    assert binary.asm["ptx"].count(WARPGROUP_PRODUCT) == 2 * tile.groups * product


@pytest.mark.parametrize("d", [64, 128, OTHERS[-1]])
def test_portable_kernels(d: int, tmp_path: Path) -> None:
    from mainspring.ops.triton.flash_backward import backward_tiles, dkdv_kernel, dq_kernel
    from mainspring.ops.triton.flash_forward import forward_kernel, forward_tile

    tiles = backward_tiles(d, torch.bfloat16)
    for kernel, tile in (
        (forward_kernel, forward_tile(d, torch.bfloat16)),
        (dkdv_kernel, tiles.dkdv),
        (dq_kernel, tiles.dq),
    ):
        constants = {
            "HEAD_DIM": d, "DIM": d, "ROWS": tile.rows, "KEYS": tile.keys, "CAUSAL": True, "WINDOWED": False,
            "SOFTCAP": False, "PRECISION": "tf32",
        }  # fmt: skip
        binary = compiled(kernel, signature(kernel, {}), constants, tile.warps, tile.stages)
        assert stack_bytes(binary, tmp_path) <= 4 * SMALL_STACK
        assert WARPGROUP_PRODUCT in binary.asm["ptx"]
        assert binary.metadata.shared <= SHARED_BYTES


def test_programs_share_causal_tiles_evenly() -> None:
    pytest.importorskip("triton.experimental.gluon")
    from mainspring.ops.triton.flash_gluon import imbalance, persists

    for each in (4, 8, 16, 32, 64):
        assert imbalance(each, 2048, 132) < 1.04
    assert imbalance(1, 132 * 5, 132) == 1.0
    assert not persists(16384, 128, 2048, 132, causal=True)
    assert not persists(512, 4, 100, 132, causal=True)
    assert persists(512, 4, 2048, 132, causal=True)
