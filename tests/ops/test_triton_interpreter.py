"""Runs the tests of the Triton kernels on the CPU, by Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.triton_kernels import AVAILABLE, INTERPRETED

# A process starts for seconds, so it runs several files; what runs for about as long as the others is a group.
GROUPS = (
    ("attention", "flash", "adamw", "muon"),
    ("linear", "linear_tp_invariant", "grouped_linear", "routing", "decode_inputs"),
    ("losses", "qkv_heads", "rope", "rowwise", "sample"),
)


def test_every_file_is_in_a_group() -> None:
    found = {
        path.stem.removeprefix("test_triton_") for path in Path(__file__).parent.glob("test_triton_*.py")
    }
    assert {n for n in found if "compile" not in n} - {"interpreter"} == {
        n for group in GROUPS for n in group
    }


@pytest.mark.skipif(not AVAILABLE, reason="Triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="these tests run in this process already")
@pytest.mark.timeout(900)  # half a minute's work each, but of a machine that may have other work
@pytest.mark.parametrize("names", GROUPS, ids=" ".join)
def test_kernels_in_the_interpreter(names: tuple[str, ...]) -> None:
    root = Path(__file__).parents[2]
    files = [f"tests/ops/test_triton_{name}.py" for name in names]
    if "decode_inputs" in names:
        files.append("tests/ops/test_bad_input.py")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files],
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
