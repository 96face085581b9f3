"""What compiles CUDA sources: builds once, builds again when a source or a header changes, says what is missing."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from mainspring.errors import BackendError
from mainspring.ops.cuda import compiler

needs_nvcc = pytest.mark.skipif(compiler.find_nvcc() is None, reason="nvcc is not installed")

SOURCE = """
#include "limit.h"
#ifndef EXTRA
#define EXTRA 0
#endif
extern "C" int answer() { return LIMIT + EXTRA; }
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MAINSPRING_CACHE", str(tmp_path / "cache"))
    sources = tmp_path / "sources"
    sources.mkdir()
    monkeypatch.setattr(compiler, "sources", lambda: sources)
    (sources / "answer.cu").write_text(SOURCE)
    (sources / "limit.h").write_text("#define LIMIT 40")
    return sources


@needs_nvcc
def test_a_library_is_built_once_for_each_content(folder: Path) -> None:
    first = compiler.build("answer.cu")
    assert ctypes.CDLL(str(first)).answer() == 40
    made = first.stat().st_mtime_ns
    assert compiler.build("answer.cu") == first
    assert first.stat().st_mtime_ns == made
    (folder / "limit.h").write_text("#define LIMIT 41")
    second = compiler.build("answer.cu", (("EXTRA", 1),))
    assert second != first
    assert ctypes.CDLL(str(second)).answer() == 42
    assert {p.suffix for p in first.parent.iterdir()} == {".so", ".log"}  # nothing half-built is left


@needs_nvcc
def test_only_a_header_that_a_source_includes_builds_it_anew(folder: Path) -> None:
    (folder / "limit.h").write_text('#include "deeper.h"\n#define LIMIT DEEPER')
    (folder / "deeper.h").write_text("#define DEEPER 1")
    (folder / "of_others.cuh").write_text("int other;")
    first = compiler.build("answer.cu")
    (folder / "of_others.cuh").write_text("int another;")
    assert compiler.build("answer.cu") == first
    (folder / "deeper.h").write_text("#define DEEPER 2")
    second = compiler.build("answer.cu")
    assert second != first
    assert ctypes.CDLL(str(second)).answer() == 2


@needs_nvcc
def test_an_error_shows_what_nvcc_said(folder: Path) -> None:
    (folder / "limit.h").write_text("#define LIMIT nonsense")
    with pytest.raises(BackendError, match=r"cannot compile answer.cu: .*nonsense"):
        compiler.build("answer.cu")
    assert not list((folder.parent / "cache" / "cuda").iterdir())


def test_without_nvcc_the_message_says_how_to_get_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "find_nvcc", lambda: None)
    with pytest.raises(BackendError, match=r"needs nvcc: install the CUDA toolkit .* CUDA_HOME or CUDACXX"):
        compiler.build("answer.cu")


def test_the_sources_are_where_they_are_looked_for() -> None:
    assert (compiler.sources() / "hopper.cuh").is_file()


@needs_nvcc
def test_what_is_built_ahead_is_built_once_and_its_errors_come_to_who_needs_it(folder: Path) -> None:
    kernels = [("answer.cu", (("EXTRA", number),)) for number in range(3)]
    compiler.build_ahead([*kernels, kernels[0], ("answer.cu", (("EXTRA", "nonsense"),))])
    libraries = [compiler.build(*kernel) for kernel in kernels]  # waits for the threads at work
    assert [ctypes.CDLL(str(library)).answer() for library in libraries] == [40, 41, 42]
    with pytest.raises(BackendError, match="nonsense"):
        compiler.build("answer.cu", (("EXTRA", "nonsense"),))
    assert {p.suffix for p in libraries[0].parent.iterdir()} == {".so", ".log"}
