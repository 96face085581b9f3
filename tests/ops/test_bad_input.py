"""Arguments that do not fit are refused by a typed error that names them, whichever backend would have served the call.

`test_triton_interpreter.py` runs this file once more for the Triton kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mainspring import ops
from mainspring.errors import BackendError, ConfigError
from mainspring.ops import KVCache, Policy, RopeAngles, SamplingTensors, TokenBatch
from mainspring.ops.adamw import make_adamw
from mainspring.ops.adamw_parameter import AdamWParameter
from mainspring.ops.decode_inputs import decode_inputs, put_tokens
from mainspring.ops.flash_attention import flash_attention
from mainspring.ops.muon import Muon
from mainspring.ops.triton.support import interpreted

KERNELS = Policy("lockstep", "triton" if interpreted() else None)
POLICIES = [KERNELS] if interpreted() else [KERNELS, Policy("lockstep", "reference"), Policy("fast")]
INT = torch.int32

every_policy = pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.numerics}-{p.backend}")


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def tokens(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def angles(count: int = 8, half: int = 4) -> RopeAngles:
    return RopeAngles(torch.arange(count), zeros(half))


PACKED = TokenBatch.packed([3, 5])


def paged(dtype: torch.dtype = torch.float32) -> TokenBatch:
    """3 + 1 tokens over a cache of one layer with 2 heads of 8."""
    return TokenBatch.paged([3, 1], [7, 4], [[3, 1], [5]], KVCache.allocate(1, 6, 4, 2, 8, dtype, "cpu"))


def call(function: Callable[..., object], *arguments: Any, **options: Any) -> Callable[[Policy], object]:
    return lambda policy: function(*arguments, **options, policy=policy)


def attend(q: Tensor, k: Tensor | None, v: Tensor | None, batch: TokenBatch = PACKED, **options: Any) -> Any:
    return call(ops.attention, q, k, v, batch, **{"layer": 0, "scale": 1.0, **options})


def heads(
    count: int = 8, q: int = 4, kv: int = 2, d: int = 8, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return zeros(count, q, d, **options), zeros(count, kv, d, **options), zeros(count, kv, d, **options)


def flash(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int = 8, **options: Any) -> Any:
    chosen = {"scale": 1.0, "max_q": longest, "max_k": longest, **options}
    return call(flash_attention, q, k, v, cu, cu, **chosen)


def adamw(gradients: Sequence[Tensor | None], step: int = 1) -> Callable[[Policy], object]:
    def run(policy: Policy) -> None:
        backend = "torch" if policy.backend == "reference" else policy.backend
        parameter = AdamWParameter(zeros(4, 4), zeros(4, 4), zeros(4, 4), 0.1)
        optimizer = make_adamw([parameter], Policy(policy.numerics, backend))
        optimizer.step(gradients, step=step, lr=1e-3, beta1=0.9, beta2=0.9, eps=1e-8)

    return run


ROUTING = ops.route(torch.randn(4, 8), 2, normalise=True, policy=Policy("lockstep", "reference"))
TARGETS = tokens(0, 1, 1, 2)
ROWS = tokens(0, 1).repeat(3, 1)
SEATS = SamplingTensors.allocate(2)

CALLS: dict[str, tuple[Callable[[Policy], object], str]] = {
    "attention, q of two dimensions": (attend(zeros(8, 32), *heads()[1:]), r"attention: k .* does not fit q"),
    "attention, key heads that do not divide": (attend(*heads(q=3)), r"attention: q .*2 heads of 8 divide"),
    "attention, fewer tokens than the batch": (attend(*heads(6)), r"attention: q .*8 tokens of its batch"),
    "attention, fewer keys": (attend(heads()[0], *heads(6)[1:]), r"attention: k .*\(6, 2, 8\)"),
    "attention, values of another size": (attend(*heads()[:2], zeros(8, 2, 4)), r"attention: v .*\(8, 2, 4\)"),
    "attention, keys of another size": (attend(heads()[0], *heads(d=16)[1:]), r"attention: k .*\(8, 2, 16\)"),
    "attention, two dtypes": (attend(heads()[0], *heads(dtype=torch.float16)[1:]), r"k torch.float16"),
    "attention of integers": (attend(*heads(dtype=INT)), r"no backend serves attention .*int32"),
    "attention, no window": (attend(*heads(), window=0), r"window at least 1 key or None, not 0"),
    "attention, a scale that is no number": (attend(*heads(), scale=float("nan")), r"scale must be above 0, not nan"),
    "attention on two devices": (attend(heads(device="meta")[0], *heads()[1:]), r"on cpu does not fit q .* on meta"),
    "attention without keys": (attend(heads()[0], None, None), r"there must be keys and values"),
    "attention, keys without values": (attend(*heads(4)[:2], None, paged()), r"there must be keys and values"),
    "attention over a cache of another dtype": (
        attend(*heads(4, dtype=torch.bfloat16), paged()), "float32|differ|no cache|do not fit",
    ),
    "attention over a cache of other heads": (attend(*heads(4, kv=1), paged()), r"fit a cache of \(6, 4, 2, 8\)"),
    "attention over a cache, another size": (attend(*heads(4, d=16), paged()), r"fit a cache of \(6, 4, 2, 8\)"),
    "attention over a cache, fewer tokens": (attend(*heads(3), paged()), r"4 tokens of its batch"),
    "attention over a layer that is not there": (attend(*heads(4), paged(), layer=3), r"layer 3 of a cache with 1"),
    "flash, boundaries beyond the tokens": (flash(*heads(), tokens(0, 3, 9, dtype=INT)), r"cu_q must rise from 0 to 8"),
    "flash, boundaries that fall": (flash(*heads(), tokens(0, 9, 8, dtype=INT)), r"cu_q must rise from 0 to 8"),
    "flash, a sequence longer than announced": (
        flash(*heads(), tokens(0, 2, 8, dtype=INT), 5), r"cu_q has a sequence of 6, and at most 5",
    ),
    "flash, no scale": (flash(*heads(), tokens(0, 8, dtype=INT), scale=0.0), r"scale must be above 0, not 0"),
    "linear, a narrower weight": (call(ops.linear, zeros(4, 16), zeros(8, 12)), r"linear: weight .*\(8, 12\)"),
    "linear, a wider weight": (call(ops.linear, zeros(4, 12), zeros(8, 16)), r"linear: weight .*\(8, 16\)"),
    "linear, two dtypes": (call(ops.linear, zeros(4, 16), zeros(8, 16).half()), r"linear: weight torch.float16"),
    "linear, another bias": (call(ops.linear, zeros(4, 16), zeros(8, 16), zeros(7)), r"linear: bias must be .*8"),
    "linear, a bias of another dtype": (
        call(ops.linear, zeros(4, 16), zeros(8, 16), zeros(8).half()), r"linear: bias must be .*8",
    ),
    "linear of one row without its dimension": (call(ops.linear, zeros(16), zeros(8, 16)), r"\(16,\)"),
    "linear of three dimensions": (call(ops.linear, zeros(2, 4, 16), zeros(8, 16)), r"\(2, 4, 16\)"),
    "linear, a weight of one dimension": (call(ops.linear, zeros(4, 16), zeros(16)), r"linear: .*\(16,\)"),
    "linear of integers": (
        call(ops.linear, zeros(4, 16, dtype=INT), zeros(8, 16, dtype=INT)), "no backend serves linear",
    ),
    "linear to integers": (
        call(ops.linear, zeros(4, 16), zeros(8, 16), out_dtype=torch.int8), "out_dtype .*int8",
    ),
    "linear on two devices": (call(ops.linear, zeros(4, 16), zeros(8, 16, device="meta")), "on meta"),
    "linear_swiglu of an odd weight": (call(ops.linear_swiglu, zeros(4, 16), zeros(7, 16)), r"\(7, 16\)"),
    "linear_tp_invariant, a wider weight": (
        call(ops.linear_tp_invariant, zeros(4, 16), zeros(8, 24)), r"\(8, 24\)",
    ),
    "linear_tp_invariant, two dtypes": (
        call(ops.linear_tp_invariant, zeros(4, 16), zeros(8, 16).half()), "float16",
    ),
    "partial sums of two shapes": (lambda _: ops.join_tp_partials([zeros(4, 8), zeros(4, 7)]), "differ in shape"),
    "rms_norm, another weight": (call(ops.rms_norm, zeros(4, 16), zeros(1), 1e-5), r"weight must be .*16"),
    "rms_norm, two dtypes": (call(ops.rms_norm, zeros(4, 16), zeros(16).half(), 1e-5), "float16"),
    "rms_norm, a negative eps": (call(ops.rms_norm, zeros(4, 16), zeros(16), -1.0), "eps must be at least 0"),
    "rms_norm of a number": (call(ops.rms_norm, torch.tensor(1.0), zeros(1), 1e-5), "rms_norm: "),
    "rms_norm of integers": (
        call(ops.rms_norm, zeros(4, 16, dtype=INT), zeros(16, dtype=INT), 1e-5), "no backend serves",
    ),
    "add_rms_norm, a residual of one row": (
        call(ops.add_rms_norm, zeros(4, 16), zeros(1, 16), zeros(16), 1e-5), r"residual .*\(1, 16\)",
    ),
    "add_rms_norm, two dtypes": (
        call(ops.add_rms_norm, zeros(4, 16), zeros(4, 16).half(), zeros(16), 1e-5), "float16",
    ),
    "swiglu of an odd width": (call(ops.swiglu, zeros(4, 15)), r"\[M, 2 I\].*\(4, 15\)"),
    "swiglu of one dimension": (call(ops.swiglu, zeros(16)), r"\(16,\)"),
    "rope, fewer keys": (call(ops.rope, zeros(8, 4, 8), zeros(6, 2, 8), angles()), r"rope: k .*\(6, 2, 8\)"),
    "rope, keys of another size": (call(ops.rope, zeros(8, 4, 8), zeros(8, 2, 16), angles()), "does not fit q"),
    "rope, fewer positions": (call(ops.rope, zeros(8, 4, 8), zeros(8, 2, 8), angles(7)), "7 positions"),
    "rope, positions that are no integers": (lambda _: RopeAngles(zeros(8), zeros(4)), r"must be \[T\] int64"),
    "rope, a row of frequencies that is not there": (
        lambda _: RopeAngles(torch.arange(3), zeros(2, 4), tokens(0, 2, 1)), "row 2 at 1 lies outside 0 to 1",
    ),
    "rope_write_cache, fewer tokens": (
        call(ops.rope_write_cache, *heads(3), angles(3), paged(), layer=0), "3 tokens, and 4 in the batch",
    ),
    "rope_write_cache, other heads": (
        call(ops.rope_write_cache, *heads(4, kv=1), angles(4), paged(), layer=0), "does not fit a cache",
    ),
    "rope_write_cache, another dtype": (
        call(ops.rope_write_cache, *heads(4, dtype=torch.float16), angles(4), paged(), layer=0), "float16",
    ),
    "rope_write_cache, a layer that is not there": (
        call(ops.rope_write_cache, *heads(4), angles(4), paged(), layer=1), "layer 1 of a cache with 1",
    ),
    "norm_rope_write_cache, another norm": (
        call(
            ops.norm_rope_write_cache, *heads(4), ops.HeadNorms(zeros(7), zeros(8), 1e-5), angles(4), paged(), layer=0
        ), r"weight must be \[8\].*\(7,\)",
    ),
    "qkv_heads, another number of heads": (
        call(ops.qkv_heads, zeros(8, 7, 8), 4, 2, None, angles()), r"4 \+ 2 · 2 heads",
    ),
    "qkv_heads, fewer tokens": (call(ops.qkv_heads, zeros(6, 8, 8), 4, 2, None, angles()), "8 positions"),
    "token_log_probs beyond the vocabulary": (
        call(ops.token_log_probs, zeros(4, 9), tokens(0, 9, 1, 2)), "target 9 at 1 lies outside 0 to 8",
    ),
    "token_log_probs below it": (
        call(ops.token_log_probs, zeros(4, 9), tokens(0, 1, 1, -1)), "target -1 at 3 lies outside 0 to 8",
    ),
    "token_log_probs, short indices": (
        call(ops.token_log_probs, zeros(4, 9), TARGETS.int()), r"targets must be \[4\] int64",
    ),
    "token_log_probs, fewer targets": (
        call(ops.token_log_probs_and_entropy, zeros(4, 9), TARGETS[:3]), r"targets must be \[4\] int64",
    ),
    "token_log_probs of half precision": (
        call(ops.token_log_probs, zeros(4, 9).half(), TARGETS), r"logits must be \[M, V\] float32",
    ),
    "token_log_probs at no temperature": (
        call(ops.token_log_probs, zeros(4, 9), TARGETS, 0.0), "temperature must be greater than 0, not 0.0",
    ),
    "linear_log_probs, a narrower weight": (
        call(ops.linear_log_probs, zeros(4, 16), zeros(9, 12), TARGETS), r"linear_log_probs: weight .*\(9, 12\)",
    ),
    "linear_log_probs beyond the vocabulary": (
        call(ops.linear_log_probs_and_entropy, zeros(4, 16), zeros(2, 16), TARGETS), "target 2 at 3",
    ),
    "cross_entropy beyond the vocabulary": (
        call(ops.cross_entropy, zeros(4, 16), zeros(2, 16), TARGETS), "target 2 at 3 .*0 to 1, or -100",
    ),
    "cross_entropy of integers": (
        call(ops.cross_entropy, zeros(4, 16, dtype=INT), zeros(9, 16, dtype=INT), TARGETS), "int32",
    ),
    "route of integers": (call(ops.route, zeros(4, 8, dtype=INT), 2, normalise=True), "no backend serves"),
    "route to more than there are": (call(ops.route, zeros(4, 8), 9, normalise=True), "top_k is 9"),
    "combine, other rows": (call(ops.combine, zeros(7, 8), ROUTING), "one for each slot"),
    "grouped_linear, a narrower weight": (
        call(ops.grouped_linear, zeros(6, 16), zeros(2, 8, 12), [3, 3]), r"grouped_linear: weight .*\(2, 8, 12\)",
    ),
    "grouped_linear, a weight of two dimensions": (
        call(ops.grouped_linear, zeros(6, 16), zeros(2, 16), [3, 3]), r"\(2, 16\)",
    ),
    "grouped_linear, offsets beyond the rows": (
        call(ops.grouped_linear, zeros(6, 16), zeros(2, 8, 16), tokens(0, 3, 9, dtype=INT)), "rise from 0 to 6",
    ),
    "grouped_linear, offsets that fall": (
        call(ops.grouped_linear, zeros(6, 16), zeros(2, 8, 16), tokens(0, 7, 6, dtype=INT)), "rise from 0 to 6",
    ),
    "sample for a seat that is not there": (
        call(ops.sample, zeros(2, 9), SEATS, tokens(0, 2), tokens(0, 0)), "seat 2 at 1 lies outside 0 to 1",
    ),
    "adjust_logits for a seat that is not there": (
        call(ops.adjust_logits, zeros(2, 9), SEATS, tokens(0, -1)), "seat -1 at 1 lies outside 0 to 1",
    ),
    "adjust_logits of one dimension": (call(ops.adjust_logits, zeros(9), SEATS, tokens(0)), r"\[N, V\]"),
    "decode_inputs for a seat that is not there": (
        call(decode_inputs, ROWS, zeros(1, 8, dtype=INT), zeros(1, 4, dtype=INT), 4, 2), "seat 1 at 1",
    ),
    "decode_inputs at a position that is not there": (
        call(decode_inputs, ROWS, zeros(2, 1, dtype=INT), zeros(2, 4, dtype=INT), 4, 2), "position 1 at 1",
    ),
    "put_tokens at a position that is not there": (
        call(put_tokens, zeros(2, 3, dtype=INT), tokens(0, 1), tokens(0, 3), tokens(5, 6)), "position 3 at 1",
    ),
    "put_tokens, fewer tokens": (
        call(put_tokens, zeros(2, 3, dtype=INT), tokens(0, 1), tokens(0, 1), tokens(5)), r"tokens must be \[2\]",
    ),
    "adamw, a gradient too many": (adamw([zeros(4, 4), zeros(4, 4)]), "2 gradients for 1 parameters"),
    "adamw, a gradient of another shape": (adamw([zeros(4)]), r"adamw: a gradient .*\(4, 4\)"),
    "adamw before the first step": (adamw([zeros(4, 4)], step=0), "count from 1, got 0"),
    "adamw of nothing": (lambda p: make_adamw([], p), "no parameters"),
    "muon of a vector": (lambda p: Muon([zeros(4)], policy=p), r"muon: matrices are \[rows, columns\]"),
    "muon, a gradient too many": (lambda p: Muon([zeros(4, 4)], policy=p).step([], 0.1), "0 gradients for 1 matrices"),
    "muon, a gradient of another shape": (
        lambda p: Muon([zeros(4, 4)], policy=p).step([zeros(4, 5)], 0.1), r"gradients\[0\] must be \(4, 4\)",
    ),
}  # fmt: skip


@every_policy
@pytest.mark.parametrize("name", CALLS)
def test_what_does_not_fit_is_refused(name: str, policy: Policy) -> None:
    run, message = CALLS[name]
    with pytest.raises((BackendError, ConfigError), match=message):
        run(policy)


small = st.integers(1, 3)


@every_policy
@settings(max_examples=60, deadline=None)
@given(st.tuples(*[small] * 6), st.sampled_from([8, 16]), st.sampled_from([8, 16]))
def test_attention_gives_a_result_of_the_right_shape_or_refuses(
    policy: Policy, sizes: tuple[int, ...], d: int, other: int
) -> None:
    batch_tokens, q_tokens, k_tokens, q_heads, kv_heads, v_heads = sizes
    q, k, v = zeros(q_tokens, q_heads, d), zeros(k_tokens, kv_heads, other), zeros(k_tokens, v_heads, other)
    fits = batch_tokens == q_tokens == k_tokens and d == other and kv_heads == v_heads
    _fits_or_is_refused(
        fits and q_heads % kv_heads == 0,
        q.shape,
        attend(q, k, v, TokenBatch.packed([batch_tokens])),
        policy,
    )


@every_policy
@settings(max_examples=60, deadline=None)
@given(st.tuples(*[small] * 6))
def test_linear_gives_a_result_of_the_right_shape_or_refuses(policy: Policy, sizes: tuple[int, ...]) -> None:
    m, k, n, weight_k, bias_n, dimensions = sizes
    x = zeros(*(1,) * (dimensions - 2), m, k) if dimensions > 1 else zeros(k)
    _fits_or_is_refused(
        dimensions == 2 and k == weight_k and bias_n == n,
        (m, n),
        lambda policy: ops.linear(x, zeros(n, weight_k), zeros(bias_n), policy=policy),
        policy,
    )


@every_policy
@settings(max_examples=60, deadline=None)
@given(st.tuples(*[small] * 5), st.booleans())
def test_rope_gives_results_of_the_right_shape_or_refuses(
    policy: Policy, sizes: tuple[int, ...], interleaved: bool
) -> None:
    q_tokens, k_tokens, positions, half, d = sizes
    q, k = zeros(q_tokens, 2, 2 * d), zeros(k_tokens, 1, 2 * d)
    _fits_or_is_refused(
        q_tokens == k_tokens == positions and half <= d,
        q.shape,
        lambda policy: ops.rope(q, k, angles(positions, half), interleaved=interleaved, policy=policy)[0],
        policy,
    )


def _fits_or_is_refused(
    fits: bool, shape: Sequence[int], run: Callable[[Policy], Any], policy: Policy
) -> None:
    if fits:
        assert run(policy).shape == tuple(shape)
    else:
        with pytest.raises(BackendError):
            run(policy)


@pytest.mark.gpu
def test_an_argument_on_another_device_is_refused_before_a_launch() -> None:
    here = torch.device("cuda")
    x, q, k = zeros(4, 64).to(here), zeros(8, 4, 64).to(here), zeros(8, 2, 64).to(here)
    batch = TokenBatch.packed([3, 5], device=here)
    for run in (
        lambda: ops.rms_norm(x, zeros(64), 1e-5),
        lambda: ops.add_rms_norm(x, zeros(4, 64), zeros(64).to(here), 1e-5),
        lambda: ops.linear(x, zeros(8, 64)),
        lambda: ops.linear(x, zeros(8, 64).to(here), zeros(8)),
        lambda: ops.linear_swiglu(x, zeros(16, 64)),
        lambda: ops.grouped_linear(x, zeros(2, 8, 64), [2, 2]),
        lambda: ops.rope(q, k, RopeAngles(torch.arange(8), zeros(32))),
        lambda: ops.attention(q, k, zeros(8, 2, 64), batch, layer=0, scale=1.0),
        lambda: ops.attention(q, k, k, PACKED, layer=0, scale=1.0),
        lambda: ops.token_log_probs(x, TARGETS),
        lambda: ops.cross_entropy(x, zeros(9, 64).to(here), TARGETS),
        lambda: ops.sample(x, SEATS, tokens(0, 1, 0, 1).to(here), tokens(0, 0, 0, 0).to(here)),
        lambda: Muon([zeros(4, 4).to(here)]).step([zeros(4, 4)], 0.1),
    ):
        with pytest.raises(BackendError, match="cpu"):
            run()


@pytest.mark.gpu
def test_debug_mode_finds_an_index_outside_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAINSPRING_DEBUG", "1")
    x, weight = zeros(4, 16).cuda(), zeros(9, 16).cuda()
    beyond = tokens(0, 9, 1, 2).cuda()
    for run in (
        lambda: ops.token_log_probs(zeros(4, 9).cuda(), beyond),
        lambda: ops.linear_log_probs(x, weight, beyond),
        lambda: ops.cross_entropy(x, weight, beyond),
    ):
        with pytest.raises(BackendError, match="target 9 at 1 lies outside 0 to 8"):
            run()
    with pytest.raises(BackendError, match="rise from 0 to 4"):
        ops.grouped_linear(x, zeros(2, 8, 16).cuda(), tokens(0, 3, 9, dtype=INT).cuda())
    with pytest.raises(BackendError, match="seat 2 at 1"):
        ops.sample(
            zeros(2, 9).cuda(), SamplingTensors.allocate(2, "cuda"), tokens(0, 2).cuda(), tokens(0, 0).cuda()
        )
    q, k, v = (x.cuda() for x in heads(d=64))
    cu = tokens(0, 2, 8, dtype=INT).cuda()
    with pytest.raises(BackendError, match="a sequence of 6, and at most 5"):
        flash_attention(q, k, v, cu, cu, max_q=5, max_k=5, scale=1.0)
