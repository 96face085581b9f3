"""What stands between the QKV projection and attention through a cache, as one operation: norms of the heads, RoPE,
and the write of keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mainspring.ops import library
from mainspring.ops.batch import TokenBatch
from mainspring.ops.checks import check_norm
from mainspring.ops.cpu.attention import write_cache as cpu_write_cache
from mainspring.ops.cpu.support import refuses
from mainspring.ops.norm import rms_norm
from mainspring.ops.policy import LOCKSTEP, Policy
from mainspring.ops.registry import Implementation, Operation, accepts_floats
from mainspring.ops.rope import RopeAngles, check_angles, rope
from mainspring.ops.rope_cache import check_write, rope_write_cache
from mainspring.ops.triton.support import refuses as triton_refuses


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMS norms of the heads of queries and keys (Qwen3, arXiv 2505.09388). q, k: [D] weights."""

    q: Tensor
    k: Tensor
    eps: float


def check_head_norms(operation: str, norms: HeadNorms, heads: Tensor) -> None:
    """The norms fit heads of [T, H, D]. Raises BackendError."""
    check_norm(operation, heads, norms.q, norms.eps)
    check_norm(operation, heads, norms.k, norms.eps)


def norm_rope_write_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norms: HeadNorms | None,
    angles: RopeAngles,
    batch: TokenBatch,
    *,
    layer: int,
    policy: Policy = LOCKSTEP,
) -> Tensor:
    """The normed and rotated q, after k (likewise) and v went to their slots in layer `layer` of the batch's cache.

    `attention` without k and v then attends to them. The bits are those of `rms_norm`, `rope` and the write on their
    own (with a cache of float8: nearly).

    q: [T, Hq, D], k, v: [T, Hkv, D], all of which may be overwritten -> [T, Hq, D]. The cache has their dtype, or
    float8_e4m3fn with the scales that it carries. No gradient is recorded. Raises BackendError.
    """
    check_write("norm_rope_write_cache", q, k, v, batch, layer)
    check_angles("norm_rope_write_cache", angles, q)
    if norms is not None:
        check_head_norms("norm_rope_write_cache", norms, q)
    if library.is_traced():
        return reference(q, k, v, norms, angles, batch, layer, policy)
    run = NORM_ROPE_WRITE_CACHE.select(q, policy)
    return run(q, k, v, norms, angles, batch, layer, policy)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norms: HeadNorms | None,
    angles: RopeAngles,
    batch: TokenBatch,
    layer: int,
    policy: Policy,
) -> Tensor:
    """One operation after the other."""
    q, k = _normed(q, k, norms, policy)
    return rope_write_cache(q, k, v, angles, batch, layer=layer, policy=policy)


def _normed(q: Tensor, k: Tensor, norms: HeadNorms | None, policy: Policy) -> tuple[Tensor, Tensor]:
    if norms is None:
        return q, k
    return rms_norm(q, norms.q, norms.eps, policy=policy), rms_norm(k, norms.k, norms.eps, policy=policy)


def _cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norms: HeadNorms | None,
    angles: RopeAngles,
    batch: TokenBatch,
    layer: int,
    policy: Policy,
) -> Tensor:
    cache, slots = batch.cache, batch.slots
    assert cache is not None and slots is not None  # checked by the caller
    if cache.k_scale is not None:
        return reference(q, k, v, norms, angles, batch, layer, policy)
    q, k = rope(*_normed(q, k, norms, policy), angles, policy=policy)
    cpu_write_cache(k, v, slots, cache.k[layer], cache.v[layer])
    return q


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norms: HeadNorms | None,
    angles: RopeAngles,
    batch: TokenBatch,
    layer: int,
    policy: Policy,
) -> Tensor:
    from mainspring.ops.triton.norm_rope_cache import norm_rope_write_cache as fused

    cache, slots = batch.cache, batch.slots
    assert cache is not None and slots is not None  # checked by the caller
    # Other heads than of multiples of 16 elements lie as Triton cannot know: a row might be summed in another order.
    if norms is None or 2 * angles.inv_freq.shape[-1] != q.shape[-1] or q.shape[-1] % 16:
        return reference(q, k, v, norms, angles, batch, layer, policy)
    return fused(
        q, k, v, norms.q, norms.k, norms.eps, slots, cache.k[layer], cache.v[layer], angles.positions,
        angles.inv_freq, angles.rows, angles.scale,
        k_scale=None if cache.k_scale is None else cache.k_scale[layer],
        v_scale=None if cache.v_scale is None else cache.v_scale[layer],
    )  # fmt: skip


NORM_ROPE_WRITE_CACHE = Operation(
    "norm_rope_write_cache",
    Implementation("cpu", _cpu, refuses),
    Implementation("triton", _triton, triton_refuses),
    Implementation("reference", reference, accepts_floats),
)
