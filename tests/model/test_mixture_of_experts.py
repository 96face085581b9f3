"""The mixture of experts is its formula, and a token's output its own: whatever stands beside it, with gradients or
without."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mainspring.formats.model_config import ModelConfig
from mainspring.model.layers import MixtureOfExperts
from mainspring.ops import Policy
from mainspring.ops.cpu.extension import unavailable_reason

# Plain dictionaries: the GPU's tests run where transformers is not installed.
SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
}  # fmt: skip
FAMILIES = {
    "mixtral": {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3-moe": {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8,
        "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 16, "norm_topk_prob": False,
    },
}  # fmt: skip
CONFIGS = {name: ModelConfig.from_dict(SIZES | family) for name, family in FAMILIES.items()}
WIDTH = 48
PLACES = [
    pytest.param("cpu", "reference", id="cpu-reference"),
    pytest.param(
        "cpu",
        "cpu",
        id="cpu-kernels",
        marks=pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason())),
    ),
    pytest.param("cuda", None, id="cuda", marks=pytest.mark.gpu),
    pytest.param("cuda", "triton", id="cuda-triton", marks=pytest.mark.gpu),
]


def block_of(
    family: str, dtype: torch.dtype, device: str = "cpu", policy: Policy | None = None
) -> MixtureOfExperts:
    block = MixtureOfExperts(CONFIGS[family], policy or Policy(backend="reference"), device, dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return block


def tokens_of(count: int, seed: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, WIDTH, generator=generator).to(device, dtype)


def formula(block: MixtureOfExperts, x: Tensor) -> Tensor:
    """Every expert on every token, weighted; experts that were not chosen weigh nothing."""
    probabilities = torch.softmax(F.linear(x, block.router.weight), -1)
    chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(block.top_k).indices, 1.0)
    weights = probabilities * chosen
    if block.normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    gate, up = torch.einsum("th,enh->ten", x, block.gate_up).chunk(2, -1)
    return torch.einsum("te,ten,ehn->th", weights, F.silu(gate) * up, block.down)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_block_and_its_gradients_are_those_of_the_formula(family: str) -> None:
    block = block_of(family, torch.float64)
    x = tokens_of(13, 1, torch.float64).requires_grad_()
    inputs = [x, *block.parameters()]
    upstream = tokens_of(13, 2, torch.float64)
    got, expected = block(x), formula(block, x)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("device", "backend"), PLACES)
@pytest.mark.parametrize("family", CONFIGS)
@settings(max_examples=5, deadline=None)
@given(count=st.integers(1, 90), data=st.data())
def test_a_token_has_the_same_bits_in_every_batch_and_while_gradients_are_recorded(
    family: str, device: str, backend: str | None, dtype: torch.dtype, count: int, data: st.DataObject
) -> None:
    block = block_of(family, dtype, device, Policy(backend=backend))
    x = tokens_of(count, data.draw(st.integers(0, 99), "seed"), dtype, device)
    recorded = block(x)
    assert recorded.requires_grad
    order = torch.tensor(data.draw(st.permutations(range(count)), "order"))
    cut = data.draw(st.integers(0, count), "cut")
    with torch.no_grad():
        assert torch.equal(block(x), recorded)
        for part in (order[:cut], order[cut:], order[:1]):  # of which one may be empty
            assert torch.equal(block(x[part]), recorded[part])


@pytest.mark.gpu
@pytest.mark.parametrize("numerics", ["lockstep", "fast"])
@pytest.mark.parametrize("family", CONFIGS)
def test_nothing_waits_for_the_device(family: str, numerics: str) -> None:
    block = block_of(family, torch.bfloat16, "cuda", Policy("fast" if numerics == "fast" else "lockstep"))
    x = tokens_of(64, 0, torch.bfloat16, "cuda").requires_grad_()
    block(x).sum().backward()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        block(x).sum().backward()
        with torch.no_grad():
            block(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
