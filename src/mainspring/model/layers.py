"""The parts of a decoder layer: attention, gated MLP, mixture of experts. No collective and no rank in here.

QKV and gate/up are stored fused; `naming.py` says which rows carry which Hugging Face name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mainspring import ops
from mainspring.formats.model_config import ModelConfig
from mainspring.ops import HeadNorms, Policy, RopeAngles, Routing, TokenBatch, library
from mainspring.ops.batch import LinearAdapters
from mainspring.ops.precision import accumulator
from mainspring.ops.quantised_linear import QuantisedWeight


class Linear(nn.Module):
    """y = x Wᵀ + b through `ops.linear`; weight: [out_features, in_features]. `name` is its path in the decoder."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        policy: Policy,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.name = ""
        self.policy = policy
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.quantised: QuantisedWeight | None = None  # there instead of `weight` in a quantised model
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, in_features] -> [T, out_features]."""
        weight = self.weight if self.quantised is None else self.quantised
        return ops.linear(x, weight, self.bias, policy=self.policy)

    @property
    def may_be_fused(self) -> bool:
        """Whether an operation that multiplies by the weight itself may stand for a call: nobody watches the module."""
        watched = (
            self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        )
        return type(self) is Linear and self.quantised is None and not watched


def adapted(layer: Linear, x: Tensor, adapters: LinearAdapters | None) -> Tensor:
    """layer(x) and what the tokens' LoRA adapters add to it, if there are any."""
    y: Tensor = layer(x)
    return y if adapters is None else adapters.add(layer.name, x, y)


class RmsNorm(nn.Module):
    """Root-mean-square norm with a learned scale; `add` fuses the residual addition that precedes it."""

    def __init__(
        self, size: int, eps: float, policy: Policy, device: torch.device | str | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.eps = eps
        self.policy = policy
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., size] -> [..., size]."""
        return ops.rms_norm(x, self.weight, self.eps, policy=self.policy)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual); all [T, size]."""
        return ops.add_rms_norm(x, residual, self.weight, self.eps, policy=self.policy)


class Attention(nn.Module):
    """Grouped-query attention with rotary embedding; optionally q/k norms, biases and a sliding window."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        policy: Policy,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.policy = policy
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self.window = config.sliding_windows[layer]
        self.scale = config.head_dim**-0.5
        rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = Linear(config.hidden_size, rows, config.qkv_bias, policy, device, dtype)
        self.output = Linear(
            config.num_heads * config.head_dim, config.hidden_size, config.output_bias, policy, device, dtype
        )
        norm = (config.head_dim, config.rms_norm_eps, policy, device, dtype)
        self.q_norm = RmsNorm(*norm) if config.qk_norm else None
        self.k_norm = RmsNorm(*norm) if config.qk_norm else None

    def forward(self, x: Tensor, batch: TokenBatch, angles: RopeAngles) -> Tensor:
        """x: [T, hidden] -> [T, hidden]."""
        qkv = adapted(self.qkv, x, batch.adapters)
        if batch.cache is None or library.is_traced():
            return adapted(self.output, self.attend(qkv, batch, angles), batch.adapters)
        q, k, v = self._heads(qkv)
        q = ops.norm_rope_write_cache(
            q, k, v, self.head_norms(), angles, batch, layer=self.layer, policy=self.policy
        )
        out = ops.attention(
            q, None, None, batch, layer=self.layer, scale=self.scale, window=self.window, policy=self.policy
        )
        return adapted(self.output, out.flatten(1), batch.adapters)

    def attend(self, qkv: Tensor, batch: TokenBatch, angles: RopeAngles) -> Tensor:
        """What lies between the two projections. qkv: [T, (H + 2 · Hkv) · D] -> [T, H · D]."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        split = qkv.unflatten(-1, (heads + 2 * kv_heads, self.head_dim))
        q, k, v = ops.qkv_heads(split, heads, kv_heads, self.head_norms(), angles, policy=self.policy)
        out = ops.attention(
            q, k, v, batch, layer=self.layer, scale=self.scale, window=self.window, policy=self.policy
        )
        return out.flatten(1)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q: [T, H, D], k and v: [T, Hkv, D], views of one tensor."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        q, k, v = qkv.unflatten(-1, (heads + 2 * kv_heads, self.head_dim)).split(
            (heads, kv_heads, kv_heads), dim=1
        )
        return q, k, v

    def head_norms(self) -> HeadNorms | None:
        """The norms of queries' and keys' heads, if the family has them."""
        if self.q_norm is None or self.k_norm is None:
            return None
        return HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)


class Mlp(nn.Module):
    """down(silu(gate x) · up x)."""

    def __init__(
        self, config: ModelConfig, policy: Policy, device: torch.device | str | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.policy = policy
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up = Linear(hidden, 2 * inner, config.mlp_bias, policy, device, dtype)
        self.down = Linear(inner, hidden, config.mlp_bias, policy, device, dtype)

    def forward(self, x: Tensor, adapters: LinearAdapters | None = None) -> Tensor:
        """x: [T, hidden] -> [T, hidden]."""
        gate_up = self.gate_up
        if adapters is None and isinstance(gate_up, Linear) and gate_up.may_be_fused:
            inner = ops.linear_swiglu(x, gate_up.weight, gate_up.bias, policy=self.policy)
        else:
            inner = ops.swiglu(adapted(gate_up, x, adapters), policy=self.policy)
        return adapted(self.down, inner, adapters)


class MixtureOfExperts(nn.Module):
    """Top-k routed gated MLPs (Mixtral, arXiv 2401.04088; Qwen3-MoE, arXiv 2505.09388).

    Each token's expert outputs are added in the order of its own routing, in fp32, never by atomics.
    """

    def __init__(
        self, config: ModelConfig, policy: Policy, device: torch.device | str | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.policy = policy
        self.num_experts = config.num_experts
        self.top_k = config.num_experts_per_token
        self.normalise = config.norm_topk_prob
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self.router = Linear(hidden, config.num_experts, False, policy, device, dtype)
        self.gate_up = nn.Parameter(
            torch.empty(config.num_experts, 2 * inner, hidden, device=device, dtype=dtype)
        )
        self.down = nn.Parameter(torch.empty(config.num_experts, hidden, inner, device=device, dtype=dtype))
        self.observe: Callable[[Routing], None] | None = None  # told of every routing

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, hidden] -> [T, hidden]. Nothing here waits for the device: how many rows an expert has stays there."""
        # Weights in the dtype in which `combine` adds: rounding them first would lose something for nothing.
        weights_dtype = accumulator(x.dtype)
        routing = ops.route(
            self.router(x),
            self.top_k,
            normalise=self.normalise,
            weights_dtype=weights_dtype,
            policy=self.policy,
        )
        if self.observe is not None:
            self.observe(routing)
        gate_up = ops.grouped_linear(x, self.gate_up, routing.offsets, gather=routing, policy=self.policy)
        inner = ops.swiglu(gate_up, policy=self.policy)
        rows = ops.grouped_linear(inner, self.down, routing.offsets, policy=self.policy)
        return ops.combine(rows, routing, policy=self.policy)


class DecoderLayer(nn.Module):
    """Pre-norm residual layer. The last addition of each layer is left to the next norm, which fuses it."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        policy: Policy,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        norm = (config.hidden_size, config.rms_norm_eps, policy, device, dtype)
        self.input_norm = RmsNorm(*norm)
        self.attention = Attention(config, layer, policy, device, dtype)
        self.post_attention_norm = RmsNorm(*norm)
        mlp = MixtureOfExperts if config.moe_layers[layer] else Mlp
        self.mlp = mlp(config, policy, device, dtype)

    def forward(
        self, update: Tensor | None, residual: Tensor, batch: TokenBatch, angles: RopeAngles
    ) -> tuple[Tensor, Tensor]:
        """(update, residual) -> the same of the next layer; the stream's value is update + residual, [T, hidden]."""
        if update is None:
            x = self.input_norm(residual)
        else:
            x, residual = self.input_norm.add(update, residual)
        x, residual = self.post_attention_norm.add(self.attention(x, batch, angles), residual)
        if batch.adapters is not None and isinstance(self.mlp, Mlp):
            return self.mlp(x, batch.adapters), residual
        return self.mlp(x), residual
