"""y = x Wᵀ + b with weights that stay as a GGUF file quantises them: blocks of 32 codes with a scale.

| type | value of a code | bytes of a block |
| --- | --- | --- |
| Q8_0 | d code, code in -127 .. 127 | 2 (d, float16) + 32 |
| Q4_0 | d (code - 8), code in 0 .. 15 | 2 + 16 |
| Q4_1 | d code + m, code in 0 .. 15 | 4 (d, m) + 16 |

The C++ kernel multiplies codes by activations that it rounds to int8, a block of 32 at a time: exact integers within a
block, float32 between blocks, in order. So a row's bits do not depend on the batch, but the numbers are those of the
quantised model. The reference expands the weights and leaves the activations alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops.cpu.extension import kernels
from mainspring.ops.cpu.quantised_linear import BLOCK, BLOCK_BYTES, GROUP, pack
from mainspring.ops.cpu.quantised_linear import quantised_linear as cpu_quantised_linear
from mainspring.ops.cpu.support import refuses
from mainspring.ops.policy import Policy
from mainspring.ops.registry import Call, Implementation, Operation

QUANTISED_TYPES = tuple(BLOCK_BYTES)


@dataclass(frozen=True)
class BlockRows:
    """Rows of one type: `blocks` is uint8 [N, K / 32 * bytes of a block], as in the file."""

    kind: str
    blocks: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.blocks.shape[0], self.blocks.shape[1] // BLOCK_BYTES[self.kind] * BLOCK

    def expanded(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """These rows' values, float32 [rows, K]; exact but for the one rounding of d code + m."""
        blocks = self.blocks[rows]
        n = blocks.shape[0]
        blocks = blocks.reshape(n, -1, BLOCK_BYTES[self.kind])
        scale = blocks[..., :2].contiguous().view(torch.float16).float()  # [n, K / 32, 1]
        if self.kind == "Q8_0":
            return (blocks[..., 2:].contiguous().view(torch.int8).float() * scale).reshape(n, -1)
        codes = blocks[..., -16:]
        codes = torch.cat([codes & 0x0F, codes >> 4], dim=-1).float()
        if self.kind == "Q4_0":
            return ((codes - 8.0) * scale).reshape(n, -1)
        minimum = blocks[..., 2:4].contiguous().view(torch.float16).float()
        return (codes * scale + minimum).reshape(n, -1)


class QuantisedWeight:
    """A weight [N, K] for `ops.linear`: parts below each other, each of its own type. Never trained.

    `dtype` is that of the activations it meets, and of the rows that `embed` gives.
    """

    requires_grad = False

    def __init__(self, parts: Sequence[BlockRows], dtype: torch.dtype) -> None:
        """Raises BackendError for parts of different widths, an unknown type, or none."""
        widths = {part.shape[1] for part in parts}
        if len(widths) != 1 or any(part.kind not in BLOCK_BYTES for part in parts):
            described = ", ".join(f"{part.kind} {part.shape}" for part in parts)
            raise BackendError(
                f"a quantised weight needs parts of one width and of known types, not {described}"
            )
        self.parts = tuple(parts)
        self.dtype = dtype
        self.shape = torch.Size((sum(part.shape[0] for part in parts), widths.pop()))
        self.device = parts[0].blocks.device

    def numel(self) -> int:
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks."""
        return sum(part.blocks.numel() for part in self.parts)

    @cached_property
    def packed(self) -> tuple[tuple[str, Tensor, int], ...]:
        """(type, blocks in the kernel's layout, number of rows): neighbours of one type are one."""
        runs: list[list[BlockRows]] = []
        for part in self.parts:
            if runs and runs[-1][0].kind == part.kind and runs[-1][-1].shape[0] % GROUP == 0:
                runs[-1].append(part)
            else:
                runs.append([part])
        return tuple(
            (
                run[0].kind,
                torch.cat([pack(part.kind, part.blocks) for part in run]),
                sum(p.shape[0] for p in run),
            )
            for run in runs
        )

    def prepare(self) -> None:
        """Packs the blocks for the kernel now, if this installation has it, rather than at the first product."""
        if kernels() is not None:
            _ = self.packed

    def expanded(self) -> Tensor:
        """All values, [N, K] in `dtype`."""
        return torch.cat([part.expanded() for part in self.parts]).to(self.dtype)

    def embed(self, tokens: Tensor) -> Tensor:
        """Rows as an embedding table's: tokens [T] -> [T, K] in `dtype`."""
        if len(self.parts) == 1:
            return self.parts[0].expanded(tokens).to(self.dtype)
        return F.embedding(tokens, self.expanded())


def reference(
    x: Tensor, weight: QuantisedWeight, bias: Tensor | None, out_dtype: torch.dtype | None, policy: Policy
) -> Tensor:
    """The formula on expanded weights, by the reference of `ops.linear`."""
    from mainspring.ops.linear import reference as plain

    return plain(x, weight.expanded().to(x.dtype), bias, out_dtype, policy)


def _cpu(
    x: Tensor, weight: QuantisedWeight, bias: Tensor | None, out_dtype: torch.dtype | None, policy: Policy
) -> Tensor:
    if x.shape[1] != weight.shape[1]:
        raise BackendError(f"linear: x {tuple(x.shape)} does not fit a weight {tuple(weight.shape)}")
    out = x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype or x.dtype)
    row = 0
    for kind, packed, rows in weight.packed:
        part = None if bias is None else bias[row : row + rows]
        cpu_quantised_linear(x, kind, packed, part, out[:, row : row + rows], rows)
        row += rows
    return out


def _cpu_refuses(call: Call) -> str | None:
    if call.needs_grad:
        return "activations are rounded to int8: there is no backward pass"
    return refuses(call)


QUANTISED_LINEAR = Operation(
    "quantised_linear",
    Implementation("cpu", _cpu, _cpu_refuses),
    Implementation("reference", reference, lambda call: None),
)
