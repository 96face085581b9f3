"""`mainspring tensor generate` answers with real weights, in a process that has no PyTorch."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
sys.modules["torch"] = None
sys.argv = ["mainspring", "tensor", "generate", *{arguments!r}]
from mainspring.cli.main import main
main()
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CODE.format(arguments=list(arguments))],
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_smollm2_answers_without_torch() -> None:
    done = run(
        "smollm2", "What is the capital of France? Answer in one word.", "--max-tokens", "8", "--threads", "1"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Paris" in done.stdout


def test_a_wrong_dtype_is_named() -> None:
    done = run("smollm2", "Hello", "--dtype", "float8")
    assert done.returncode != 0
    assert "dtype 'float8' is not one of float32, bfloat16" in done.stderr
