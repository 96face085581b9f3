"""The PyTorch references against their formulas in float64, gradients included; and the choice of backends."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mainspring import ops
from mainspring.errors import BackendError, ConfigError
from mainspring.ops import KVCache, Policy, TokenBatch
from mainspring.ops.catalogue import operations
from mainspring.ops.cuda import support as cuda_support
from mainspring.ops.linear import LINEAR
from mainspring.ops.packed_attention import packed_attention
from mainspring.ops.registry import Call, Implementation, Operation, accepts_floats
from mainspring.ops.triton import support as triton_support

REFERENCES = [Policy("lockstep", "reference"), Policy("fast", "reference")]
both_numerics = pytest.mark.parametrize("policy", REFERENCES, ids=lambda p: p.numerics)


def _random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def _naive_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, window: int | None
) -> Tensor:
    """One softmax a query, written out."""
    out = torch.zeros_like(q)
    first = 0
    group = q.shape[1] // k.shape[1]
    for n in lengths:
        for p in range(n):
            low = 0 if window is None else max(0, p - window + 1)
            for head in range(q.shape[1]):
                keys = k[first + low : first + p + 1, head // group]
                weights = torch.softmax(keys @ q[first + p, head] * scale, dim=0)
                out[first + p, head] = weights @ v[first + low : first + p + 1, head // group]
        first += n
    return out


@both_numerics
@pytest.mark.parametrize("window", [None, 1, 5, 300])
@pytest.mark.parametrize("lengths", [[1], [5, 5, 5], [3, 20, 1, 270]], ids=str)
def test_attention_is_its_formula(lengths: list[int], window: int | None, policy: Policy) -> None:
    total = sum(lengths)
    with torch.no_grad():
        q, k, v = _random(total, 4, 8, seed=1), _random(total, 2, 8, seed=2), _random(total, 2, 8, seed=3)
        batch = TokenBatch.packed(lengths)
        got = ops.attention(q, k, v, batch, layer=0, scale=0.3, window=window, policy=policy)
        torch.testing.assert_close(
            got, _naive_attention(q, k, v, lengths, 0.3, window), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("window", [None, 1, 5, 300])
@pytest.mark.parametrize("lengths", [[1], [5, 5, 5], [3, 20, 1, 70, 65]], ids=str)
def test_attention_by_products_is_its_formula_and_has_its_gradient(
    lengths: list[int], window: int | None
) -> None:
    total = sum(lengths)
    inputs = [_random(total, 4, 8, seed=1), _random(total, 2, 8, seed=2), _random(total, 2, 8, seed=3)]
    weights = _random(total, 4, 8, seed=4).detach()
    batch = TokenBatch.packed(lengths)
    expected = ops.attention(*inputs, batch, layer=0, scale=0.3, window=window, policy=REFERENCES[0])
    got = packed_attention(*inputs, tuple(lengths), 0.3, window)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad((out * weights).sum(), inputs) for out in (got, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@both_numerics
def test_attention_through_a_cache_is_attention_over_the_whole_sequence(policy: Policy) -> None:
    lengths, split = [30, 9], [13, 8]
    with torch.no_grad():
        q, k, v = _random(39, 4, 8, seed=1), _random(39, 2, 8, seed=2), _random(39, 2, 8, seed=3)
        expected = _naive_attention(q, k, v, lengths, 0.3, None)
        cache = KVCache.allocate(1, 12, 4, 2, 8, torch.float64, "cpu")
        tables = [[3, 1, 8, 2, 11, 4, 6, 7], [9, 5, 10]]
        starts = [0, 30]
        rows = [torch.arange(s, s + n) for s, n in zip(starts, split, strict=True)]
        rest = [torch.arange(s + m, s + n) for s, m, n in zip(starts, split, lengths, strict=True)]
        for index, new, contexts in (
            (torch.cat(rows), split, split),
            (torch.cat(rest), [n - m for n, m in zip(lengths, split, strict=True)], lengths),
        ):
            batch = TokenBatch.paged(new, contexts, tables, cache)
            got = ops.attention(q[index], k[index], v[index], batch, layer=0, scale=0.3, policy=policy)
            torch.testing.assert_close(got, expected[index], rtol=1e-12, atol=1e-12)


@both_numerics
def test_gradients_of_the_references_are_those_of_finite_differences(policy: Policy) -> None:
    x, weight = _random(5, 6), _random(4, 6, seed=1)
    bias = _random(4, seed=2)
    assert torch.autograd.gradcheck(lambda x, w, b: ops.linear(x, w, b, policy=policy), (x, weight, bias))
    scale = _random(6, seed=3)
    assert torch.autograd.gradcheck(lambda x, w: ops.rms_norm(x, w, 1e-5, policy=policy), (x, scale))
    residual = _random(5, 6, seed=4)
    assert torch.autograd.gradcheck(
        lambda x, r, w: ops.add_rms_norm(x, r, w, 1e-5, policy=policy), (x, residual, scale)
    )
    assert torch.autograd.gradcheck(lambda x: ops.swiglu(x, policy=policy), (x,))
    q, k, v = _random(7, 4, 4), _random(7, 2, 4, seed=5), _random(7, 2, 4, seed=6)
    batch = TokenBatch.packed([4, 1, 2])
    assert torch.autograd.gradcheck(
        lambda q, k, v: ops.attention(q, k, v, batch, layer=0, scale=0.5, window=3, policy=policy), (q, k, v)
    )
    for count, interleaved in ((2, False), (2, True), (1, False)):
        angles = ops.RopeAngles(batch.positions, torch.tensor([1.0, 0.1][:count]), scale=1.2)
        assert torch.autograd.gradcheck(
            lambda q, k, a=angles, i=interleaved: ops.rope(q, k, a, interleaved=i, policy=policy), (q, k)
        )
    experts = _random(3, 4, 6, seed=7)
    assert torch.autograd.gradcheck(
        lambda x, w: ops.grouped_linear(x, w, [2, 0, 3], policy=policy), (x, experts)
    )


@both_numerics
def test_losses_have_the_gradients_of_finite_differences(policy: Policy) -> None:
    hidden, weight = _random(9, 6), _random(11, 6, seed=1)
    targets = torch.tensor([0, 3, -100, 10, 5, 5, -100, 2, 1])
    assert torch.autograd.gradcheck(
        lambda h, w: ops.cross_entropy(h, w, targets, policy=policy), (hidden, weight)
    )
    chosen = targets.clamp_min(0)
    assert torch.autograd.gradcheck(
        lambda h, w: ops.linear_log_probs(h, w, chosen, 0.7, policy=policy), (hidden, weight)
    )


def test_cross_entropy_in_chunks_equals_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mainspring.ops.logit_loss.LOGIT_CHUNK_ELEMENTS", 1
    )  # chunks of the least size, 16 rows
    hidden, weight = _random(50, 6), _random(11, 6, seed=1)
    targets = torch.randint(0, 11, (50,), generator=torch.Generator().manual_seed(0))
    targets[:20] = -100  # a whole chunk and more that does not count
    got = ops.cross_entropy(hidden, weight, targets)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    for a, b in zip(
        torch.autograd.grad(got, (hidden, weight)),
        torch.autograd.grad(expected, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_cross_entropy_of_no_target_is_zero_and_has_no_gradient() -> None:
    hidden, weight = _random(4, 6), _random(11, 6, seed=1)
    loss = ops.cross_entropy(hidden, weight, torch.full((4,), -100))
    assert loss.item() == 0
    assert all(not g.any() for g in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_turns_by_position_times_frequency(interleaved: bool) -> None:
    positions = torch.tensor([0, 1, 1000])
    inv_freq = torch.tensor([1.0, 0.25])
    cos, sin = ops.RopeAngles(positions, inv_freq, scale=1.5).table()
    for i, p in enumerate(positions.tolist()):
        for j, f in enumerate(inv_freq.tolist()):
            assert math.isclose(cos[i, j].item(), 1.5 * math.cos(p * f), abs_tol=1e-6)
            assert math.isclose(sin[i, j].item(), 1.5 * math.sin(p * f), abs_tol=1e-6)
    q = torch.randn(3, 2, 6)  # two pairs and two elements that are not rotated
    turned, _ = ops.rope(q.clone(), q.clone(), ops.RopeAngles(positions, inv_freq), interleaved=interleaved)
    angle = positions[:, None, None] * inv_freq
    first, second = (q[..., :4:2], q[..., 1:4:2]) if interleaved else (q[..., :2], q[..., 2:4])
    as_complex = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    pair = as_complex.real, as_complex.imag
    expected = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    torch.testing.assert_close(turned, torch.cat((expected, q[..., 4:]), -1), rtol=1e-5, atol=1e-5)


def test_rope_with_a_row_of_frequencies_for_each_sequence() -> None:
    positions = torch.tensor([0, 5, 0, 7])
    inv_freq = torch.tensor([[1.0, 0.25], [0.5, 0.125]])
    angles = ops.RopeAngles(positions, inv_freq, torch.tensor([0, 0, 1, 1]), 1.1)
    for part, row in ((slice(0, 2), 0), (slice(2, 4), 1)):
        own = ops.RopeAngles(positions[part], inv_freq[row], scale=1.1)
        for a, b in zip(angles.table(), own.table(), strict=True):
            assert torch.equal(a[part], b)


def test_angles_that_do_not_fit_are_refused() -> None:
    q, positions = torch.randn(3, 2, 4), torch.arange(3)
    with pytest.raises(BackendError, match="3 frequencies"):
        ops.rope(q, q, ops.RopeAngles(positions, torch.ones(3)))
    with pytest.raises(BackendError, match="2 positions"):
        ops.rope(q, q, ops.RopeAngles(positions[:2], torch.ones(2)))
    with pytest.raises(BackendError, match="float32"):
        ops.RopeAngles(positions, torch.ones(2, dtype=torch.float64))


def test_a_cache_has_no_gradient() -> None:
    cache = KVCache.allocate(1, 3, 4, 2, 8, torch.float32, "cpu")
    batch = TokenBatch.paged([2], [2], [[1]], cache)
    q = torch.randn(2, 4, 8, requires_grad=True)
    k = torch.randn(2, 2, 8)
    with pytest.raises(BackendError, match="no gradient"):
        ops.attention(q, k, k, batch, layer=0, scale=1.0)


def test_batches_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        TokenBatch.packed([3, 0])
    cache = KVCache.allocate(1, 3, 4, 2, 8, torch.float32, "cpu")
    with pytest.raises(ConfigError, match="9 keys does not fit 2 blocks of 4"):
        TokenBatch.paged([1], [9], [[1, 2]], cache)
    with pytest.raises(ConfigError, match="at least 2 blocks"):
        KVCache.allocate(1, 1, 4, 2, 8, torch.float32, "cpu")


def test_the_registry_says_who_serves_and_why() -> None:
    call = Call("cpu", torch.float64, Policy(), False)
    answers = dict(LINEAR.explain(call))
    assert answers["reference"] is None
    assert "float64" in str(answers["cpu"])
    forced = dict(LINEAR.explain(Call("cpu", torch.float32, Policy(backend="reference"), False)))
    assert "forces" in str(forced["cpu"])
    with pytest.raises(BackendError, match="no backend serves linear"):
        ops.linear(torch.zeros(1, 1), torch.zeros(1, 1), policy=Policy(backend="abacus"))


def test_a_machine_without_a_compiler_gets_triton_and_one_without_triton_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On Hopper, here made believe: the kinds of call are chosen by what the machine has, and `explain` says why."""
    for name in ("_wrong_device", "_no_compiler"):
        getattr(cuda_support, name).cache_clear()
    monkeypatch.setattr(cuda_support, "_wrong_device", lambda: None)
    monkeypatch.setattr(triton_support, "_too_old", lambda: None)
    tables = [o for o in operations() if any(i.backend == "cuda" for i in o.implementations)]
    assert {o.name for o in tables} >= {"attention", "flash_attention", "linear", "grouped_linear"}
    for nvcc, triton, expected, reason in (
        ("/usr/bin/nvcc", None, "cuda", None),
        (None, None, "triton", "needs nvcc to compile its kernels"),
        (None, "Triton is not installed", "reference", "Triton is not installed"),
    ):
        monkeypatch.setattr(cuda_support, "find_nvcc", lambda nvcc=nvcc: nvcc)
        monkeypatch.setattr(triton_support, "_unavailable", lambda triton=triton: triton)
        cuda_support._no_compiler.cache_clear()
        for operation in tables:
            answers = operation.explain(Call("cuda", torch.bfloat16, Policy(), False, 128))
            assert next(backend for backend, why in answers if why is None) == expected
            assert reason is None or any(reason in str(why) for _, why in answers)
    cuda_support._no_compiler.cache_clear()


def test_the_first_backend_that_does_not_refuse_serves() -> None:
    operation = Operation(
        "answer",
        Implementation("picky", lambda: 1, lambda call: "too warm" if call.needs_grad else None),
        Implementation("plain", lambda: 2, accepts_floats),
    )
    assert operation.select(torch.zeros(1), Policy())() == 1
    assert operation.select(torch.zeros(1), Policy(), needs_grad=True)() == 2
