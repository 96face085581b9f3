"""FlashAttention forward for Hopper in CUDA C++ (csrc/cuda/flash_forward.cu): packed sequences, in free or canonical
order of sums, and queries over a paged cache in canonical order."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops.cuda import compiler
from mainspring.ops.cuda.support import CANONICAL_HEAD_SIZES, HEAD_SIZES

NAME = "flash_attention_forward"
SOURCE = "flash_forward.cu"
TYPES = {torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}
LOG2_E = 1.4426950408889634
SHORT = 1024  # queries
ALIGNMENT = 16  # bytes: what the copy engine asks of addresses and strides
MAX_TOKENS = 1 << 30  # tokens and tiles are counted in 32 bits


@dataclass(frozen=True)
class Variant:
    """How a block works. groups: warpgroups of 64 queries; keys: of a block; stages: blocks of keys, and of values, in
    shared memory; registers: of a consumer's thread; canonical: in canonical order of sums, for which keys must be a
    unit of it, 128; turns: warpgroups take turns in starting products; slack: powers of two by which a score may exceed
    the peak it is taken against, in free order; cache_bytes: what the keys and values of heads in flight may take of
    the L2 cache.
    """

    groups: int
    keys: int
    stages: int = 2
    registers: int = 232
    canonical: bool = False
    turns: bool = True
    slack: float = 8.0
    cache_bytes: int = 32 << 20


@lru_cache(maxsize=64)
def variant_of(
    head_dim: int,
    causal: bool,
    windowed: bool,
    softcap: bool = False,
    canonical: bool = False,
    max_q: int = 1 << 20,
    paged: bool = False,
) -> Variant:
    """The tiles that were measured fastest (head sizes 64 and 128), or that fit (the others)."""
    if head_dim == 64:
        # Three warpgroups have no registers left for masks of windows and caps, nor their producer for a block table;
        # tiles of 192 queries waste too much of short causal sequences.
        narrow = windowed or softcap or paged or (causal and max_q <= SHORT)
        return Variant(2 if narrow else 3, 128, registers=232 if narrow else 160, canonical=canonical)
    if head_dim <= 128:
        return Variant(2, 128, canonical=canonical)
    if head_dim == 192:
        return Variant(2, 96)
    return Variant(2, 64, turns=False)


@lru_cache(maxsize=256)
def defines_of(
    dtype: torch.dtype,
    head_dim: int,
    causal: bool,
    windowed: bool,
    softcap: bool,
    variant: Variant,
    paged: bool = False,
) -> compiler.Defines:
    """What the source is compiled with for such calls."""
    values: dict[str, str | int] = {
        "TYPE": TYPES[dtype], "HEAD_DIM": head_dim, "GROUPS": variant.groups, "KEYS": variant.keys,
        "STAGES": variant.stages, "REGISTERS": variant.registers, "CAUSAL": int(causal), "WINDOWED": int(windowed),
        "SOFTCAP": int(softcap), "CANONICAL": int(variant.canonical), "TURNS": int(variant.turns),
        "PAGED": int(paged),
    }  # fmt: skip
    return tuple((f"MAINSPRING_{name}", value) for name, value in values.items())


def paged_kernel(head_dim: int, dtype: torch.dtype, windowed: bool) -> tuple[str, compiler.Defines]:
    """What `compiler.build` compiles for prompts on a paged cache."""
    variant = variant_of(head_dim, True, windowed, canonical=True, paged=True)
    return SOURCE, defines_of(dtype, head_dim, True, windowed, False, _compiled(variant), True)


def _compiled(variant: Variant) -> Variant:
    """The variant without what the launch is told."""
    return replace(variant, slack=0.0, cache_bytes=0)


class _Call(ctypes.Structure):
    """Arguments of the launcher, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "lse", "cu_q", "cu_k", "tables", "counter")),
        *((name, ctypes.c_int64) for name in ("q_token", "q_head", "k_token", "k_head", "v_token", "v_head")),
        *((name, ctypes.c_int) for name in ("tokens_q", "tokens_k", "heads_q", "heads_k", "sequences")),
        *((name, ctypes.c_int) for name in ("table_stride", "block_size", "longer_than", "window", "cache_bytes")),
        *((name, ctypes.c_float) for name in ("factor", "cap_in", "cap_out", "slack")),
    )  # fmt: skip


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    cu_q: Tensor,
    cu_k: Tensor,
    tables: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    variant: Variant,
    *,
    block_size: int = 0,
    longer_than: int = 0,
) -> None:
    """Starts the kernel. k, v: [Tk, Hkv, D], packed, or with `tables` the rows of a cache with blocks of block_size."""
    counter = torch.empty(1, dtype=torch.int32, device=q.device)
    caps = (2 * LOG2_E * scale / softcap, LOG2_E * softcap) if softcap else (0.0, 0.0)
    call = _Call(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), None if lse is None else lse.data_ptr(),
        cu_q.data_ptr(), cu_k.data_ptr(), None if tables is None else tables.data_ptr(), counter.data_ptr(),
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        q.shape[0], k.shape[0], q.shape[1], k.shape[1], cu_q.shape[0] - 1, 0 if tables is None else tables.stride(0),
        block_size, longer_than, window, variant.cache_bytes,
        1.0 if softcap else scale * LOG2_E, *caps, variant.slack,
    )  # fmt: skip
    compiled, paged = _compiled(variant), tables is not None
    defines = defines_of(q.dtype, q.shape[2], causal, window > 0, softcap > 0, compiled, paged)
    library = compiler.load(SOURCE, defines)
    with torch.cuda.device(q.device):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        code = library.mainspring_flash_forward(ctypes.byref(call), stream)
    compiler.check(library, NAME, code)


def flash_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    *,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    canonical: bool = False,
    variant: Variant | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(s) v for every sequence, with s = scale · q kᵀ, or softcap · tanh(scale · q kᵀ / softcap); see
    `mainspring.ops.flash_reference.forward`, which is the formula. Dao et al. 2022; Shah et al. 2024.

    Query i of the n queries of a sequence of m keys stands at position p = m - n + i. It sees key j if j <= p
    (causal) and j > p - window (with a window). Query head h reads key head h // (Hq / Hkv).

    Args:
        q: [T, Hq, D] bfloat16 or float16; D is 64, 96, 128, 192 or 256. Tokens and heads may be strided.
        k: [Tk, Hkv, D]; Hkv divides Hq.
        v: likewise.
        cu_q: [S + 1] int32 on the device, from 0 to T: where sequences of queries begin and end. Trusted.
        cu_k: [S + 1] int32 on the device, from 0 to Tk, of keys. Trusted.
        max_q: the largest number of queries of a sequence.
        max_k: likewise of keys.
        scale: factor of the scores, above 0.
        causal: whether a query sees no key after its position.
        window: sliding window in keys, or None or 0 for all.
        softcap: bound of the scores, or None or 0 for none.
        canonical: whether a row is summed in canonical order (docs/design.md): its bits then depend on nothing that
            stands beside it, and are those of `ops.triton.attention` and of `paged_decode`.
        variant: another one than the table's (tests and benchmarks).

    Returns:
        out: [T, Hq, D] in q's dtype; zeros where a query sees no key.
        lse: [Hq, T] float32, the natural logarithm of the sum of exp(s) over the keys seen; -inf where there is none.

    Raises:
        BackendError: a dtype, shape, layout, device or scale that the kernel does not take.
    """
    window, softcap = window or 0, softcap or 0.0
    if canonical and q.shape[-1] not in CANONICAL_HEAD_SIZES:
        raise _error(
            f"has head sizes {', '.join(map(str, CANONICAL_HEAD_SIZES))} in canonical order, not {q.shape[-1]}"
        )
    if variant is not None and variant.canonical is not canonical:
        raise _error(f"canonical is {canonical} and the variant's {variant.canonical}")
    check(q, k, v, cu_q, cu_k, max_q, max_k, scale, window, softcap)
    q, k, v = (described(x) for x in (q, k, v))
    tokens, heads, head_dim = q.shape
    out = torch.empty((tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    if tokens == 0 or k.shape[0] == 0 or heads == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    variant = variant or variant_of(head_dim, causal, window > 0, softcap > 0, canonical, max_q)
    launch(q, k, v, out, lse, cu_q, cu_k, None, scale, causal, window, softcap, variant)
    return out, lse


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    """Raises BackendError for a call that the kernel does not take. Reads nothing from the device."""
    if q.dtype not in TYPES or k.dtype is not q.dtype or v.dtype is not q.dtype:
        raise _error(f"takes q, k and v in bfloat16 or in float16, not {q.dtype}, {k.dtype} and {v.dtype}")
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or k.shape[2] != q.shape[2]:
        raise _error(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} must be [Tk, Hkv, D] with the D of q {tuple(q.shape)}"
        )
    if q.shape[2] not in HEAD_SIZES:
        raise _error(f"has head sizes {', '.join(map(str, HEAD_SIZES))}, not {q.shape[2]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise _error(f"{k.shape[1]} key heads do not divide the {q.shape[1]} heads")
    if max(q.shape[0] * max(1, q.shape[1] // 64), k.shape[0]) > MAX_TOKENS:
        raise _error(f"{q.shape[0]} tokens of {q.shape[1]} heads and {k.shape[0]} keys exceed {MAX_TOKENS}")
    for name, lengths in (("cu_q", cu_q), ("cu_k", cu_k)):
        if lengths.dtype is not torch.int32 or lengths.dim() != 1 or not lengths.is_contiguous():
            raise _error(
                f"{name} must be contiguous [S + 1] int32, not {tuple(lengths.shape)} {lengths.dtype}"
            )
    if cu_q.shape != cu_k.shape or cu_q.shape[0] == 0:
        raise _error(f"cu_q has {cu_q.shape[0]} entries and cu_k {cu_k.shape[0]}: both must have S + 1")
    if not all(x.is_cuda and x.device == q.device for x in (q, k, v, cu_q, cu_k)):
        raise _error(
            f"runs on one CUDA device, not on {', '.join(str(x.device) for x in (q, k, v, cu_q, cu_k))}"
        )
    if not scale > 0.0:
        raise _error(f"scale must be above 0, not {scale}")
    if window < 0 or softcap < 0.0:
        raise _error(f"window {window} and softcap {softcap} must not be negative")
    if not (0 <= max_q <= q.shape[0] and 0 <= max_k <= k.shape[0]):
        raise _error(
            f"max_q {max_q} and max_k {max_k} must be from 0 to {q.shape[0]} and {k.shape[0]} tokens"
        )


def _error(problem: str) -> BackendError:
    return BackendError(f"{NAME}: {problem}")


def described(x: Tensor) -> Tensor:
    """x, copied unless the copy engine can read it: address and strides in multiples of 16 bytes, heads end to end."""
    fits = x.stride(2) == 1 and x.data_ptr() % ALIGNMENT == 0
    return x if fits and all(s > 0 and s * 2 % ALIGNMENT == 0 for s in x.stride()[:2]) else x.contiguous()
