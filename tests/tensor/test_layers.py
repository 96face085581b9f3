"""Attention, rotation, convolutions, checkpointing, Muon, schedules, files: against PyTorch or themselves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mainspring.tensor as mt
from mainspring.errors import CheckpointError
from mainspring.tensor import nn, optim, schedule
from tensor.cases import as_torch

KIND = {"float32": 2e-5, "float64": 1e-11}


def reference_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    repeats = q.shape[2] // k.shape[2]
    qt, kt, vt = (
        t.transpose(1, 2) for t in (q, k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2))
    )
    scores = qt @ kt.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if causal:
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        scores = scores.masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ vt).transpose(1, 2)


@pytest.mark.parametrize("kind", ["float32", "float64"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "groups", "dim"),
    [
        (2, 5, 5, 4, 2, 8),
        (1, 1, 9, 3, 1, 4),
        (1, 70, 130, 2, 2, 16),
        (2, 129, 129, 6, 3, 5),
        (1, 1, 1, 1, 1, 1),
    ],
)
def test_attention_and_its_gradients(
    kind: str, causal: bool, batch: int, queries: int, keys: int, heads: int, groups: int, dim: int
) -> None:
    torch.manual_seed(0)
    shapes = ((batch, queries, heads, dim), (batch, keys, groups, dim), (batch, keys, groups, dim + 1))
    theirs = [torch.randn(s, dtype=getattr(torch, kind)).requires_grad_() for s in shapes]
    ours = [mt.from_dlpack(t.detach()).requires_grad_() for t in theirs]
    want = reference_attention(*theirs, causal)
    got = mt.attention(*ours, causal)
    torch.testing.assert_close(as_torch(got), want.detach(), rtol=KIND[kind], atol=KIND[kind])
    weight = torch.randn(want.shape, dtype=want.dtype)
    (want * weight).sum().backward()
    (got * mt.from_dlpack(weight)).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(as_torch(a.grad), b.grad, rtol=10 * KIND[kind], atol=10 * KIND[kind])


def test_attentions_second_gradients_and_strided_inputs() -> None:
    torch.manual_seed(1)
    base = torch.randn(3, 1, 4, 4, 3, dtype=torch.float64)

    def run(q: Any, k: Any, v: Any, attention: Any, grad: Any) -> Any:
        out = attention(q, k, v)
        first = grad((out * out).sum(), [q, k, v], create_graph=True)
        total = (first[0] * first[0]).sum() + (first[1] * first[1]).sum() + (first[2] * first[2]).sum()
        return grad(total, [q, k, v])

    theirs = [base[i].transpose(1, 2).detach().requires_grad_() for i in range(3)]
    ours = [mt.from_dlpack(base[i].clone()).transpose(1, 2).requires_grad_() for i in range(3)]
    want = run(*theirs, lambda *t: reference_attention(*t, True), torch.autograd.grad)
    got = run(*ours, lambda *t: mt.attention(*t, True), mt.grad)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(as_torch(a), b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_attention_in_halves_errs_no_more_than_torch(kind: str) -> None:
    torch.manual_seed(2)
    half = [torch.randn(1, 40, 4, 16).to(getattr(torch, kind)) for _ in range(3)]
    truth = reference_attention(*(t.double() for t in half), True)
    torchs = (reference_attention(*half, True).double() - truth).abs().max()
    mine = (as_torch(mt.attention(*(mt.from_dlpack(t) for t in half), True)).double() - truth).abs().max()
    assert mine <= 2 * torchs + 2.0**-8 * truth.abs().max()


def test_attention_says_what_does_not_fit() -> None:
    x = mt.zeros(1, 2, 3, 4)
    with pytest.raises(mt.ShapeError, match="H a multiple of G"):
        mt.attention(x, mt.zeros(1, 2, 2, 4), mt.zeros(1, 2, 2, 4))
    with pytest.raises(mt.ShapeError, match="only 1 keys"):
        mt.attention(x, x[:, :1], x[:, :1], True)


def test_rope_turns_pairs_and_its_gradient_turns_back() -> None:
    x = mt.randn(2, 5, 3, 8, dtype=mt.float64).requires_grad_()
    cos, sin = nn.RotaryAngles(8, theta=100.0).at(2, 5)
    y = mt.rope(x, cos.double(), sin.double())
    angles = np.outer(np.arange(2, 7), [100.0 ** (-2 * i / 8) for i in range(4)])
    pair = (x.detach().numpy()[..., :4] + 1j * x.detach().numpy()[..., 4:]) * np.exp(1j * angles)[:, None]
    np.testing.assert_allclose(y.detach().numpy(), np.concatenate([pair.real, pair.imag], -1), atol=1e-6)
    g = mt.randn(2, 5, 3, 8, dtype=mt.float64)
    y.backward(g)
    back = mt.rope(g, cos.double(), -sin.double())
    np.testing.assert_allclose(x.grad.numpy(), back.numpy(), atol=1e-12)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (7, 6)),
        ({"stride": 2, "padding": 1}, (7, 6)),
        ({"dilation": (1, 2), "padding": (0, 2)}, (7, 6)),
        ({"groups": 2, "bias": False}, (5, 5)),
    ],
)
def test_convolutions_equal_torchs(options: dict[str, object], size: tuple[int, int]) -> None:
    theirs = torch.nn.Conv2d(4, 6, 3, **options).double()
    ours = nn.Conv2d(4, 6, 3, **options, dtype=mt.float64)
    ours.load_state_dict({k: mt.from_dlpack(v.detach()) for k, v in theirs.state_dict().items()})
    p = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    x = mt.from_dlpack(p.detach()).requires_grad_()
    want, got = theirs(p), ours(x)
    torch.testing.assert_close(as_torch(got), want.detach())
    want.square().sum().backward()
    mt.square(got).sum().backward()
    torch.testing.assert_close(as_torch(x.grad), p.grad)
    torch.testing.assert_close(as_torch(ours.weight.grad), theirs.weight.grad)
    line = nn.Conv1d(4, 2, 3, padding=1)
    assert line(mt.zeros(5, 4, 9)).shape == (5, 2, 9)


def test_checkpointing_changes_no_gradient_and_draws_the_same_numbers() -> None:
    net = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Dropout(0.3), nn.Linear(9, 4))
    x = mt.randn(5, 6)

    def run(wrapped: bool) -> tuple[list[float], list[list[float]]]:
        mt.manual_seed(3)
        net.zero_grad()
        given = x.clone().requires_grad_()
        out = mt.checkpoint(net, given) if wrapped else net(given)
        mt.square(out).sum().backward()
        return given.grad.flatten().tolist(), [p.grad.flatten().tolist() for p in net.parameters()]

    assert run(True) == run(False)
    with pytest.raises(mt.AutogradError, match="no argument requires a gradient"):
        mt.checkpoint(net, x)


def test_a_recorded_function_of_python_takes_part_in_the_tape() -> None:
    x = mt.tensor([1.0, 2.0], requires_grad=True)
    y = mt.record(mt.square(x.detach()), [x], lambda g: [g * x * 2])
    (y * 3.0).sum().backward()
    assert x.grad.tolist() == [6, 12]
    bad = mt.record(mt.ones(2), [x], lambda g: [])
    with pytest.raises(mt.AutogradError, match="0 gradients for 1 inputs"):
        bad.sum().backward()


def test_muons_update_is_orthogonal_and_learns() -> None:
    g = mt.randn(12, 5, dtype=mt.float64)
    singular = np.linalg.svd(optim.orthogonalise(g).numpy(), compute_uv=False)
    assert 0.6 < singular.min() <= singular.max() < 1.3
    w = nn.Parameter(mt.zeros(4, 4))
    target = mt.randn(4, 4)
    muon = optim.Muon([w], lr=0.1, weight_decay=0.0)
    losses = []
    for _ in range(60):
        muon.zero_grad()
        loss = mt.square(w - target).mean()
        loss.backward()
        muon.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    with pytest.raises(mt.ValueOutOfRangeError, match="matrices"):
        optim.Muon([nn.Parameter(mt.zeros(3))])


def test_schedules_rise_and_fall() -> None:
    factors = {
        "constant": schedule.constant(4),
        "linear": schedule.linear(10, 4, 0.1),
        "cosine": schedule.cosine(10, 4, 0.1),
        "wsd": schedule.warmup_stable_decay(10, 4, 3, 0.1),
    }
    for name, factor in factors.items():
        assert [factor(i) for i in range(4)] == [0.25, 0.5, 0.75, 1.0], name
    assert factors["linear"](10) == pytest.approx(0.1)
    assert factors["cosine"](7) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert factors["wsd"](6) == 1.0
    assert factors["wsd"](10) == pytest.approx(0.1)
    sgd = optim.SGD([nn.Parameter(mt.zeros(1))], lr=2.0)
    scheduler = schedule.Scheduler(sgd, factors["linear"])
    assert sgd.lr == 0.5
    scheduler.step()
    assert sgd.lr == 1.0
    with pytest.raises(mt.ValueOutOfRangeError):
        schedule.linear(3, 4)


def test_safetensors_go_out_and_come_back(tmp_path: Path) -> None:
    tensors = {
        "a": mt.randn(3, 4),
        "b": mt.randn(2, 5).bfloat16(),
        "c": mt.arange(7).half(),
        "d": mt.tensor([True, False]),
        "e": mt.zeros(0, 3),
        "f": mt.tensor(2.5, dtype=mt.float64),
        "g": mt.arange(6).reshape(2, 3).T,
    }
    mt.save_file(tensors, tmp_path)
    back = mt.load_file(tmp_path)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
        assert back[name].tolist() == tensor.tolist()
    back["a"].zero_()  # private pages: the file stays
    assert mt.load_file(tmp_path)["a"].tolist() == tensors["a"].tolist()
    from safetensors.torch import load_file

    assert load_file(tmp_path / "model.safetensors")["b"].tolist() == tensors["b"].tolist()
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
    with pytest.raises(CheckpointError):
        mt.load_file(tmp_path)
    del back


def test_a_cache_gives_the_logits_of_the_whole_text() -> None:
    angles = nn.RotaryAngles(4)
    block = nn.TransformerBlock(16, 24, 4, 2, 4, angles=angles)
    x = mt.randn(2, 7, 16)
    with mt.no_grad():
        whole = block(x)
        cache = nn.KeyValueCache(2, 8, 2, 4)
        parts = [block(x[:, :3], cache), *(block(x[:, i : i + 1], cache) for i in range(3, 7))]
        np.testing.assert_allclose(mt.cat(parts, 1).numpy(), whole.numpy(), rtol=1e-4, atol=1e-5)
        with pytest.raises(mt.ShapeError, match="do not fit"):
            block(x[:, :2], cache)
