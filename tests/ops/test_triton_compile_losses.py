"""The kernels of losses, log-probabilities and RoPE compile for Hopper without a GPU: no spills, rows in vectors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ops.test_triton_compile import compiled, stack_bytes
from support.triton_kernels import AVAILABLE, INTERPRETED

pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason="Triton is not installed"),
    pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing"),
]


def wide_loads(binary: Any) -> int:
    return len(re.findall(r"ld\.global\S*v4", binary.asm["ptx"]))


@pytest.mark.parametrize("entropy", [False, True])
def test_log_probs(entropy: bool, tmp_path: Path) -> None:
    from mainspring.ops.triton.log_probs import SEGMENT, WARPS, combine_kernel, segment_kernel

    vectors = dict.fromkeys(("logits", "partial", "out", "entropies"), "*fp32")
    types = {
        **vectors,
        "targets": "*i64",
        "stride": "i32",
        "rows": "i32",
        "each": "i32",
        "inverse_temperature": "fp32",
    }
    constants = {
        "V": 151936,
        "SEGMENT": SEGMENT,
        "MOMENT": entropy,
        "ROWS": 32,
        "TARGETS": True,
        "EARLY": True,
    }
    for kernel, warps in ((segment_kernel, WARPS), (combine_kernel, 1)):
        names = set(kernel.arg_names)
        binary = compiled(
            kernel,
            {n: t for n, t in types.items() if n in names},
            {n: c for n, c in constants.items() if n in names},
            warps,
            3,
        )
        assert stack_bytes(binary, tmp_path) == 0
        waits = "griddepcontrol.wait" if kernel is combine_kernel else "griddepcontrol.launch_dependents"
        assert binary.asm["ptx"].count(waits) == 1
        assert kernel is combine_kernel or wide_loads(binary) == SEGMENT // (WARPS * 32) // 4


@pytest.mark.parametrize("everything", [False, True])
def test_cross_entropy(everything: bool, tmp_path: Path) -> None:
    from mainspring.ops.triton.cross_entropy import SEGMENT, WARPS, cross_entropy_kernel

    types = {
        **dict.fromkeys(("logits", "weights", "entropy_weights", "losses"), "*fp32"), "targets": "*i64",
        "gradient": "*bf16", **dict.fromkeys(("stride", "gradient_stride", "ignore_index"), "i32"),
        **dict.fromkeys(("inverse_temperature", "cap", "smoothing", "z_loss"), "fp32"),
    }  # fmt: skip
    options = dict.fromkeys(("CAP", "SMOOTHING", "WEIGHTED", "ENTROPY"), everything)
    constants = {"V": 128256, "SEGMENT": SEGMENT, "GRADIENT": True, **options}
    binary = compiled(cross_entropy_kernel, types, constants, WARPS, 3)
    assert stack_bytes(binary, tmp_path) == 0
    assert (
        wide_loads(binary) >= 2 * SEGMENT // (WARPS * 32) // 4
    )  # a pass for the sum, a pass for the gradient


ROPE_INTEGERS = ("q_stride", "k_stride", "v_stride", "q_out_stride", "k_out_stride")
ROPE_CONSTANTS = {
    "Q_HEADS": 32, "Q_PADDED": 32, "K_HEADS": 8, "K_PADDED": 8, "DIM": 128, "HALF": 64, "REST": 0, "BLOCK": 64,
    "ROWS": False,
}  # fmt: skip


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(interleaved: bool, tmp_path: Path) -> None:
    from mainspring.ops.triton.rope import rope_kernel

    types = {
        **dict.fromkeys(("q", "k", "q_out", "k_out"), "*bf16"), "positions": "*i64", "rows": "*i64",
        "inv_freq": "*fp32", "scale": "fp32", **{n: "i32" for n in ROPE_INTEGERS if n != "v_stride"},
    }  # fmt: skip
    constants = {**ROPE_CONSTANTS, "INTERLEAVED": interleaved, "INVERSE": False}
    binary = compiled(rope_kernel, types, constants, 4, 3)
    assert stack_bytes(binary, tmp_path) == 0
    assert wide_loads(binary) >= 5  # 10,240 bytes of queries and keys on 128 threads


@pytest.mark.parametrize("fp8", [False, True])
def test_rope_with_the_cache(fp8: bool, tmp_path: Path) -> None:
    from mainspring.ops.triton.rope_cache import rope_cache_kernel

    cache = "*fp8e4nv" if fp8 else "*bf16"
    types = {
        **dict.fromkeys(("q", "k", "v", "q_out"), "*bf16"), "k_cache": cache, "v_cache": cache, "slots": "*i64",
        "k_scale": "*fp32", "v_scale": "*fp32", "positions": "*i64", "rows": "*i64", "inv_freq": "*fp32",
        "scale": "fp32", **{n: "i32" for n in ROPE_INTEGERS if n != "k_out_stride"},
    }  # fmt: skip
    constants = {**ROPE_CONSTANTS, "Q_REST": 0, "WIDTH": 128, "INTERLEAVED": False, "FP8": fp8, "EARLY": True}
    binary = compiled(rope_cache_kernel, types, constants, 4, 3)
    assert stack_bytes(binary, tmp_path) == 0
    assert wide_loads(binary) >= 6
