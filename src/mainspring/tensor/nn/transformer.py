"""Rotary multi-head attention with a cache of keys and values, and the transformer block of Llama."""

from __future__ import annotations

from collections.abc import Sequence

from mainspring.tensor import _tensor as mt
from mainspring.tensor._tensor import Generator, ShapeError, Tensor, dtype
from mainspring.tensor.nn.layers import Linear, RMSNorm, SwiGLU
from mainspring.tensor.nn.module import Module


class RotaryAngles:
    """cos and sin of position times frequency, [length, dim / 2] in float32, grown when a longer text comes.

    `frequencies` are dim / 2 numbers: by default theta^(-2 i / dim) (Su et al., "RoFormer", 2021, eq. 15).
    """

    def __init__(
        self, dim: int, theta: float = 10000.0, frequencies: Sequence[float] | None = None, scale: float = 1.0
    ) -> None:
        given = frequencies if frequencies is not None else [theta ** (-2 * i / dim) for i in range(dim // 2)]
        self._frequencies = mt.tensor(list(given), dtype=mt.float64)
        self._scale = scale
        self._tables = (mt.zeros(0, dim // 2), mt.zeros(0, dim // 2))

    def at(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin for the positions start .. start + length, each [length, dim / 2]."""
        end = start + length
        if self._tables[0].shape[0] < end:
            grown = max(end, 2 * self._tables[0].shape[0], 64)
            # float32 angles as the reference implementations have them: position times float32 frequency.
            positions = mt.arange(grown, dtype=mt.float32)
            angles = mt.outer(positions, self._frequencies.float())
            self._tables = (mt.cos(angles) * self._scale, mt.sin(angles) * self._scale)
        cos, sin = self._tables
        return cos[start:end], sin[start:end]


class KeyValueCache:
    """Keys and values of one layer, [batch, capacity, groups, dim], of which `length` are filled."""

    def __init__(self, batch: int, capacity: int, groups: int, dim: int, kind: dtype = mt.float32) -> None:
        self._keys = mt.zeros(batch, capacity, groups, dim, dtype=kind)
        self._values = mt.zeros(batch, capacity, groups, dim, dtype=kind)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds k and v [batch, T, groups, dim]; returns all filled keys and values.

        Raises:
            ShapeError: the cache is full.
        """
        end = self.length + k.shape[1]
        if end > self._keys.shape[1]:
            raise ShapeError(f"{end} keys do not fit into a cache for {self._keys.shape[1]}")
        self._keys[:, self.length : end] = k.detach()
        self._values[:, self.length : end] = v.detach()
        self.length = end
        return self._keys[:, :end], self._values[:, :end]


class MultiHeadAttention(Module):
    """Causal self-attention with rotary positions and grouped keys: [B, T, hidden] to [B, T, hidden].

    With `angles` None there is no rotation. The projections q, k and v lie in one weight, in that order.
    """

    def __init__(
        self,
        hidden: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        angles: RotaryAngles | None = None,
        qkv_bias: bool = False,
        output_bias: bool = False,
        causal: bool = True,
        dtype: dtype = mt.float32,
        generator: Generator | None = None,
        initialise: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_dim = head_dim or hidden // num_heads
        if self.num_heads % self.num_kv_heads:
            raise ShapeError(f"{self.num_heads} heads do not share {self.num_kv_heads} heads of keys evenly")
        self.angles, self.causal = angles, causal
        rows = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv = Linear(
            hidden, rows, bias=qkv_bias, dtype=dtype, generator=generator, initialise=initialise
        )
        width = self.num_heads * self.head_dim
        self.output = Linear(
            width, hidden, bias=output_bias, dtype=dtype, generator=generator, initialise=initialise
        )

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        batch, length = x.shape[0], x.shape[1]
        heads, groups, dim = self.num_heads, self.num_kv_heads, self.head_dim
        joined = self.qkv(x).reshape(batch, length, heads + 2 * groups, dim)
        rotated = heads + groups  # queries and keys turn alike
        if self.angles is not None:
            cos, sin = self.angles.at(cache.length if cache else 0, length)
            qk = mt.rope(joined[:, :, :rotated], cos, sin)
        else:
            qk = joined[:, :, :rotated]
        q, k, v = qk[:, :, :heads], qk[:, :, heads:], joined[:, :, rotated:]
        if cache is not None:
            k, v = cache.append(k, v)
        out = mt.attention(q, k, v, self.causal)
        projected: Tensor = self.output(out.reshape(batch, length, heads * dim))
        return projected

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, causal={self.causal}"


class TransformerBlock(Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (Touvron et al., "LLaMA", 2023)."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        angles: RotaryAngles | None = None,
        eps: float = 1e-6,
        qkv_bias: bool = False,
        output_bias: bool = False,
        dtype: dtype = mt.float32,
        generator: Generator | None = None,
        initialise: bool = True,
    ) -> None:
        super().__init__()
        self.input_norm = RMSNorm(hidden, eps, dtype=dtype)
        self.attention = MultiHeadAttention(
            hidden,
            num_heads,
            num_kv_heads,
            head_dim,
            angles=angles,
            qkv_bias=qkv_bias,
            output_bias=output_bias,
            dtype=dtype,
            generator=generator,
            initialise=initialise,
        )
        self.post_attention_norm = RMSNorm(hidden, eps, dtype=dtype)
        self.mlp = SwiGLU(hidden, intermediate, dtype=dtype, generator=generator, initialise=initialise)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        x = x + self.attention(self.input_norm(x), cache)
        x = x + self.mlp(self.post_attention_norm(x))
        return x
