"""Collectives over shared memory and TCP, and Megatron's modules against one process."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mainspring.tensor as mt
from mainspring.tensor import nn, parallel
from tensor import parallel_jobs as jobs

F64 = mt.float64
TRANSPORTS = ["shared_memory", "tcp"]


def close(got: Any, want: mt.Tensor | np.ndarray, bound: float = 1e-12) -> None:
    want = want.detach().numpy() if isinstance(want, mt.Tensor) else want
    np.testing.assert_allclose(np.asarray(got), want, rtol=bound, atol=bound)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_collectives(transport: str, size: int) -> None:
    assert parallel.launch(jobs.collectives, size, transport) == [transport] * size


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_different_calls_are_an_error_on_every_rank(transport: str) -> None:
    for message in parallel.launch(jobs.disagreement, 2, transport):
        assert "another collective" in message


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_dead_peer_is_an_error_and_no_hang(transport: str) -> None:
    with pytest.raises(parallel.CommunicationError, match="rank 1: the process ended"):
        parallel.launch(jobs.death, 3, transport, timeout=20.0)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_silent_peer_is_an_error_after_the_time_out(transport: str) -> None:
    message = parallel.launch(jobs.silence, 2, transport, timeout=3.0)[0]
    assert "rank 1" in message


def test_a_rank_that_never_comes_is_an_error() -> None:
    with pytest.raises(parallel.CommunicationError, match="nobody listened"):
        parallel.World(1, 2, "127.0.0.1:1", 0.3)
    with pytest.raises(mt.ValueOutOfRangeError, match="host:port"):
        parallel.World(0, 2, "nowhere", 0.3)


def single_mlp() -> dict[str, mt.Tensor]:
    uniform = parallel.layers.uniform_init
    first = nn.Parameter(uniform((8, 6), mt.Generator(1)))
    second = nn.Parameter(uniform((6, 8), mt.Generator(2)))
    x = mt.randn(4, 3, 6, dtype=F64, generator=mt.Generator(3)).requires_grad_()
    weight = mt.randn(4, 3, 6, dtype=F64, generator=mt.Generator(4))
    bias = nn.Parameter(mt.zeros(8, dtype=F64))
    out = mt.linear(mt.gelu(mt.linear(x, first, bias)), second)
    (out * weight).sum().backward()
    return {
        "out": out, "grad_x": x.grad, "first": first, "grad_first": first.grad, "second": second,
        "grad_second": second.grad, "grad_bias": bias.grad,
    }  # fmt: skip


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("options", [{}, {"sequence": True}, {"fused": True}, {"skip": True}], ids=str)
def test_column_and_row_parallel_layers_equal_one_process(size: int, options: dict[str, bool]) -> None:
    want = single_mlp()
    for result in parallel.launch(jobs.mlp, size, options):
        assert result["first"] == want["first"].tolist()  # slices of one weight, bit for bit
        assert result["second"] == want["second"].tolist()
        for name in ("out", "grad_x", "grad_first", "grad_second", "grad_bias"):
            if result[name] is not None:
                close(
                    result[name], want[name], 1e-6 if options.get("fused") and name == "grad_first" else 1e-12
                )


def test_gathered_columns_and_scattered_rows() -> None:
    uniform = parallel.layers.uniform_init
    x = mt.randn(3, 4, dtype=F64, generator=mt.Generator(3)).requires_grad_()
    y = mt.linear(x, uniform((8, 4), mt.Generator(1)))
    out = mt.linear(y, uniform((4, 8), mt.Generator(2)))
    mt.square(out).sum().backward()
    for got_y, got, grad in parallel.launch(jobs.gathered_column, 2):
        close(got_y, y)
        close(got, out)
        close(grad, x.grad)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_vocabulary_parallel_embedding_and_cross_entropy(size: int, smoothing: float) -> None:
    table = nn.Parameter(mt.randn(12, 4, dtype=F64, generator=mt.Generator(5)))
    index = mt.randint(0, 12, (3, 5), generator=mt.Generator(6))
    rows = mt.embedding(index, table)
    weight = mt.randn(3, 5, 4, dtype=F64, generator=mt.Generator(7))
    (rows * weight).sum().backward()
    logits = (mt.randn(3, 5, 12, dtype=F64, generator=mt.Generator(8)) * 3.0).requires_grad_()
    losses = mt.cross_entropy(
        logits.reshape(15, 12), index.reshape(15), reduction="none", label_smoothing=smoothing * 12 / 11
    ).reshape(3, 5)
    (losses * weight[..., 0]).sum().backward()
    for result in parallel.launch(jobs.vocabulary, size, smoothing):
        close(result["rows"], rows)
        close(result["grad_table"], table.grad)
        close(result["losses"], losses)
        close(result["grad_logits"], logits.grad)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_cross_entropy_takes_exactly_three_all_reduces(smoothing: float) -> None:
    assert parallel.launch(jobs.three_reductions, 2, smoothing) == ["met", "met"]


def test_the_cross_entropy_refuses_what_is_no_class() -> None:
    world = parallel.World(0, 1, "127.0.0.1:0")
    group = parallel.new_group(world, [0])
    assert group is not None
    logits = mt.randn(2, 5, requires_grad=True)
    with pytest.raises(mt.IndexOutOfRangeError, match=r"target 5 at row 1 .* \[0, 5\)"):
        parallel.vocab_parallel_cross_entropy(logits, mt.tensor([0, 5]), group)
    loss = parallel.vocab_parallel_cross_entropy(logits, mt.tensor([0, 4]), group).sum()
    with pytest.raises(mt.AutogradError, match="higher order"):
        mt.grad(loss, [logits], create_graph=True)


def test_mappings_have_gradients_of_every_order() -> None:
    x = np.arange(8.0).reshape(2, 4)
    for first, second in parallel.launch(jobs.second_gradients, 2):
        np.testing.assert_allclose(first, x * x / 2, rtol=1e-14)
        np.testing.assert_allclose(second, x, rtol=1e-14)


def test_smoothing_is_that_of_the_definition() -> None:
    """Megatron's s' = s K / (K - 1) puts s / (K - 1) on every wrong class."""
    logits = np.random.default_rng(0).standard_normal((1, 6))
    log_p = logits - np.log(np.exp(logits).sum())
    s, k, target = 0.2, 6, 2
    want = -sum((1 - s if c == target else s / (k - 1)) * log_p[0, c] for c in range(k))
    got = mt.cross_entropy(mt.tensor(logits), mt.tensor([target]), label_smoothing=s * k / (k - 1))
    assert got.item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("size", [2, 4])
def test_data_parallel_gradients_are_those_of_the_whole_batch(size: int) -> None:
    results = parallel.launch(jobs.data_parallel, size)
    whole = results[0][1]
    for rounds, _ in results:
        for grads in rounds:
            for got, want in zip(grads, whole, strict=True):
                close(got, np.asarray(want))


def test_a_pipeline_of_stages_equals_one_process() -> None:
    stages = [nn.Linear(4, 4, dtype=F64, generator=mt.Generator(20 + i)) for i in range(3)]
    x = mt.randn(3, 4, dtype=F64, generator=mt.Generator(30))
    for stage in stages:
        x = mt.tanh(stage(x))
    mt.square(x).sum().backward()
    for (grad, _), stage in zip(parallel.launch(jobs.pipeline, 3), stages, strict=True):
        close(grad, stage.weight.grad)


def test_streams_of_random_numbers_by_name() -> None:
    tracker = parallel.GeneratorTracker()
    tracker.seed(7, tensor_rank=1)
    outside = mt.rand(3).tolist()
    with tracker.fork():
        inside = mt.rand(3).tolist()
    after = mt.rand(3).tolist()
    mt.manual_seed(7)
    assert outside == mt.rand(3).tolist()
    assert after == mt.rand(3).tolist()
    assert inside == mt.rand(3, generator=mt.Generator(7 + 2718 + 1)).tolist()
    state = tracker.get_states()
    with tracker.fork():
        more = mt.rand(3).tolist()
    tracker.set_states(state)
    with tracker.fork():
        assert mt.rand(3).tolist() == more
    with pytest.raises(mt.ValueOutOfRangeError, match="exists already"):
        tracker.add("other", 7 + 2718 + 1)


def test_scaled_masked_softmax() -> None:
    scores = mt.randn(1, 2, 3, 4, generator=mt.Generator(1))
    mask = mt.zeros(1, 1, 3, 4, dtype=mt.bool)
    mask[..., 1] = True
    got = parallel.scaled_masked_softmax(scores, mask, 0.5)
    assert (got[..., 1] == 0).all().item()
    close(got.sum(-1), np.ones((1, 2, 3)), 1e-6)
    causal = parallel.scaled_masked_softmax(scores[..., :3], None, 0.5, causal=True)
    assert causal[0, 0, 0].tolist() == [1, 0, 0]
    whole = parallel.scaled_masked_softmax(scores, mt.ones(1, 1, 3, 4, dtype=mt.bool), 1.0)
    close(whole, np.full((1, 2, 3, 4), 0.25), 1e-6)
    with pytest.raises(mt.DTypeError, match="must be bool"):
        parallel.scaled_masked_softmax(scores, mt.zeros(3, 4), 1.0)


@pytest.mark.parametrize("create_graph", [False, True])
def test_the_fused_softmax_has_the_gradients_of_its_formula(create_graph: bool) -> None:
    scores = mt.randn(2, 2, 3, 5, dtype=F64, requires_grad=True)
    mask = mt.rand(2, 1, 3, 5) < 0.3
    weight = mt.randn(2, 2, 3, 5, dtype=F64)
    hidden = mt.triu(mt.ones(3, 5, dtype=mt.bool), 3)

    def plain(x: mt.Tensor) -> mt.Tensor:
        x = mt.masked_fill(x * 0.7, hidden, float("-inf"))
        return mt.softmax(mt.masked_fill(x, mask, -10000.0), -1)

    got, want = parallel.scaled_masked_softmax(scores, mask, 0.7, causal=True), plain(scores)
    close(got.detach(), want)
    firsts = [mt.grad((y * weight).sum(), [scores], create_graph=create_graph)[0] for y in (got, want)]
    close(firsts[0].detach(), firsts[1])
    if create_graph:
        seconds = [mt.grad((g * weight).sum(), [scores])[0] for g in firsts]
        close(seconds[0], seconds[1])


def plain_sample_idx(
    sizes: list[int], order: list[int], seq_length: int, count: int, extra: int
) -> list[list[int]]:
    """Megatron's loop, token by token."""
    out, place, offset = [[0, 0]], 0, 0
    for _ in range(count):
        left = seq_length + extra
        while left:
            here = sizes[order[place]] - offset
            left -= here
            if left <= 0:
                offset += left + here - extra
                left = 0
            else:
                place, offset = place + 1, 0
        out.append([place, offset])
    return out


@pytest.mark.parametrize("seed", range(20))
def test_sample_indices_are_megatrons(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 30, 12)
    order = np.concatenate([rng.permutation(12) for _ in range(3)])
    tokens, length = int(sizes.sum()), int(rng.integers(3, 17))
    got = parallel.build_sample_idx(sizes, order, length, 3, tokens)
    count = (3 * tokens - 1) // length
    want = np.asarray(plain_sample_idx(sizes.tolist(), order.tolist(), length, count, 1))
    starts = np.concatenate([[0], np.cumsum(sizes[order])])
    # The same token; at a border of documents both ways of naming it are right.
    np.testing.assert_array_equal(starts[got[:, 0]] + got[:, 1], starts[want[:, 0]] + want[:, 1])
    assert len(got) == count + 1


def test_counts_are_exact_where_float32_is_not() -> None:
    # 2^24 + 1 does not exist in float32: a ceiling there gives one sample too few.
    tokens = 2**24 + 2
    got = parallel.build_sample_idx([tokens], [0], 1, 1, tokens, drop_last_partial_sequence=False)
    assert len(got) == 2**24 + 2


def test_blending_follows_the_weights() -> None:
    dataset, sample = parallel.build_blending_indices([0.5, 0.25, 0.25], 400)
    assert np.bincount(dataset).tolist() == [200, 100, 100]
    for d in range(3):
        assert sample[dataset == d].tolist() == list(range((dataset == d).sum()))
    for wrong in ([], [0.0], [1.0, -1.0], [float("nan")], [1e-300, 1.0]):
        with pytest.raises(mt.ValueOutOfRangeError):
            parallel.build_blending_indices(wrong, 3)


@given(
    weights=st.lists(st.floats(2.0**-20, 1) | st.just(0.0), min_size=1, max_size=6).filter(any),
    size=st.integers(0, 60),
)
def test_blending_is_that_of_exact_fractions(weights: list[float], size: int) -> None:
    exact, taken = [Fraction(w) for w in weights], [0] * len(weights)
    dataset, sample = parallel.build_blending_indices(weights, size)
    for i in range(size):
        best = max(range(len(exact)), key=lambda d: max(i, 1) * exact[d] / sum(exact) - taken[d])
        assert (dataset[i], sample[i]) == (best, taken[best])
        taken[best] += 1


def test_sample_indices_refuse_documents_that_are_not_there() -> None:
    with pytest.raises(mt.IndexOutOfRangeError, match="document 2 at 1 does not exist"):
        parallel.build_sample_idx([4, 4], [0, 2], 2, 1, 8)
    with pytest.raises(mt.ValueOutOfRangeError, match="9 tokens are needed, the documents hold 8"):
        parallel.build_sample_idx([4, 4], [0, 1], 2, 1, 9)
