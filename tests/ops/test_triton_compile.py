"""The Triton kernels compile for Hopper without a GPU: no spills, and matrix instructions where they belong."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from support.triton_kernels import AVAILABLE, INTERPRETED

pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason="Triton is not installed"),
    pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing"),
]

WARPGROUP_PRODUCT = "wgmma.mma_async"


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, stages: int) -> Any:
    """The kernel for sm_90, every pointer and integer a multiple of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    signature = {name: types.get(name, "constexpr") for name in names}
    divisible = {(names.index(n),): [["tt.divisibility", 16]] for n, t in types.items() if t[0] in "*i"}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=divisible)
    return triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages}
    )


def stack_bytes(binary: Any, tmp_path: Path) -> int:
    """Bytes of a thread's stack: what ptxas spilled."""
    import triton.backends.nvidia as nvidia

    path = tmp_path / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    report = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", report)
    assert found, report
    return int(found[1])


def test_linear(tmp_path: Path) -> None:
    from mainspring.ops.triton.linear import _CHOICES, linear_kernel

    for choice in _CHOICES:
        tile = choice.tile
        types = {
            "x": f"tensordesc<bf16[{tile.rows},{tile.k}]>",
            "w": f"tensordesc<bf16[{tile.columns},{tile.k}]>",
            "out": f"tensordesc<bf16[{tile.rows},{tile.columns // 2}]>",
            **dict.fromkeys(("m", "n", "depth", "chunk", "x_stride", "w_stride"), "i32"),
        }
        constants = {
            "bias": None, "CHUNKED": False, "ROWS": tile.rows, "COLUMNS": tile.columns, "STEP": tile.k, "GROUP": 8,
            "TMA": True, "TMA_OUT": True, "BIAS": False, "PRECISION": "tf32",
        }  # fmt: skip
        binary = compiled(linear_kernel, types, constants, tile.warps, tile.stages)
        assert stack_bytes(binary, tmp_path) == 0
        # one for each 16 of a step's k
        assert binary.asm["ptx"].count(WARPGROUP_PRODUCT) == tile.k // 16
        assert binary.metadata.shared <= 227 << 10


@pytest.mark.parametrize("split", [False, True], ids=["prefill", "decode"])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_attention(d: int, split: bool, tmp_path: Path) -> None:
    from mainspring.ops.triton.attention_kernels import attention_kernel
    from mainspring.ops.triton.canonical_order import KEY_CHUNK, tile_of

    tile = tile_of(d, torch.bfloat16, split)
    keys = "*bf16" if split else f"tensordesc<bf16[{tile.keys},{d}]>"
    integers = (
        "window", "num_seqs", "longer_than", "tokens", "q_stride", "k_stride", "v_stride", "table_stride", "q_heads",
        "group",
    )  # fmt: skip
    types = {
        "q": "*bf16", "k": keys, "v": keys, "out": "*bf16", "part_out": "*fp32", "part_state": "*fp32",
        "lse": "*fp32", "cu_seqlens": "*i32", "context_lens": "*i32",
        **dict.fromkeys(("scale", "cap_in", "cap_out"), "fp32"), **dict.fromkeys(integers, "i32"),
        **({"block_tables": "*i32"} if split else {}),
    }  # fmt: skip
    constants = {
        "HEAD_DIM": d, "DIM": d, "ROWS": tile.rows, "KEYS": tile.keys, "CHUNK": KEY_CHUNK, "PAGED": split,
        "BLOCK_SIZE": 16, "WINDOWED": False, "CAPPED": False, "TMA": not split, "SPLIT": split, "LSE": not split,
        "FP8": False, "k_scale": None, "v_scale": None, "PRECISION": "tf32",
        **({} if split else {"block_tables": None}),
    }  # fmt: skip
    binary = compiled(attention_kernel, types, constants, tile.warps, tile.stages)
    assert stack_bytes(binary, tmp_path) == 0
    # q kᵀ and weights v, in the loop over whole blocks and in that over masked ones
    assert binary.asm["ptx"].count(WARPGROUP_PRODUCT) >= 2 * (d // 16 + tile.keys // 16)


def test_norms(tmp_path: Path) -> None:
    from mainspring.ops.triton.norm import rms_norm_backward_kernel, rms_norm_kernel, row_shape

    rows, block, warps = row_shape(4096)
    constants = {"H": 4096, "BLOCK": block, "ROWS": rows, "ADD": True}
    tensors = ("x", "residual", "weight", "out", "total_out")
    integers = dict.fromkeys(("rows", "inner", "outer_stride", "inner_stride"), "i32")
    types = {**dict.fromkeys(tensors, "*bf16"), **integers, "eps": "fp32"}
    binary = compiled(rms_norm_kernel, types, {**constants, "EARLY": True}, warps, 3)
    assert stack_bytes(binary, tmp_path) == 0
    assert "griddepcontrol.wait" in binary.asm["ptx"]
    tensors = ("x", "weight", "grad", "grad_total", "grad_x")
    types = {**dict.fromkeys(tensors, "*bf16"), "grad_weight": "*fp32", "rows": "i32", "eps": "fp32"}
    binary = compiled(rms_norm_backward_kernel, types, {**constants, "STAGES": 4}, warps, 3)
    assert stack_bytes(binary, tmp_path) == 0
    assert "cp.async" in binary.asm["ptx"]  # the rows to come are on their way during the sums


@pytest.mark.parametrize(("d", "heads"), [(64, (9, 3)), (128, (16, 8)), (256, (8, 4))])
def test_norms_fused_with_rope_sum_a_row_over_threads_as_rms_norm_does(
    d: int, heads: tuple[int, int]
) -> None:
    from mainspring.ops.triton.norm import rms_norm_kernel, row_shape
    from mainspring.ops.triton.norm_rope_cache import norm_rope_cache_kernel
    from mainspring.ops.triton.qkv_heads import norm_rope_kernel

    rows, block, warps = row_shape(d)
    tensors = ("x", "residual", "weight", "out", "total_out")
    integers = dict.fromkeys(("rows", "inner", "outer_stride", "inner_stride"), "i32")
    types = {**dict.fromkeys(tensors, "*bf16"), **integers, "eps": "fp32"}
    constants: dict[str, Any] = {"H": d, "BLOCK": block, "ROWS": rows, "ADD": False, "EARLY": True}
    alone = _summed_layouts(compiled(rms_norm_kernel, types, constants, warps, 3))
    tensors = ("q", "k", "v", "q_weight", "k_weight", "q_out", "k_cache", "v_cache")
    types = {
        **dict.fromkeys(tensors, "*bf16"), **dict.fromkeys(("k_scale", "v_scale", "inv_freq"), "*fp32"),
        **dict.fromkeys(("positions", "rows", "slots"), "*i64"), **dict.fromkeys(("rope_scale", "eps"), "fp32"),
        **dict.fromkeys(("q_stride", "k_stride", "v_stride"), "i32"),
    }  # fmt: skip
    constants = {
        "Q_HEADS": heads[0], "K_HEADS": heads[1], "Q_GROUPS": -(-heads[0] // rows), "DIM": d, "HALF": d // 2,
        "GROUP": rows, "BLOCK": block, "ROWED": False, "FP8": False, "EARLY": True,
    }  # fmt: skip
    fused = _summed_layouts(compiled(norm_rope_cache_kernel, types, constants, warps, 3))
    assert len(alone) == 1
    assert fused == 2 * alone
    types = {n: t for n, t in types.items() if n in norm_rope_kernel.arg_names} | {"k_out": "*bf16"}
    constants = {n: c for n, c in constants.items() if n in norm_rope_kernel.arg_names}
    assert _summed_layouts(compiled(norm_rope_kernel, types, constants, warps, 3)) == 2 * alone


@pytest.mark.parametrize(("d", "heads", "normed"), [(64, (32, 4), False), (128, (16, 8), True)])
def test_the_gradient_of_the_heads(d: int, heads: tuple[int, int], normed: bool, tmp_path: Path) -> None:
    from mainspring.ops.triton.qkv_heads import qkv_gradient_kernel

    types = {
        **dict.fromkeys(("dq", "dk", "dv", "qkv", "q_weight", "k_weight", "out"), "*bf16"),
        **dict.fromkeys(("partial", "inv_freq"), "*fp32"), **dict.fromkeys(("positions", "rows"), "*i64"),
        **dict.fromkeys(("tokens", "dq_stride", "dk_stride", "dv_stride", "qkv_stride"), "i32"),
        **dict.fromkeys(("rope_scale", "eps"), "fp32"),
    }  # fmt: skip
    constants = {
        "Q_HEADS": heads[0], "Q_PADDED": heads[0], "K_HEADS": heads[1], "K_PADDED": heads[1], "DIM": d,
        "PAIRS": d // 2, "ROWED": False, "NORM": normed,
    }  # fmt: skip
    binary = compiled(qkv_gradient_kernel, types, constants, 4, 3)
    assert stack_bytes(binary, tmp_path) == 0
    assert "ld.global.v4" in binary.asm["ptx"]


def _summed_layouts(binary: Any) -> list[str]:
    """How the threads hold what each reduction of a kernel adds up: that is the order of the sum."""
    code = binary.asm["ttgir"]
    layouts = dict(re.findall(r"(#\w+) = (#ttg\.\S+<.*>)", code))
    return [layouts[name] for name in re.findall(r"\}\) : \(tensor<\S+?, (#\w+)>\)", code)]


@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "masters"])
def test_adamw_moves_vectors_of_16_bytes(narrow: bool, tmp_path: Path) -> None:
    import triton.language as tl

    from mainspring.ops.triton.adamw import BLOCK, adamw_kernel

    factors = ("lr", "beta2", "rest1", "rest2", "eps", "correction1", "root_correction2", "grad_scale")
    types = {
        "addresses": "*i64", "sizes": "*i64", "decays": "*fp32", "owners": "*i32", "offsets": "*i64",
        "seed": "i32", "step": "i32", **dict.fromkeys(factors, "fp32"),
    }  # fmt: skip
    dtype = tl.bfloat16 if narrow else tl.float32
    constants = {
        "GRAD": dtype, "WEIGHT": dtype, "HAS_MASTER": True, "HAS_WEIGHT": narrow, "STOCHASTIC": False,
        "EIGHT_BIT": False, "BLOCK": BLOCK,
    }  # fmt: skip
    binary = compiled(adamw_kernel, types, constants, 4, 3)
    assert stack_bytes(binary, tmp_path) == 0
    # three states read and three written, each in vectors: the fewest that BLOCK elements on 128 threads need
    assert len(re.findall(r"\.v4\.b32", binary.asm["ptx"])) >= 6 * BLOCK // 128 // 4


@pytest.mark.parametrize("gathered", [False, True], ids=["sorted", "gathered"])
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "gradient"])
def test_grouped_linear(gathered: bool, transposed: bool, tmp_path: Path) -> None:
    from mainspring.ops.triton.grouped_linear import SMALL, SQUARE, WIDE, grouped_kernel

    for tile in (SMALL, SQUARE, WIDE):
        box = f"{tile.k},{tile.columns}" if transposed else f"{tile.columns},{tile.k}"
        types = {
            "x": "*bf16" if gathered else f"tensordesc<bf16[{tile.rows},{tile.k}]>",
            "w": f"tensordesc<bf16[1,{box}]>", "target": f"tensordesc<bf16[{tile.rows},{tile.columns // 2}]>",
            "offsets": "*i32", "out": "*bf16", **({"index": "*i32"} if gathered else {}),
            **dict.fromkeys(("total", "experts", "n", "depth", "chunk", "stride"), "i32"),
        }  # fmt: skip
        constants = {
            "CHUNKED": False, "EXPERTS": 64, "ROWS": tile.rows, "COLUMNS": tile.columns, "STEP": tile.k, "GROUP": 8,
            "GATHER": gathered, "TRANSPOSED": transposed, "TMA": True, "TMA_OUT": True, "PRECISION": "tf32",
            **({} if gathered else {"index": None}),
        }  # fmt: skip
        binary = compiled(grouped_kernel, types, constants, tile.warps, tile.stages)
        assert stack_bytes(binary, tmp_path) == 0
        assert binary.asm["ptx"].count(WARPGROUP_PRODUCT) == tile.k // 16
        assert binary.metadata.shared <= 227 << 10


def test_grouped_weight_gradient(tmp_path: Path) -> None:
    from mainspring.ops.triton.grouped_linear import GRADIENT, grouped_weight_kernel

    tile = GRADIENT
    types = {
        **dict.fromkeys(("x", "grad", "out"), "*bf16"), "offsets": "*i32",
        "x_tiles": f"tensordesc<bf16[{tile.k},{tile.columns}]>",
        "grad_tiles": f"tensordesc<bf16[{tile.k},{tile.rows}]>",
        **dict.fromkeys(("total", "n", "depth", "x_stride", "grad_stride"), "i32"),
    }  # fmt: skip
    constants = {
        "index": None, "ROWS": tile.rows, "COLUMNS": tile.columns, "STEP": tile.k, "GROUP": 8, "GATHER": False,
        "TMA": True, "PRECISION": "tf32",
    }  # fmt: skip
    binary = compiled(grouped_weight_kernel, types, constants, tile.warps, tile.stages)
    assert stack_bytes(binary, tmp_path) == 0
    assert (
        binary.asm["ptx"].count(WARPGROUP_PRODUCT) == 2 * tile.k // 16
    )  # whole steps, and the last one masked


@pytest.mark.parametrize("experts", [8, 64, 256])
def test_routing(experts: int, tmp_path: Path) -> None:
    from mainspring.ops.triton.routing import _blocks, place_kernel, select_backward_kernel, select_kernel

    rows, width = _blocks(experts)
    integers = dict.fromkeys(("tokens", "num_experts", "stride"), "i32")
    shape = {"TOP_K": 8, "ROWS": rows, "EXPERTS": width}
    types = {"logits": "*bf16", "weights": "*bf16", "experts": "*i32", "counts": "*i32", **integers}
    binary = compiled(select_kernel, types, {**shape, "SLOTS": 8, "NORMALISE": True}, 4, 3)
    assert stack_bytes(binary, tmp_path) == 0
    types = {"logits": "*bf16", "experts": "*i32", "grad": "*bf16", "grad_logits": "*bf16", **integers}
    binary = compiled(select_backward_kernel, types, {**shape, "NORMALISE": True}, 4, 3)
    assert stack_bytes(binary, tmp_path) == 0
    names = ("experts", "counts", "totals", "offsets", "order", "places")
    types = {**dict.fromkeys(names, "*i32"), "tokens": "i32", "num_experts": "i32"}
    assert stack_bytes(compiled(place_kernel, types, shape, 4, 3), tmp_path) == 0


def test_segmented_linear(tmp_path: Path) -> None:
    from mainspring.ops.triton.linear_tp_invariant import _LARGE, tree_kernel

    tile = _LARGE
    types = {
        "x": f"tensordesc<bf16[{tile.rows},{tile.k}]>", "w": f"tensordesc<bf16[{tile.columns},{tile.k}]>",
        "out": "*bf16", **dict.fromkeys(("m", "n", "segment", "x_stride", "w_stride"), "i32"),
    }  # fmt: skip
    constants = {
        "bias": None, "FOURS": 2, "PAIRS": 2, "HALVES": 2, "ROWS": tile.rows, "COLUMNS": tile.columns, "STEP": tile.k,
        "GROUP": 8, "TMA": True, "BIAS": False, "PRECISION": "tf32",
    }  # fmt: skip
    assert stack_bytes(compiled(tree_kernel, types, constants, tile.warps, tile.stages), tmp_path) == 0
