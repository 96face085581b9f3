"""Adam's moments in 8 bits: blocks of 256 elements share a scale (Dettmers et al., arXiv 2110.02861).

A mean is its block's largest magnitude times (c / 127)³, c from -127 to 127; a mean of squares is its block's largest
times (c / 255)⁴. So small elements keep relative accuracy, as with the paper's table of logarithmic codes, but by
arithmetic alone and with a smaller error. A square that is not 0 has a code that is not 0: no update is divided by
nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

QUANTUM = 256  # elements that share a scale


@triton.jit
def load_mean(codes, scales, inside, has_block):
    """[blocks, 256] fp32 of uint8 codes at `codes` and one scale a row; nothing outside."""
    code = tl.load(codes, inside, 127).to(tl.float32) if inside is not None else tl.load(codes).to(tl.float32)
    scale = tl.load(scales, has_block, 0.0) if inside is not None else tl.load(scales)
    root = (code - 127.0) * (1.0 / 127.0)
    return root * root * root * scale[:, None]


@triton.jit
def load_square(codes, scales, inside, has_block):
    """As load_mean, of squares."""
    code = tl.load(codes, inside, 0).to(tl.float32) if inside is not None else tl.load(codes).to(tl.float32)
    scale = tl.load(scales, has_block, 0.0) if inside is not None else tl.load(scales)
    root = code * (1.0 / 255.0)
    root *= root
    return root * root * scale[:, None]


@triton.jit
def store_mean(value, codes, scales, inside, has_block):
    """value: [blocks, 256] fp32, 0 outside."""
    magnitude = tl.abs(value)
    scale = tl.max(magnitude, 1)
    share = magnitude * (1.0 / tl.maximum(scale, 1e-37))[:, None]
    code = tl.floor(tl.exp2(tl.log2(tl.maximum(share, 1e-30)) * (1.0 / 3.0)) * 127.0 + 0.5)
    code = tl.where(value < 0.0, 127.0 - code, 127.0 + code)
    tl.store(codes, code.to(tl.uint8), inside)
    tl.store(scales, scale, has_block)


@triton.jit
def store_square(value, codes, scales, inside, has_block):
    """value: [blocks, 256] fp32, not negative, 0 outside."""
    scale = tl.max(value, 1)
    share = value * (1.0 / tl.maximum(scale, 1e-37))[:, None]
    code = tl.floor(tl.sqrt(tl.sqrt(share)) * 255.0 + 0.5)
    code = tl.where(value > 0.0, tl.maximum(code, 1.0), 0.0)
    tl.store(codes, code.to(tl.uint8), inside)
    tl.store(scales, scale, has_block)


def empty_moment(parameter: Tensor, squares: bool) -> tuple[Tensor, Tensor]:
    """(codes uint8 of the parameter's shape, scales fp32) of a moment that is 0."""
    codes = torch.full(parameter.shape, 0 if squares else 127, dtype=torch.uint8, device=parameter.device)
    return codes, torch.zeros(
        triton.cdiv(parameter.numel(), QUANTUM), dtype=torch.float32, device=parameter.device
    )


def encode(moment: Tensor, squares: bool) -> tuple[Tensor, Tensor]:
    """(codes, scales) of a moment of any shape: the reference of the kernels' arithmetic."""
    blocks = _blocks(moment.float())
    scale = blocks.abs().amax(1)
    share = blocks.abs() / torch.where(scale > 0, scale, 1.0)[:, None]
    if squares:
        codes = (share.sqrt().sqrt() * 255.0 + 0.5).floor()
        codes = torch.where(blocks > 0, codes.clamp(min=1.0), 0.0)
    else:
        codes = 127.0 + blocks.sign() * (share ** (1.0 / 3.0) * 127.0 + 0.5).floor()
    return codes.to(torch.uint8).flatten()[: moment.numel()].view(moment.shape), scale


def decode(codes: Tensor, scales: Tensor, squares: bool) -> Tensor:
    """The moment (fp32) behind codes and scales."""
    blocks = _blocks(codes.float() if squares else codes.float() - 127.0)
    values = (blocks / 255.0) ** 4 if squares else (blocks / 127.0) ** 3
    return (values * scales[:, None]).flatten()[: codes.numel()].view(codes.shape)


def _blocks(x: Tensor) -> Tensor:
    """x, end to end in rows of 256, the last one filled with zeros."""
    flat = x.flatten()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % QUANTUM)).view(-1, QUANTUM)
