"""Runs the tests of the Triton kernels on the CPU, by Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.triton_kernels import AVAILABLE, INTERPRETED

NAMES = (
    "adamw", "attention", "decode_inputs", "flash", "grouped_linear", "linear", "linear_tp_invariant", "losses",
    "muon", "rope", "routing", "rowwise", "sample",
)  # fmt: skip
FILES = [f"test_triton_{name}.py" for name in NAMES]


@pytest.mark.skipif(not AVAILABLE, reason="Triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="these tests run in this process already")
@pytest.mark.parametrize("name", FILES)
def test_kernels_in_the_interpreter(name: str) -> None:
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/ops/{name}"],
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
