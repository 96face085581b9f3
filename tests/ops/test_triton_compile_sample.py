"""The sampler's kernels compile for Hopper without a GPU: no spills, logits in vectors, noise without shared memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ops.test_triton_compile import compiled, stack_bytes
from support.triton_kernels import AVAILABLE, INTERPRETED

pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason="Triton is not installed"),
    pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing"),
]

VOCAB = 151936


@pytest.mark.parametrize("truncate", [False, True])
def test_scores(truncate: bool, tmp_path: Path) -> None:
    from mainspring.ops.triton.sample import TILE, WARPS, score_kernel

    types = {
        **dict.fromkeys(("logits", "floors", "best"), "*fp32"),
        **dict.fromkeys(("rows_of_seats", "seats", "positions"), "*i64"),
        "best_token": "*i32", "stride": "i32", "tiles": "i32",
    }  # fmt: skip
    binary = compiled(
        score_kernel, types, {"V": VOCAB, "TILE": TILE, "TRUNCATE": truncate, "HARDWARE": True}, WARPS, 3
    )
    assert stack_bytes(binary, tmp_path) == 0
    assert len(re.findall(r"ld\.global\S*v4", binary.asm["ptx"])) == TILE // (WARPS * 32) // 4
    # The two halves of a random word fall to the thread that holds their logits: only the maximum is exchanged.
    assert binary.metadata.shared <= 64


@pytest.mark.parametrize("name", ["moment", "summary", "level", "gather", "search"])
def test_floors(name: str, tmp_path: Path) -> None:
    from mainspring.ops.triton import sample_floors

    kernel = getattr(sample_floors, f"{name}_kernel")
    types = {
        **dict.fromkeys(("logits", "floors", "moments", "summaries", "candidates"), "*fp32"),
        **dict.fromkeys(("rows_of_seats", "seats", "masses"), "*i64"),
        **dict.fromkeys(("counters", "counts"), "*i32"),
        **dict.fromkeys(("stride", "tiles", "segments"), "i32"),
    }
    constants = {
        "V": VOCAB,
        "SEGMENTS": 64,
        **{n: getattr(sample_floors, n) for n in ("TILE", "PIVOTS", "LEVELS", "CANDIDATES")},
    }
    binary = compiled(
        kernel,
        {n: t for n, t in types.items() if n in kernel.arg_names},
        {n: c for n, c in constants.items() if n in kernel.arg_names},
        sample_floors.WARPS,
        3,
    )
    assert stack_bytes(binary, tmp_path) == 0
    if name not in ("summary", "search"):
        assert "ld.global.v4" in binary.asm["ptx"] or re.search(r"ld\.global\S*v4", binary.asm["ptx"])


def test_adjusted_logits(tmp_path: Path) -> None:
    from mainspring.ops.triton.adjust_logits import _TILE, _WARPS, adjust_kernel

    types = {
        **dict.fromkeys(("logits", "bias", "out"), "*fp32"),
        **dict.fromkeys(("rows_of_seats", "seats"), "*i64"),
        **dict.fromkeys(("history", "bitmask"), "*i32"),
        "stride": "i32", "mask_stride": "i32",
    }  # fmt: skip
    constants = {"V": VOCAB, "HISTORY": True, "BIAS": True, "MASK": True, "TILE": _TILE}
    binary = compiled(adjust_kernel, types, constants, _WARPS, 3)
    assert stack_bytes(binary, tmp_path) == 0
    vectors = re.findall(r"(?:ld|st)\.global\S*v4", binary.asm["ptx"])
    assert len(vectors) >= 3 * _TILE // (_WARPS * 32) // 4
