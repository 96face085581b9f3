"""A whole decoder that sums as tensor-parallel ranks do whose sums do not depend on their number (`tp_invariant`).

Under tensor parallelism a layer's second products, behind attention and in the MLP, are cut along K. With
`Layout.tp_invariant` their terms are joined by one tree, of which a rank owns a subtree (`ops.linear_tp_invariant`).
An engine of this model computes the whole tree, so its log-probabilities are those of a trainer at any degree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mainspring import ops
from mainspring.errors import ConfigError
from mainspring.formats.model_config import ModelConfig
from mainspring.model.decoder import Decoder
from mainspring.model.layers import DecoderLayer, Linear, Mlp
from mainspring.ops import Policy


class InvariantLinear(Linear):
    """`Linear` whose sum along K is the tree of eight segments. Takes another's parameters over."""

    def __init__(self, other: Linear) -> None:
        rows, columns = other.weight.shape
        super().__init__(columns, rows, other.bias is not None, other.policy, "meta", other.weight.dtype)
        self.weight, self.bias, self.name = other.weight, other.bias, other.name

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear_tp_invariant(x, self.weight, self.bias, policy=self.policy)


class InvariantDecoder(Decoder):
    """Raises ConfigError for experts, whose slices each rank rounds."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        policy: Policy,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(config, policy=policy, device=device, dtype=dtype)
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)  # what a decoder is made of
            if not isinstance(layer.mlp, Mlp):
                raise ConfigError("tp_invariant is not promised of experts, whose slices each rank rounds")
            layer.attention.output = InvariantLinear(layer.attention.output)
            layer.mlp.down = InvariantLinear(layer.mlp.down)
