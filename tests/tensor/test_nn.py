"""Modules and optimizers: names, state, and the same training as PyTorch's."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import mainspring.tensor as mt
from mainspring.tensor import nn, optim, stub
from tensor.cases import as_torch


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.RMSNorm(8)
        self.blocks = nn.ModuleList(
            [nn.SwiGLU(8, 12), nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())]
        )
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", mt.full((), 0.5))

    def forward(self, index: mt.Tensor) -> mt.Tensor:
        x = self.embed(index)
        for block in self.blocks:
            x = x + block(self.norm(x)) * self.scale
        return self.head(x)


def test_parameters_have_dotted_names_and_count_once() -> None:
    net = Net()
    assert [name for name, _ in net.named_parameters()] == [
        "embed.weight", "norm.weight", "blocks.0.gate.weight", "blocks.0.up.weight", "blocks.0.down.weight",
        "blocks.1.0.weight", "blocks.1.0.bias", "blocks.1.1.weight", "blocks.1.1.bias",
    ]  # fmt: skip
    assert {"head.weight", "scale"} <= net.state_dict().keys()
    assert all(p.requires_grad for p in net.parameters())
    net.eval()
    assert not any(m.training for m in net.modules())
    assert "(embed): Embedding(11, 8)" in repr(net)
    net.head.weight = None
    assert "head.weight" not in net.state_dict()


def test_state_is_copied_in_or_refused_whole() -> None:
    a, b = Net(), Net()
    index = mt.tensor([1, 2, 3])
    before = b(index).tolist()
    bad = a.state_dict()
    bad["norm.weight"] = mt.ones(9)
    with pytest.raises(mt.ShapeError, match=r"norm.weight has shape \(9,\)"):
        b.load_state_dict(bad)
    del bad["norm.weight"]
    with pytest.raises(mt.ShapeError, match=r"missing \['norm.weight'\]"):
        b.load_state_dict(bad)
    assert b(index).tolist() == before
    b.load_state_dict(a.state_dict())
    assert b(index).tolist() == a(index).tolist()
    b.load_state_dict({"scale": mt.zeros(())}, strict=False)
    assert a.state_dict()["scale"].item() == 0.5


def test_a_module_converts_to_bfloat16_and_keeps_tied_weights() -> None:
    net = Net().to(mt.bfloat16)
    assert net.head.weight is net.embed.weight
    out = net(mt.tensor([[1, 2]]))
    assert (out.dtype, out.shape) == (mt.bfloat16, (1, 2, 11))


def test_a_layer_set_too_early_says_what_to_call() -> None:
    class Early(nn.Module):
        def __init__(self) -> None:
            self.layer = nn.ReLU()

    with pytest.raises(AttributeError, match=r"super\(\).__init__"):
        Early()


OPTIMIZERS: list[
    tuple[Callable[..., optim.Optimizer], Callable[..., torch.optim.Optimizer], dict[str, object]]
] = [
    (optim.SGD, torch.optim.SGD, {"lr": 0.1}),
    (optim.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    (optim.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    (optim.Adam, torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    (optim.AdamW, torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.2}),
]


@pytest.mark.parametrize("kind", ["float32", "float64"])
@pytest.mark.parametrize(("ours", "theirs", "options"), OPTIMIZERS)
def test_training_follows_torch_step_by_step(
    ours: Callable[..., optim.Optimizer],
    theirs: Callable[..., torch.optim.Optimizer],
    options: dict[str, object],
    kind: str,
) -> None:
    torch.manual_seed(0)
    reference = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 4))
    reference = reference.to(getattr(torch, kind))
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).to(getattr(mt, kind))
    net.load_state_dict({k: mt.from_dlpack(v.detach()) for k, v in reference.state_dict().items()})
    x = torch.randn(6, 5, dtype=getattr(torch, kind))
    y = torch.randint(0, 4, (6,))
    mine, peer = ours(net.parameters(), **options), theirs(reference.parameters(), **options)
    for _ in range(6):
        mine.zero_grad()
        loss = mt.cross_entropy(net(mt.from_dlpack(x)), mt.from_dlpack(y))
        loss.backward()
        norm = optim.clip_grad_norm_(net.parameters(), 0.5)
        mine.step()
        peer.zero_grad()
        torch.nn.functional.cross_entropy(reference(x), y).backward()
        assert norm == pytest.approx(
            torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5).item(), rel=1e-5
        )
        peer.step()
    tolerance = 2e-5 if kind == "float32" else 1e-12
    for a, b in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(as_torch(a), b.detach(), rtol=tolerance, atol=tolerance)


def test_an_optimizer_continues_from_its_state() -> None:
    def run(steps: int, net: nn.Module, state: dict[str, object] | None) -> dict[str, object]:
        optimizer = optim.AdamW(net.parameters(), lr=0.05)
        if state is not None:
            optimizer.load_state_dict(state)
        for _ in range(steps):
            optimizer.zero_grad()
            mt.square(net(mt.ones(2, 3))).sum().backward()
            optimizer.step()
        return optimizer.state_dict()

    straight, cut = nn.Linear(3, 2), nn.Linear(3, 2)
    cut.load_state_dict(straight.state_dict())
    run(5, straight, None)
    run(2, cut, run(3, cut, None))
    assert cut.weight.tolist() == straight.weight.tolist()
    with pytest.raises(mt.ValueOutOfRangeError, match="same kind"):
        optim.SGD(cut.parameters()).load_state_dict(optim.AdamW(cut.parameters()).state_dict())
    with pytest.raises(mt.ValueOutOfRangeError, match="lr is -1"):
        optim.SGD(cut.parameters(), lr=-1)


def test_a_bfloat16_parameter_learns_with_float32_moments() -> None:
    p = nn.Parameter(mt.ones(3, dtype=mt.bfloat16))
    optimizer = optim.AdamW([p], lr=0.25, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        (p.float() * mt.tensor([1.0, -1.0, 0.0])).sum().backward()
        assert p.grad.dtype == mt.bfloat16
        optimizer.step()
    np.testing.assert_allclose(p.float().tolist(), [0.25, 1.75, 1.0], atol=0.02)


def test_the_stub_is_the_one_that_the_extension_describes() -> None:
    file = Path(mt.__file__).with_name("_tensor.pyi")
    assert ast.dump(ast.parse(file.read_text())) == ast.dump(ast.parse(stub.text()))
    named = {
        node.name
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    from mainspring.tensor import _tensor

    assert {n for n in dir(_tensor) if callable(getattr(_tensor, n)) and not n.startswith("__")} == named
