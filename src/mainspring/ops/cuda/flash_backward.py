"""Flash attention's gradients on Hopper: the launcher of csrc/cuda/flash_backward.cu.

One specialisation (dtype, head size, kind of mask) is one library, compiled at its first use. The device is never
waited for: lengths stay where they are.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from mainspring.ops.checks import reject
from mainspring.ops.cuda import compiler
from mainspring.ops.triton.support import aligned, on_device, require

OPERATION = "flash_attention_backward"
SOURCE = "flash_backward.cu"
HEAD_SIZES = (64, 96, 128, 192, 256)
DTYPES = {torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}


@dataclass(frozen=True)
class Tile:
    """How a block of 128 keys walks over the queries that see it.

    queries: of a step of the loop; stages: of Q and of dO in flight; direct_add: dQ is added from registers, not by
    bulk copies from shared memory.
    """

    queries: int
    stages: int = 2
    direct_add: bool = False


def choose_tile(head_size: int, deterministic: bool) -> Tile:
    """The fastest tile that was measured (heads of 64 and 128), or one that fits."""
    if head_size <= 64:
        return Tile(128)
    if head_size <= 128:
        return Tile(64)
    # Shared memory has no room for dQ's sums beside 64 queries; in order they are added from there.
    return Tile(32, stages=1) if deterministic else Tile(64, stages=1, direct_add=True)


def defines(
    dtype: torch.dtype,
    head_size: int,
    causal: bool,
    window: bool,
    softcap: bool,
    deterministic: bool,
    tile: Tile,
) -> compiler.Defines:
    """What the compiler is told of a specialisation."""
    return (
        ("FLASH_TYPE", DTYPES[dtype]),
        ("FLASH_HEAD_SIZE", head_size),
        ("FLASH_QUERIES", tile.queries),
        ("FLASH_STAGES", tile.stages),
        ("FLASH_DIRECT_ADD", int(tile.direct_add)),
        ("FLASH_CAUSAL", int(causal)),
        ("FLASH_WINDOW", int(window)),
        ("FLASH_SOFTCAP", int(softcap)),
        ("FLASH_DETERMINISTIC", int(deterministic)),
    )


class _Arguments(ctypes.Structure):
    """The same fields as `Arguments` of flash_backward.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "dout", "lse", "cu_q", "cu_k")),
        *(
            (name, ctypes.c_void_p)
            for name in ("dq", "dk", "dv", "lse_rows", "delta_rows", "dq_sum", "turns")
        ),
        *((name, ctypes.c_int64) for name in ("q_tokens", "k_tokens", "q_stride", "k_stride", "v_stride")),
        *((name, ctypes.c_int64) for name in ("out_stride", "dout_stride")),
        *((name, ctypes.c_int) for name in ("query_heads", "key_heads", "sequences", "max_q", "max_k")),
        *((name, ctypes.c_int) for name in ("tiles", "window")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


def flash_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    *,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `flash_reference.forward`'s out with respect to q, k and v.

    Dao, "FlashAttention-2" (2023), algorithm 2. dQ is summed in fp32 over blocks of 128 keys, in the order in which
    they come, or with `deterministic` in that of the keys.

    Args:
        dout: [T, Hq, D], gradient of out; bfloat16 or float16, D of 64, 96, 128, 192 or 256.
        q: [T, Hq, D]. Of these tensors tokens may be any multiple of 16 bytes apart; a token's heads are contiguous.
        k: [Tk, Hkv, D]; Hkv divides Hq.
        v: [Tk, Hkv, D].
        out: [T, Hq, D] of the forward pass.
        lse: [Hq, T] fp32, natural logarithm of the sum of exponentials; -inf for rows that see nothing.
        cu_q: [S + 1] int32, where sequences of queries begin and end.
        cu_k: [S + 1] int32, of keys.
        max_q: at least the longest sequence's queries.
        max_k: at least the longest sequence's keys.
        scale: factor of the scores, positive.
        causal: whether a query sees no key after its position.
        window: sliding window in keys, or None or 0 for all.
        softcap: bound of the scores, or None or 0 for none.
        deterministic: whether equal inputs give equal bits.

    Returns:
        dq [T, Hq, D], dk and dv [Tk, Hkv, D], contiguous, in the dtype of q. Tokens of no sequence (behind the
        last one) are zeros.

    Raises:
        BackendError: an argument that the kernels do not serve, no nvcc, or a CUDA error.
    """
    _check(dout, q, k, v, out, lse, cu_q, cu_k, scale)
    require(OPERATION, q.is_cuda, f"runs on CUDA devices, not on {q.device.type}")
    capability = torch.cuda.get_device_capability(q.device)
    require(
        OPERATION, capability[0] == 9, f"needs compute capability 9.0, not {capability[0]}.{capability[1]}"
    )
    tile = choose_tile(q.shape[2], deterministic)
    library = compiler.load(
        SOURCE,
        defines(q.dtype, q.shape[2], causal, bool(window), bool(softcap), deterministic, tile),
    )
    return launch(
        library,
        tile,
        (dout, q, k, v, out),
        lse,
        cu_q,
        cu_k,
        max_q=max_q,
        max_k=max_k,
        scale=scale,
        window=window or 0,
        softcap=softcap or 0.0,
    )


def _check(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
) -> None:
    require(OPERATION, q.dtype in DTYPES, f"takes bfloat16 and float16, not {q.dtype}")
    require(OPERATION, q.dim() == 3 and k.dim() == 3, "takes q [T, Hq, D] and k [Tk, Hkv, D]")
    tokens, heads, size = q.shape
    require(OPERATION, size in HEAD_SIZES, f"takes head sizes {HEAD_SIZES}, not {size}")
    divides = k.shape[1] > 0 and heads % k.shape[1] == 0
    require(OPERATION, divides, f"{k.shape[1]} key heads do not divide {heads} query heads")
    for name, tensor, shape in (
        ("dout", dout, q.shape),
        ("k", k, (k.shape[0], k.shape[1], size)),
        ("v", v, k.shape),
        ("out", out, q.shape),
        ("lse", lse, (heads, tokens)),
        ("cu_k", cu_k, cu_q.shape),
    ):
        if tensor.shape != shape:
            raise reject(OPERATION, f"{name} is {list(tensor.shape)}, not {list(shape)}")
    for name, tensor in (("dout", dout), ("q", q), ("k", k), ("v", v), ("out", out)):
        if tensor.dtype != q.dtype:
            raise reject(OPERATION, f"{name} is {tensor.dtype}, q is {q.dtype}")
        if tensor.numel() and not (aligned(tensor) and (tensor.shape[1] == 1 or tensor.stride(1) == size)):
            raise reject(OPERATION, f"{name}'s heads must be contiguous and its tokens 16-byte aligned")
    for name, tensor, dtype in (
        ("lse", lse, torch.float32),
        ("cu_q", cu_q, torch.int32),
        ("cu_k", cu_k, torch.int32),
    ):
        if tensor.dtype != dtype or not tensor.is_contiguous():
            raise reject(OPERATION, f"{name} must be contiguous and {dtype}, not {tensor.dtype}")
    others = {"dout": dout, "k": k, "v": v, "out": out, "lse": lse, "cu_q": cu_q, "cu_k": cu_k}
    for name, tensor in others.items():
        if tensor.device != q.device:
            raise reject(OPERATION, f"{name} is on {tensor.device}, q on {q.device}")
    require(OPERATION, scale > 0, f"takes a positive scale, not {scale}")
    require(OPERATION, cu_q.dim() == 1 and len(cu_q) > 0, "cu_q must be a vector of at least one number")


def launch(
    library: ctypes.CDLL,
    tile: Tile,
    rows: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    *,
    max_q: int,
    max_k: int,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs a library that was built for this tile on arguments that were checked; rows: (dout, q, k, v, out)."""
    dout, q, k, v, out = rows
    tokens, heads, size = q.shape
    sequences = len(cu_q) - 1
    if not tokens or not k.shape[0] or not heads or not sequences:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), k.new_zeros(k.shape)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape)
    tiles = tokens // tile.queries + sequences
    padded_size = 64 if size <= 64 else 128 if size <= 128 else 256
    statistics = torch.empty(2, heads, tiles * tile.queries, dtype=torch.float32, device=q.device)
    sums = torch.empty(heads * tiles * tile.queries * padded_size, dtype=torch.float32, device=q.device)
    turns = torch.empty(heads * tiles * 4, dtype=torch.int32, device=q.device)
    with on_device(q):
        arguments = _Arguments(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), dout.data_ptr(), lse.data_ptr(),
            cu_q.data_ptr(), cu_k.data_ptr(), dq.data_ptr(), dk.data_ptr(), dv.data_ptr(),
            statistics[0].data_ptr(), statistics[1].data_ptr(), sums.data_ptr(), turns.data_ptr(),
            tokens, k.shape[0], q.stride(0), k.stride(0), v.stride(0), out.stride(0), dout.stride(0),
            heads, k.shape[1], sequences, max_q, max_k, tiles, window, scale, softcap,
        )  # fmt: skip
        function = library.mainspring_flash_backward
        function.restype, function.argtypes = ctypes.c_int, [ctypes.c_void_p, ctypes.c_void_p]
        code = function(ctypes.addressof(arguments), torch.cuda.current_stream().cuda_stream)
    compiler.check(library, OPERATION, code)
    return dq, dk, dv
