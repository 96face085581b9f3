"""The gated MLP calls one operation for its first product and gate, or two with the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mainspring import ops
from mainspring.formats.model_config import ModelConfig
from mainspring.model.layers import Mlp
from mainspring.ops.policy import LOCKSTEP


@pytest.fixture
def mlp() -> Mlp:
    torch.manual_seed(0)
    config = ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=11, hidden_size=24, intermediate_size=40, num_layers=1, num_heads=2,
        num_kv_heads=1, head_dim=12, max_position_embeddings=64, mlp_bias=True,
    )  # fmt: skip
    mlp = Mlp(config, LOCKSTEP, None, torch.float32)
    for parameter in mlp.parameters():
        nn.init.normal_(parameter)
    return mlp


def gradients(mlp: Mlp, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(mlp(x).square().sum(), list(mlp.parameters())))


def test_a_watched_projection_is_called_and_gives_the_same_bits(mlp: Mlp) -> None:
    x = torch.randn(7, 24)
    out, expected_gradients = mlp(x), gradients(mlp, x)
    seen: list[Tensor] = []
    mlp.gate_up.register_forward_hook(lambda module, args, y: seen.append(y.detach()))
    assert torch.equal(mlp(x), out)
    assert len(seen) == 1
    assert torch.equal(
        ops.swiglu(seen[0], policy=LOCKSTEP), ops.linear_swiglu(x, mlp.gate_up.weight, mlp.gate_up.bias)
    )
    for gradient, expected in zip(gradients(mlp, x), expected_gradients, strict=True):
        assert torch.equal(gradient, expected)


def test_every_kind_of_hook_and_a_module_in_its_place_are_called(mlp: Mlp) -> None:
    calls: list[str] = []
    removable = mlp.gate_up.register_forward_pre_hook(lambda module, args: calls.append("before"))
    mlp(torch.randn(3, 24))
    removable.remove()
    mlp.gate_up.register_full_backward_hook(lambda module, into, out: calls.append("backward"))
    mlp(torch.randn(3, 24, requires_grad=True)).sum().backward()

    class Twice(type(mlp.gate_up)):  # a class made of a module's own
        def forward(self, x: Tensor) -> Tensor:
            calls.append("twin")
            return 2 * super().forward(x)

    del mlp.gate_up._backward_hooks[next(iter(mlp.gate_up._backward_hooks))]
    mlp.gate_up.__class__ = Twice
    mlp(torch.randn(3, 24))
    assert calls == ["before", "backward", "twin"]
