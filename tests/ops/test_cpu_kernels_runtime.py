"""What surrounds the CPU kernels: instruction sets, threads, forks, an installation without them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from mainspring.ops.cpu.extension import kernels, require_kernels
from mainspring.ops.cpu.linear import linear
from support.cpu_kernels import assert_same_bits, random_tensor, requires_kernels, threads

LEVELS = ("base", "avx2", "avx512", "avx512_vnni", "avx512_bf16")
HERE = Path(__file__).parent


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, since the instruction set is chosen once in a process."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@requires_kernels
@pytest.mark.parametrize(
    "level",  # those of AVX-512 differ from each other in a product or two
    [*LEVELS[:2], *(pytest.param(level, marks=pytest.mark.slow) for level in LEVELS[2:-1])],
)
def test_every_lower_instruction_set_passes_the_same_tests(level: str) -> None:
    if LEVELS.index(level) >= LEVELS.index(require_kernels().isa()):
        pytest.skip(f"{level} is not below {require_kernels().isa()}, which the other tests use")
    # With int8 instructions only the quantised products differ from plain AVX-512.
    names = ("quantised",) if level == "avx512_vnni" else ("linear", "attention", "rowwise", "quantised")
    files = [str(HERE / f"test_cpu_kernels_{name}.py") for name in names]
    code = (
        "import sys, pytest, mainspring._kernels as k; print('runs', k.isa()); "
        f"sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', *{files!r}]))"
    )
    result = run_python(code, MAINSPRING_CPU_ISA=level, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert f"runs {level}\n" in result.stdout
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


@requires_kernels
def test_the_variable_can_only_lower_the_instruction_set() -> None:
    code = "import mainspring._kernels as k; print(k.isa())"
    assert run_python(code, MAINSPRING_CPU_ISA="amx").stdout.strip() == require_kernels().isa()
    assert run_python(code, MAINSPRING_CPU_ISA="base").stdout.strip() == "base"


@requires_kernels
def test_python_threads_may_call_at_once() -> None:
    x, w = random_tensor(0, 40, 300), random_tensor(1, 500, 300)
    expected = linear(x, w)
    wrong: list[int] = []

    def call() -> None:
        for i in range(100):
            if not torch.equal(linear(x, w), expected):
                wrong.append(i)

    with threads(3):
        callers = [threading.Thread(target=call) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert wrong == []


@requires_kernels
def test_thread_counts_can_change_between_calls() -> None:
    x, w = random_tensor(0, 40, 300), random_tensor(1, 500, 300)
    expected = linear(x, w)
    for count in (1, 4, 2, 1, 3):
        with threads(count):
            assert require_kernels().num_threads() == count
            for _ in range(20):
                assert_same_bits(linear(x, w), expected)


@requires_kernels
def test_a_forked_child_gets_threads_of_its_own() -> None:
    code = """
import os, torch
from mainspring.ops.cpu.extension import require_kernels
from mainspring.ops.cpu.linear import linear
require_kernels().set_num_threads(3)
x, w = torch.randn(64, 512), torch.randn(700, 512)
expected = linear(x, w)
child = os.fork()
if child == 0:
    same = all(torch.equal(linear(x, w), expected) for _ in range(50))
    os._exit(0 if same and require_kernels().num_threads() == 3 else 1)
same = all(torch.equal(linear(x, w), expected) for _ in range(50))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), same)
"""
    assert run_python(code).stdout.split() == ["0", "True"]


@requires_kernels
def test_idle_threads_sleep() -> None:
    x, w = random_tensor(0, 40, 300), random_tensor(1, 500, 300)
    with threads(3):
        linear(x, w)
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.1


def test_a_missing_module_gives_its_reason_and_the_fix() -> None:
    code = """
import sys
sys.modules["mainspring._kernels"] = None
from mainspring.ops.cpu.extension import kernels, require_kernels, unavailable_reason
assert kernels() is None
print(unavailable_reason())
try:
    require_kernels()
except Exception as error:
    print(type(error).__name__, error)
"""
    lines = run_python(code).stdout.splitlines()
    assert "_kernels" in lines[0]
    assert "compiler" in lines[0]
    assert lines[1] == f"BackendError {lines[0]}"


def test_the_reason_and_the_module_exclude_each_other() -> None:
    from mainspring.ops.cpu.extension import unavailable_reason

    assert (kernels() is None) == (unavailable_reason() is not None)
