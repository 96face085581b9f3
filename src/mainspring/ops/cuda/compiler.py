"""Compiles a CUDA source of csrc/cuda for sm_90a and loads it; the result is cached by the content of its sources.

A library has a C interface: functions that take addresses and a stream and return a cudaError_t. Each
(source, defines) is a library of its own, so that only the head sizes and dtypes in use are ever compiled.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mainspring.errors import BackendError
from mainspring.formats.named_models import cache_directory
from mainspring.ops.cuda import wgmma_header

FLAGS = (
    "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "--expt-relaxed-constexpr",
    "-lineinfo", "-Xptxas=-v", "-cudart=static",
)  # fmt: skip
Defines = tuple[tuple[str, str | int], ...]
_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', re.MULTILINE)


def sources() -> Path:
    """Where the CUDA sources lie: installed with the package, or in the repository."""
    installed = Path(__file__).parents[2] / "csrc" / "cuda"
    return installed if installed.is_dir() else Path(__file__).parents[4] / "csrc" / "cuda"


@functools.cache
def find_nvcc() -> str | None:
    """The path of nvcc: `$CUDACXX`, on the PATH, or under `$CUDA_HOME` (/usr/local/cuda); None if there is none."""
    configured = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if configured:
        return configured
    standard = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    return str(standard) if standard.is_file() else None


@functools.cache
def _nvcc_version(nvcc: str) -> str:
    return subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout


def _key(nvcc: str, source: str, defines: Defines) -> str:
    digest = hashlib.sha256()
    for part in (_nvcc_version(nvcc), wgmma_header.text(), source, repr(defines), repr(FLAGS)):
        digest.update(part.encode() + b"\0")
    for name, text in sorted(_with_headers(sources(), source).items()):
        digest.update(name.encode() + b"\0" + text + b"\0")
    return digest.hexdigest()[:32]


def _with_headers(folder: Path, source: str) -> dict[str, bytes]:
    """A source and the headers of its folder that it includes, directly or not: no other change builds it anew."""
    found: dict[str, bytes] = {}
    waiting = [source]
    while waiting:
        name = waiting.pop()
        path = folder / name
        if name not in found and path.is_file():  # nvcc says which header is not there
            found[name] = path.read_bytes()
            waiting.extend(match.decode() for match in _INCLUDE.findall(found[name]))
    return found


def build(source: str, defines: Defines = ()) -> Path:
    """The shared library of a source, compiled unless the cache has it; beside it lies ptxas's report (`.log`).

    Raises:
        BackendError: there is no nvcc, or it refuses the source.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise BackendError(
            f"compiling {source} needs nvcc: install the CUDA toolkit (13.0 or later), or set CUDA_HOME or CUDACXX"
        )
    cache = cache_directory() / "cuda"
    library = cache / f"{Path(source).stem}-{_key(nvcc, source, defines)}.so"
    if library.is_file():
        return library
    with _lock(library):
        if not library.is_file():  # another thread was faster
            _compile(nvcc, source, defines, library)
    return library


def build_ahead(kernels: Iterable[tuple[str, Defines]]) -> None:
    """Starts building several at once and returns; whoever needs one waits for it in `build` and gets its errors.

    Does nothing without nvcc.
    """
    if find_nvcc() is not None:
        pool = ThreadPoolExecutor(os.cpu_count(), "nvcc")
        for source, defines in kernels:
            pool.submit(build, source, defines)
        pool.shutdown(wait=False)


@functools.lru_cache(maxsize=1024)
def _lock(library: Path) -> threading.Lock:
    return threading.Lock()


def _compile(nvcc: str, source: str, defines: Defines, library: Path) -> None:
    cache = library.parent
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        (Path(work) / "wgmma.cuh").write_text(wgmma_header.text())
        made = Path(work) / library.name
        command = [
            nvcc, *FLAGS, "-shared", "-Xcompiler=-fPIC", f"-I{work}", f"-I{sources()}",
            *(f"-D{name}={value}" for name, value in defines), "-o", str(made), str(sources() / source),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise BackendError(f"nvcc cannot compile {source}: {result.stderr.strip()[-4000:]}")
        report = Path(work) / "report"
        report.write_text(result.stdout + result.stderr)
        report.rename(library.with_suffix(".log"))
        made.rename(library)  # complete or not there: another process may be looking


@functools.lru_cache(maxsize=256)
def load(source: str, defines: Defines = ()) -> ctypes.CDLL:
    """The loaded library of a source; see `build`."""
    return ctypes.CDLL(str(build(source, defines)))


def check(library: ctypes.CDLL, operation: str, code: int) -> None:
    """Raises BackendError for an error code that a launcher of the library returned."""
    if code:
        text = library.mainspring_error_text
        text.restype, text.argtypes = ctypes.c_char_p, [ctypes.c_int]
        raise BackendError(f"{operation}: CUDA error {code}: {text(code).decode()}")
