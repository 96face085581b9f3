"""The C++ tests of csrc/tests: plain, under address and undefined-behaviour checks, and under a race detector."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "tests"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("sanitizers", ["", "address,undefined", "thread"])
def test_cpp_tests_pass(sanitizers: str, tmp_path: Path) -> None:
    if shutil.which("cmake") is None or not any(shutil.which(c) for c in ("c++", "g++", "clang++")):
        pytest.skip("no cmake or no C++ compiler here")
    if not any(
        Path(prefix, "doctest", "doctest.h").exists() for prefix in ("/usr/include", "/usr/local/include")
    ):
        pytest.skip("doctest is not installed (Debian: apt-get install doctest-dev)")
    configure = ["cmake", "-S", str(SOURCE), "-B", str(tmp_path), f"-DSANITIZE={sanitizers}"]
    subprocess.run(configure, check=True, capture_output=True, timeout=120)
    subprocess.run(
        ["cmake", "--build", str(tmp_path), "-j", "2"], check=True, capture_output=True, timeout=1000
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [str(tmp_path / "tensor_tests")],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "MAINSPRING_TEST_PORT": str(port),
            "TSAN_OPTIONS": "halt_on_error=1",
            "ASAN_OPTIONS": "detect_leaks=1",
        },
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
