"""The CUDA C++ kernels compile for Hopper without a GPU: no spills, no serialised products, and as many of them as the
source unrolls, no fence of the whole chip in a loop. A kernel is one line of the table."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mainspring.ops.cuda import (
    compiler,
    flash_backward,
    flash_forward,
    grouped_linear,
    linear,
    paged_attention,
)


@dataclass(frozen=True)
class Kernel:
    """source, defines: what is compiled. products: HGMMA instructions (of 64 rows and 16 k) in the machine code, or
    None; registers: of a thread at the launch, of each kernel of the source in ptxas's order, or an upper bound for
    all; fences: MEMBAR instructions of the whole chip, or None; moves: R2UR instructions at most, or None: where a
    loop has some, its descriptors do not lie in uniform registers."""

    name: str
    source: str
    defines: compiler.Defines
    products: int | None = None
    registers: tuple[int, ...] | int = 255
    fences: int | None = None
    moves: int | None = None


def _flash_forward(head_dim: int, causal: bool, canonical: bool = False, paged: bool = False) -> Kernel:
    variant = flash_forward.variant_of(head_dim, causal, windowed=False, canonical=canonical, paged=paged)
    defines = flash_forward.defines_of(torch.bfloat16, head_dim, causal, False, False, variant, paged)
    # first scores, a step with and (causal) one without masks, last output
    steps = 1 + (2 if causal else 1)
    products = steps * (head_dim // 16 + variant.keys // 16)
    name = f"forward-{head_dim}{'-canonical' if canonical else ''}{'-paged' if paged else ''}"
    return Kernel(name, flash_forward.SOURCE, defines, products, ({2: 168, 3: 128}[variant.groups],))


def _flash_backward(head_dim: int, causal: bool) -> Kernel:
    tile = flash_backward.choose_tile(head_dim, deterministic=False)
    defines = flash_backward.defines(torch.bfloat16, head_dim, causal, False, False, False, tile)
    # scores and dP over the head, dV and dK over the queries, dQ over the block's 128 keys
    products = 2 * head_dim // 16 + 2 * tile.queries // 16 + 128 // 16
    registers = (32, 32, 168)  # what prepares and what finishes leave room for other blocks
    return Kernel(f"backward-{head_dim}", flash_backward.SOURCE, defines, products, registers)


def _linear(tile: linear.Tile, registers: int, segmented: bool = False, gated: bool = False) -> Kernel:
    defines = linear.defines_of(torch.bfloat16, tile, segmented, gated)
    name = f"linear-{tile.groups}x{tile.columns}{'-segmented' * segmented}{'-gated' * gated}"
    products = 4 * tile.panels * (2 if tile.groups > 2 else 1)
    return Kernel(name, linear.SOURCE, defines, products, (registers,))


def _grouped(kind: int, columns: int) -> Kernel:
    defines = grouped_linear.defines_of(torch.bfloat16, kind, columns)
    # of one half of a tile; forward of both and of one; dW also of an expert's last 1 to 64 rows
    products = {grouped_linear.FORWARD: 8 + 4, grouped_linear.INPUT_GRADIENT: 4}.get(kind, 4 + 4 + 3 + 2 + 1)
    # The blocks of a pair meet at the start and at the end; arrivals at each other's barriers have no fence.
    moves = {grouped_linear.FORWARD: 20, grouped_linear.INPUT_GRADIENT: 36}.get(kind, 72)
    name = f"grouped-{kind}-{columns}"
    return Kernel(name, grouped_linear.SOURCE, defines, products, 168, fences=3, moves=moves)


def _paged_decode(head_dim: int, fp8: bool = False) -> Kernel:
    source, defines = paged_attention.kernel(head_dim, torch.bfloat16, fp8)
    return Kernel(f"paged-{head_dim}{'-fp8' * fp8}", source, defines)


KERNELS = (
    _flash_forward(128, causal=True),
    _flash_forward(64, causal=False),
    _flash_forward(128, causal=True, canonical=True, paged=True),
    _flash_backward(128, causal=True),
    _flash_backward(64, causal=False),
    _linear(linear.TILES[0], 59),
    _linear(linear.TILES[-1], 209),
    _paged_decode(64),
    _paged_decode(128),
    _paged_decode(128, fp8=True),
    _linear(linear.SEGMENTED, 168, segmented=True),
    _linear(linear.Tile(2, 224, 1), 166, gated=True),
    _grouped(grouped_linear.FORWARD, 176),
    _grouped(grouped_linear.INPUT_GRADIENT, 256),
    _grouped(grouped_linear.WEIGHT_GRADIENT, 256),
)


def _cuobjdump() -> str | None:
    """Beside nvcc, on the PATH, or in Triton's wheel."""
    nvcc = compiler.find_nvcc()
    if nvcc and (beside := Path(nvcc).with_name("cuobjdump")).is_file():
        return str(beside)
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    carried = folder / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(carried) if carried.is_file() else None


@pytest.mark.skipif(compiler.find_nvcc() is None, reason="there is no nvcc")
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_compiles_without_spills(kernel: Kernel) -> None:
    library = compiler.build(kernel.source, kernel.defines)
    report = library.with_suffix(".log").read_text()
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills, report
    assert set(spills) == {("0", "0")}
    assert "C75" not in report  # wgmma serialised (C7510 and its like), setmaxnreg ignored (C7508)
    used = tuple(int(count) for count in re.findall(r"Used (\d+) registers", report))
    if isinstance(kernel.registers, int):
        assert max(used) <= kernel.registers
    else:
        assert used == kernel.registers
    tool = _cuobjdump()
    if tool is None or kernel.products is None:
        return
    code = subprocess.run([tool, "-sass", library], capture_output=True, text=True, check=True).stdout
    assert len(re.findall(r"\bHGMMA\.", code)) == kernel.products
    if kernel.fences is not None:
        assert len(re.findall(r"\bMEMBAR\.\S*GPU", code)) == kernel.fences
    if kernel.moves is not None:
        assert len(re.findall(r"\bR2UR\b", code)) <= kernel.moves


@pytest.mark.skipif(compiler.find_nvcc() is None, reason="there is no nvcc")
@pytest.mark.skipif(_cuobjdump() is None, reason="there is no cuobjdump")
def test_decode_reads_lengths_and_tables_again_ahead_of_its_first_keys() -> None:
    """Behind the keys they would wait for all of them, and the products with them."""
    kernel, tool = _paged_decode(64), _cuobjdump()
    assert tool is not None
    library = compiler.build(kernel.source, kernel.defines)
    code = subprocess.run([tool, "-sass", library], capture_output=True, text=True, check=True).stdout
    kernels = code.split("Function : ")[1:]
    assert len(kernels) == 4  # of 8 and 16 query rows, with a soft-cap and without
    for one in kernels:
        _, waited = one.split("ACQBULK", 1)
        ahead, _ = waited.split("UTMALDG", 1)
        assert len(re.findall(r"\bLDG\.E\.STRONG\.GPU ", ahead)) == 5
        assert "BAR." not in ahead
