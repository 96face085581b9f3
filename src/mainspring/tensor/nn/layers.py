"""The layers. Weights are initialised as PyTorch's are; shapes and names of parameters are the same."""

from __future__ import annotations

import math

from mainspring.tensor import _tensor as mt
from mainspring.tensor._tensor import Generator, Parameter, Tensor, dtype
from mainspring.tensor.nn.module import Module


def _uniform(
    shape: tuple[int, ...], bound: float, kind: dtype, generator: Generator | None, initialise: bool = True
) -> Parameter:
    if not initialise:  # about to be loaded
        return Parameter(mt.empty(shape, dtype=kind))
    return Parameter(((mt.rand(shape, generator=generator) * 2.0 - 1.0) * bound).to(kind))


class Linear(Module):
    """x [..., in_features] to x weightᵀ + bias [..., out_features]; weight: [out_features, in_features].

    Here and elsewhere `initialise=False` leaves the weights undefined, to be loaded.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: dtype = mt.float32,
        generator: Generator | None = None,
        initialise: bool = True,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        bound = 1 / math.sqrt(in_features) if in_features else 0.0
        self.weight = _uniform((out_features, in_features), bound, dtype, generator, initialise)
        self.bias = _uniform((out_features,), bound, dtype, generator, initialise) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return mt.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Embedding(Module):
    """Indices [...] to rows of weight [num_embeddings, embedding_dim]: [..., embedding_dim]."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        dtype: dtype = mt.float32,
        generator: Generator | None = None,
        initialise: bool = True,
    ) -> None:
        super().__init__()
        shape = (num_embeddings, embedding_dim)
        normal = (
            mt.randn(shape, generator=generator).to(dtype) if initialise else mt.empty(shape, dtype=dtype)
        )
        self.weight = Parameter(normal)

    def forward(self, index: Tensor) -> Tensor:
        return mt.embedding(index, self.weight)

    def extra_repr(self) -> str:
        return ", ".join(str(n) for n in self.weight.shape)


class LayerNorm(Module):
    """Normalises the last dimension to mean 0 and variance 1, then scales and shifts it."""

    def __init__(
        self, normalized_shape: int, eps: float = 1e-5, bias: bool = True, *, dtype: dtype = mt.float32
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = Parameter(mt.ones(normalized_shape, dtype=dtype))
        self.bias = Parameter(mt.zeros(normalized_shape, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return mt.layer_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class RMSNorm(Module):
    """Divides the last dimension by its root mean square, then scales it."""

    def __init__(self, normalized_shape: int, eps: float = 1e-6, *, dtype: dtype = mt.float32) -> None:
        super().__init__()
        self.eps = eps
        self.weight = Parameter(mt.ones(normalized_shape, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return mt.rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class Dropout(Module):
    """In training, zeroes elements with probability p and scales the others by 1 / (1 - p)."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return mt.dropout(x, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class SwiGLU(Module):
    """silu(gate(x)) * up(x), then down: [..., hidden] to [..., hidden], with `intermediate` in between."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        *,
        dtype: dtype = mt.float32,
        generator: Generator | None = None,
        initialise: bool = True,
    ) -> None:
        super().__init__()

        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(
                inputs, outputs, bias=False, dtype=dtype, generator=generator, initialise=initialise
            )

        self.gate, self.up = linear(hidden, intermediate), linear(hidden, intermediate)
        self.down = linear(intermediate, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return mt.linear(mt.swiglu(self.gate(x), self.up(x)), self.down.weight)


class ReLU(Module):
    def forward(self, x: Tensor) -> Tensor:
        return mt.relu(x)


class SiLU(Module):
    def forward(self, x: Tensor) -> Tensor:
        return mt.silu(x)


class GELU(Module):
    """approximate: "none" (with erf) or "tanh"."""

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return mt.gelu(x, self.approximate)


class Tanh(Module):
    def forward(self, x: Tensor) -> Tensor:
        return mt.tanh(x)


class CrossEntropyLoss(Module):
    """Logits [N, C] and targets [N] (int64) to the mean, the sum, or [N] losses."""

    def __init__(
        self, ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return mt.cross_entropy(logits, target, self.ignore_index, self.reduction, self.label_smoothing)
