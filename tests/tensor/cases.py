"""Every op with the inputs it is tried on, and the PyTorch function that says what is right.

A case calls the same lambda with our namespace and with PyTorch's; PyTorch's differing names are adapted below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import mainspring.tensor as mt

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]


class Torch:
    """PyTorch under our names and signatures."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name, None) or getattr(F, name)

    int64 = torch.int64
    embedding = staticmethod(lambda index, weight: F.embedding(index, weight))
    swiglu = staticmethod(lambda gate, up: F.silu(gate) * up)
    gelu = staticmethod(lambda x, approximate="none": F.gelu(x, approximate=approximate))
    layer_norm = staticmethod(lambda x, w=None, b=None, eps=1e-5: F.layer_norm(x, x.shape[-1:], w, b, eps))
    rms_norm = staticmethod(lambda x, w=None, eps=1e-6: F.rms_norm(x, x.shape[-1:], w, eps))
    amax = staticmethod(lambda x, dim=None, keepdim=False: torch.amax(x, () if dim is None else dim, keepdim))
    amin = staticmethod(lambda x, dim=None, keepdim=False: torch.amin(x, () if dim is None else dim, keepdim))

    @staticmethod
    def logsumexp(x: Any, dim: Any = None, keepdim: bool = False) -> Any:
        return torch.logsumexp(x, tuple(range(x.ndim)) if dim is None else dim, keepdim)

    @staticmethod
    def var(x: Any, dim: Any = None, keepdim: bool = False, correction: float = 1.0) -> Any:
        return torch.var(x, dim, correction=correction, keepdim=keepdim)

    @staticmethod
    def cross_entropy(
        x: Any,
        y: Any,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Any:
        return F.cross_entropy(
            x, y, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )


TORCH = Torch()


@dataclass(frozen=True)
class Case:
    op: str
    call: Callable[..., Any]  # call(namespace, *tensors)
    inputs: Callable[[np.random.Generator, Shape], list[Array]]
    differentiable: bool = True
    least_ndim: int = 0
    smooth: bool = True  # finite differences make sense
    bfloat16: bool = True  # an error bound in bfloat16 makes sense

    def __str__(self) -> str:
        return self.op


def one(rng: np.random.Generator, shape: Shape) -> list[Array]:
    return [rng.standard_normal(shape)]


def positive(rng: np.random.Generator, shape: Shape) -> list[Array]:
    return [rng.uniform(0.3, 3.0, shape)]


def two(rng: np.random.Generator, shape: Shape) -> list[Array]:
    """The second broadcasts against the first."""
    small = tuple(1 if i % 2 else n for i, n in enumerate(shape))
    return [rng.standard_normal(shape), rng.standard_normal(small)]


def two_positive(rng: np.random.Generator, shape: Shape) -> list[Array]:
    return [rng.uniform(0.5, 2.0, shape), rng.uniform(0.5, 2.0, shape[-1:])]


def integers(rng: np.random.Generator, shape: Shape) -> list[Array]:
    return [rng.integers(-9, 9, shape), rng.integers(-9, 9, shape)]


def mask_and_two(rng: np.random.Generator, shape: Shape) -> list[Array]:
    return [rng.random(shape) < 0.5, rng.standard_normal(shape), rng.standard_normal(shape[-1:])]


def norm_inputs(rng: np.random.Generator, shape: Shape) -> list[Array]:
    n = (*shape[:-1], shape[-1] + 2)
    return [rng.standard_normal(n), rng.standard_normal(n[-1]), rng.standard_normal(n[-1])]


def products(rng: np.random.Generator, shape: Shape) -> list[Array]:
    """[..., m, k] and [k, n] for two dimensions, [..., k, n] with a broadcast batch for more."""
    k = shape[-1]
    right = (k, 3) if len(shape) < 3 else (1,) * (len(shape) - 2) + (k, 3)
    return [rng.standard_normal(shape), rng.standard_normal(right)]


def classes(rng: np.random.Generator, shape: Shape) -> list[Array]:
    n, c = max(1, int(np.prod(shape[:-1]))), shape[-1] + 1
    return [rng.standard_normal((n, c)), rng.integers(0, c, n)]


def rows(rng: np.random.Generator, shape: Shape) -> list[Array]:
    return [rng.integers(0, 5, shape), rng.standard_normal((5, 3))]


def picked(rng: np.random.Generator, shape: Shape) -> list[Array]:
    return [rng.standard_normal(shape), rng.integers(0, shape[0], 4)]


def gathered(rng: np.random.Generator, shape: Shape) -> list[Array]:
    return [rng.standard_normal(shape), rng.integers(0, shape[0], (3, *shape[1:]))]


def unary(op: str, inputs: Callable[..., list[Array]] = one, **kwargs: Any) -> Case:
    return Case(op, lambda m, x: getattr(m, op)(x), inputs, **kwargs)


def binary(op: str, inputs: Callable[..., list[Array]] = two, **kwargs: Any) -> Case:
    return Case(op, lambda m, x, y: getattr(m, op)(x, y), inputs, **kwargs)


def both(op: str, call: Callable[..., Any], inputs: Callable[..., list[Array]] = one, **kwargs: Any) -> Case:
    return Case(op, call, inputs, **kwargs)


_KINKED = {"smooth": False}
_CHOICE = {"differentiable": False}

CASES = [
    *(binary(op) for op in ("add", "sub", "mul", "swiglu")),
    binary("div", two_positive),
    binary("pow", two_positive),
    both("pow", lambda m, x: m.pow(x, 2)),
    both("pow", lambda m, x: m.pow(x, 3)),
    both("mul", lambda m, x: 2 * x - x / 4 + 1.5 - (1 - x) * True),
    *(binary(op, **_KINKED) for op in ("maximum", "minimum")),
    *(binary(op, **_CHOICE) for op in ("eq", "ne", "lt", "le", "gt", "ge")),
    *(
        binary(op, integers, **_CHOICE)
        for op in ("bitwise_and", "bitwise_or", "bitwise_xor", "eq", "lt", "add")
    ),
    both("where", lambda m, c, x, y: m.where(c, x, y), mask_and_two),
    both("masked_fill", lambda m, c, x, y: m.masked_fill(x, c, -2.5), mask_and_two),
    *(unary(op) for op in ("neg", "square", "exp", "expm1", "sin", "cos", "tanh", "erf", "sigmoid", "silu")),
    *(unary(op, positive) for op in ("reciprocal", "sqrt", "rsqrt", "log", "log1p")),
    *(unary(op, **_KINKED) for op in ("abs", "relu")),
    *(unary(op, smooth=False, bfloat16=False) for op in ("sign", "floor", "ceil", "round")),
    *(unary(op, **_CHOICE) for op in ("isnan", "logical_not")),
    unary("gelu"),
    both("gelu", lambda m, x: m.gelu(x, "tanh")),
    both("clamp", lambda m, x: m.clamp(x, -0.5, 0.7), **_KINKED),
    both("clamp", lambda m, x: m.clamp(x, min=0.1), **_KINKED),
    *(both(op, lambda m, x, op=op: getattr(m, op)(x)) for op in ("sum", "mean", "logsumexp")),
    *(
        both(op, lambda m, x, op=op: getattr(m, op)(x, 0), least_ndim=1)
        for op in ("sum", "mean", "logsumexp")
    ),
    *(
        both(op, lambda m, x, op=op: getattr(m, op)(x, (-1, 0), keepdim=True), least_ndim=2)
        for op in ("sum", "mean", "logsumexp")
    ),
    *(both(op, lambda m, x, op=op: getattr(m, op)(x, -1), least_ndim=1) for op in ("amax", "amin")),
    *(both(op, lambda m, x, op=op: getattr(m, op)(x)) for op in ("amax", "amin")),
    both("var", lambda m, x: m.var(x, 0, correction=0.0), least_ndim=1, bfloat16=False),
    *(both(op, lambda m, x, op=op: getattr(m, op)(x), **_CHOICE) for op in ("argmax", "argmin")),
    *(
        both(op, lambda m, x, op=op: getattr(m, op)(x, 0, keepdim=True), least_ndim=1, **_CHOICE)
        for op in ("argmax", "argmin")
    ),
    *(both(op, lambda m, x, op=op: getattr(m, op)(x > 0.5), **_CHOICE) for op in ("any", "all")),
    *(
        both(op, lambda m, x, op=op: getattr(m, op)(x > 0.5, -1), least_ndim=1, **_CHOICE)
        for op in ("any", "all")
    ),
    both("reshape", lambda m, x: m.reshape(x, (-1, x.shape[0])), least_ndim=1),
    both("reshape", lambda m, x: x.reshape(x.shape[-1], -1), least_ndim=1),
    both("view", lambda m, x: x.view(-1), smooth=False),  # not on inputs that are not contiguous
    both("permute", lambda m, x: m.permute(x, tuple(reversed(range(x.ndim)))), least_ndim=1),
    both("transpose", lambda m, x: m.transpose(x, 0, -1), least_ndim=1),
    both("expand", lambda m, x: x.expand(3, *x.shape)),
    both("squeeze", lambda m, x: m.squeeze(x)),
    both("unsqueeze", lambda m, x: m.unsqueeze(x, -1)),
    both("flatten", lambda m, x: m.flatten(x, 0, 1), least_ndim=2),
    both("narrow", lambda m, x: m.narrow(x, 0, 1, x.shape[0] - 1), least_ndim=1),
    both("split", lambda m, x: m.split(x, 2, -1)[0] * 2, least_ndim=1),
    both("chunk", lambda m, x: m.chunk(x, 2)[-1], least_ndim=1),
    both("cat", lambda m, x, y: m.cat([x, y, x], 0), lambda r, s: one(r, s) + one(r, s), least_ndim=1),
    both("stack", lambda m, x, y: m.stack([x, y], -1), lambda r, s: one(r, s) + one(r, s)),
    both("clone", lambda m, x: m.clone(x)),
    both("contiguous", lambda m, x: x.mT.contiguous(), least_ndim=2),
    both("to", lambda m, x: x.to(m.int64), differentiable=False),
    both("slice", lambda m, x: x[1:, None], least_ndim=1),
    both("slice", lambda m, x: x[..., ::2], least_ndim=1),
    both("slice", lambda m, x: x[-1], least_ndim=1),
    both("tril", lambda m, x: m.tril(x), least_ndim=2),
    both("triu", lambda m, x: m.triu(x, 1), least_ndim=2),
    both("matmul", lambda m, x, y: m.matmul(x, y), products, least_ndim=1),
    both("matmul", lambda m, x, y: x.mT @ x, products, least_ndim=2),
    both("gather", lambda m, x, i: m.gather(x, 0, i), gathered, least_ndim=1),
    both("index_select", lambda m, x, i: m.index_select(x, 0, i), picked, least_ndim=1),
    both("index_select", lambda m, x, i: x[i], picked, least_ndim=1),
    both("embedding", lambda m, i, w: m.embedding(i, w), rows),
    both("linear", lambda m, x, w, b: m.linear(x, m.stack([w, b]), b[:2]), norm_inputs, least_ndim=1),
    both("softmax", lambda m, x: m.softmax(x, -1), least_ndim=1),
    both("softmax", lambda m, x: m.softmax(x, 0), least_ndim=1),
    both("log_softmax", lambda m, x: m.log_softmax(x, -1), least_ndim=1),
    both("layer_norm", lambda m, x, w, b: m.layer_norm(x, w, b), norm_inputs, least_ndim=1),
    both("layer_norm", lambda m, x, w, b: m.layer_norm(x), norm_inputs, least_ndim=1),
    both("rms_norm", lambda m, x, w, b: m.rms_norm(x, w), norm_inputs, least_ndim=1),
    both("cross_entropy", lambda m, x, y: m.cross_entropy(x, y), classes, least_ndim=1),
    both(
        "cross_entropy",
        lambda m, x, y: m.cross_entropy(x, y, ignore_index=0, reduction="sum", label_smoothing=0.1),
        classes,
        least_ndim=1,
    ),
    both("cross_entropy", lambda m, x, y: m.cross_entropy(x, y, reduction="none"), classes, least_ndim=1),
]

# Ops that are tested by name in other files.
ELSEWHERE = {"rope", "dropout", "detach", "add_", "sub_", "mul_", "div_", "copy_", "fill_", "zero_"}


def ours(array: Array, kind: str | None = None) -> mt.Tensor:
    t = mt.tensor(array)
    return t.to(getattr(mt, kind)) if kind and t.dtype.is_floating_point else t


def theirs(array: Array, kind: str | None = None) -> torch.Tensor:
    t = torch.tensor(array)
    return t.to(getattr(torch, kind)) if kind and t.is_floating_point() else t


def as_torch(t: mt.Tensor) -> torch.Tensor:
    return torch.from_dlpack(t.detach())
