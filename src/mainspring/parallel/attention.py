"""The twin of `Attention` under context parallelism: the same projections around a ring or an exchange of heads."""

from __future__ import annotations

from torch import Tensor, nn

from mainspring import ops
from mainspring.model.layers import Attention
from mainspring.ops import HeadNorms, RopeAngles, TokenBatch
from mainspring.parallel.context import ContextBatch
from mainspring.parallel.layout import ContextMethod
from mainspring.parallel.mesh import Group
from mainspring.parallel.ring import ring_attention
from mainspring.parallel.ulysses import ulysses_attention


class ContextAttention(nn.Module):
    """x: [T, hidden] of the rank's tokens -> [T, hidden]."""

    def __init__(self, attention: Attention, group: Group, method: ContextMethod) -> None:
        super().__init__()
        self.group, self.method = group, method
        self.layer, self.policy = attention.layer, attention.policy
        self.num_heads, self.num_kv_heads = attention.num_heads, attention.num_kv_heads
        self.head_dim, self.window, self.scale = attention.head_dim, attention.window, attention.scale
        self.qkv, self.output = attention.qkv, attention.output
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm

    def forward(self, x: Tensor, batch: TokenBatch, angles: RopeAngles) -> Tensor:
        attended: Tensor = self.output(self.attend(self.qkv(x), batch, angles))
        return attended

    def attend(self, qkv: Tensor, batch: TokenBatch, angles: RopeAngles) -> Tensor:
        """What lies between the two projections, as `Attention.attend`. All ranks of the group call it together."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        split = qkv.unflatten(-1, (heads + 2 * kv_heads, self.head_dim))
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            norms = HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        q, k, v = ops.qkv_heads(split, heads, kv_heads, norms, angles, policy=self.policy)
        assert isinstance(batch, ContextBatch)  # `ParallelDecoder.batch` makes one under cp
        if self.method == "ring":
            out = ring_attention(q, k, v, batch, self.group, self.scale, self.window)
        else:
            out = ulysses_attention(
                q, k, v, batch, self.group, layer=self.layer, scale=self.scale, window=self.window,
                policy=self.policy,
            )  # fmt: skip
        return out.flatten(1)
