"""PyTorch's own database of operations, and how each of its entries is called with our names.

An entry gives sample inputs for a dtype. `ADAPTERS` maps the entry's name (with its variant behind a bar) to a
function (input, *args, **kwargs) of ours with PyTorch's arguments; arguments that we do not have raise Unsupported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.testing._internal.common_methods_invocations import op_db

import mainspring.tensor as mt


class Unsupported(Exception):
    """This sample uses what we do not have."""


Adapter = Callable[..., Any]

FLOATS_ONLY = {"linear", "conv1d", "conv2d", "relu6", "hardtanh", "sign", "square"}
NO_TENSORS = {"index_fill": 3, "narrow": 2}  # from which argument on


def _plain(name: str, renamed: dict[str, str] | None = None, drop: dict[str, Any] | None = None) -> Adapter:
    """Our function of that name; `renamed` arguments of PyTorch's, `drop` those that must have this value."""
    known = {op: {a[0] for a in arguments} for op, _, arguments, _ in mt.OPS}[name]
    function = getattr(mt, name, None) or (lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs))

    def call(*args: Any, **kwargs: Any) -> Any:
        if name in FLOATS_ONLY and not args[0].dtype.is_floating_point:
            raise Unsupported("integers")
        if name in NO_TENSORS and any(isinstance(a, mt.Tensor) for a in args[NO_TENSORS[name] :]):
            raise Unsupported("a tensor in place of a number")
        for key, value in (drop or {}).items():
            if kwargs.pop(key, value) != value:
                raise Unsupported(key)
        for old, new in (renamed or {}).items():
            if old in kwargs:
                kwargs[new] = kwargs.pop(old)
        if not kwargs.keys() <= known:
            raise Unsupported(str(kwargs.keys() - known))
        return function(*args, **kwargs)

    return call


def _reduction(name: str) -> Adapter:
    """dim may be given as a list; a dtype is not ours."""
    plain = _plain(name, drop={"dtype": None})

    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is False:
            raise Unsupported("unbiased")
        return plain(x, *args, **kwargs)

    return call


def _rounding(mode: str | None) -> Adapter:
    def call(x: Any, other: Any, rounding_mode: str | None = None) -> Any:
        if rounding_mode == "floor":
            return mt.floor_divide(x, other)
        if rounding_mode == "trunc":
            raise Unsupported("trunc")
        return mt.div(x, other)

    return call


def _alpha(name: str) -> Adapter:
    def call(x: Any, other: Any, *, alpha: float = 1) -> Any:
        return getattr(mt, name)(x, other if alpha == 1 else other * alpha)

    return call


def _split(x: Any, size: Any, dim: int = 0) -> Any:
    if not isinstance(size, int):
        raise Unsupported("a list of sizes")
    return mt.split(x, size, dim)


def _clip(x: Any, min: Any = None, max: Any = None) -> Any:
    if min is None and max is None:
        raise Unsupported("no bound")
    return mt.clip(x, min, max)


def _norm(x: Any, p: Any = 2.0, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    if not isinstance(p, (int, float)) or dtype is not None:
        raise Unsupported("norm")
    return mt.vector_norm(x, float(p), dim, keepdim)


def _extreme(name: str) -> Adapter:
    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(mt, name)(x)

    return call


def _take_pair(function: Callable[..., Any]) -> Adapter:
    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs.get("dim") and "dim" not in kwargs:
            raise Unsupported("over all dimensions")
        return function(x, *args, **kwargs)

    return call


def _scaled_dot_product(
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Any:
    gqa = kwargs.get("enable_gqa", False)
    if q.ndim == 3:
        q, k, v = (t.unsqueeze(0) for t in (q, k, v))
        return _scaled_dot_product(q, k, v, attn_mask, dropout_p, is_causal, **kwargs).squeeze(0)
    if attn_mask is not None or dropout_p or q.ndim != 4 or (is_causal and q.shape[-2] != k.shape[-2]):
        raise Unsupported("mask")
    if k.shape[0] != q.shape[0] or (k.shape[1] != q.shape[1] and not gqa):
        raise Unsupported("broadcast heads")
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return mt.attention(q, k, v, is_causal).transpose(1, 2)


def _layer_norm(x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    if len(shape) != 1:
        raise Unsupported("several dimensions")
    return mt.layer_norm(x, weight, bias, eps)


def _rms_norm(x: Any, shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    if len(shape) != 1:
        raise Unsupported("several dimensions")
    return mt.rms_norm(x, weight, 2.0**-52 if eps is None else eps)


def _cross_entropy(x: Any, target: Any, weight: Any = None, **kwargs: Any) -> Any:
    if weight is not None or target.dtype != mt.int64 or x.ndim != 2:
        raise Unsupported("class weights, probabilities or planes")
    return mt.cross_entropy(x, target, **kwargs)


def _nll_loss(x: Any, target: Any, weight: Any = None, **kwargs: Any) -> Any:
    if weight is not None or x.ndim != 2:
        raise Unsupported("class weights or planes")
    return mt.nll_loss(x, target, **kwargs)


def _pad(x: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Any:
    return mt.pad(x, pad, value or 0.0)


def _weighted(name: str) -> Adapter:
    plain = _plain(name, drop={"weight": None, "pos_weight": None})

    def call(*args: Any, **kwargs: Any) -> Any:
        if len(args) > 2:
            raise Unsupported("weights")
        return plain(*args, **kwargs)

    return call


def _conv(name: str) -> Adapter:
    plain = _plain(name)

    def call(
        x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, *rest: Any, **kwargs: Any
    ) -> Any:
        if isinstance(padding, str):
            raise Unsupported("padding by name")
        return plain(x, weight, bias, stride, padding, *rest, **kwargs)

    return call


def _searchsorted(
    sequence: Any, values: Any, *, out_int32: bool = False, right: bool = False, **kwargs: Any
) -> Any:
    if kwargs.get("sorter") is not None or kwargs.get("side", "right") == "left" or out_int32:
        raise Unsupported("sorter")
    return mt.searchsorted(sequence, values, right or kwargs.get("side") == "right")


def _not_bytes(name: str) -> Adapter:
    plain = _plain(name)

    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        if x.dtype == mt.uint8:
            raise Unsupported("PyTorch gives uint8 for uint8")
        return plain(x, *args, **kwargs)

    return call


def _meshgrid(*tensors: Any, indexing: str = "ij") -> Any:
    listed = tensors[0] if isinstance(tensors[0], (list, tuple)) else tensors
    return mt.meshgrid(list(listed), indexing)


def _scatter(
    x: Any, dim: int, index: Any, source: Any = None, *, value: Any = None, reduce: Any = None
) -> Any:
    if reduce is not None:
        raise Unsupported("reduce")
    return mt.scatter(x, dim, index, source if value is None else value)


def _masked_fill(x: Any, mask: Any, value: Any) -> Any:
    if isinstance(value, mt.Tensor):
        raise Unsupported("a tensor of one value")
    return mt.masked_fill(x, mask, value)


def _unique(
    x: Any, sorted: bool = True, return_inverse: bool = False, return_counts: bool = False, dim: Any = None
) -> Any:
    if dim is not None:
        raise Unsupported("dim")
    values, _, inverse, counts = mt.unique_all(x)
    parts = [values, *([inverse] if return_inverse else []), *([counts] if return_counts else [])]
    return parts[0] if len(parts) == 1 else tuple(parts)


def _repeat_interleave(x: Any, repeats: Any, dim: Any = None, *, output_size: Any = None) -> Any:
    return mt.repeat_interleave(x, repeats, dim)


def _by_step(name: str) -> Adapter:
    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        if name == "sum" and kwargs.get("dtype"):
            raise Unsupported("dtype")
        return getattr(mt, name)(x, *args, **kwargs)

    return call


def _index(x: Any, key: Any) -> Any:
    return x[key]


def _unbiased(name: str) -> Adapter:
    def call(x: Any, *args: Any, unbiased: bool | None = None, **kwargs: Any) -> Any:
        if args and isinstance(args[0], bool):
            return getattr(mt, name)(x, correction=float(args[0]))
        if len(args) > 1:
            args, unbiased = (args[0],), args[1]
        if unbiased is not None:
            kwargs["correction"] = float(unbiased)
        if kwargs.get("correction", 1) is None:
            kwargs["correction"] = 1.0
        return getattr(mt, name)(x, *args, **kwargs)

    return call


def _einsum(operands: Any, equation: str) -> Any:
    if operands[0].dtype in (mt.int16, mt.uint8, mt.bool):
        raise Unsupported("the width of sums of small integers")
    return mt.einsum(equation, list(operands))


_SAME = [
    "abs",
    "acos",
    "acosh",
    "addbmm",
    "addcdiv",
    "addcmul",
    "addmm",
    "addmv",
    "addr",
    "all",
    "amax",
    "amin",
    "aminmax",
    "any",
    "argmax",
    "argmin",
    "argsort",
    "asin",
    "asinh",
    "atan",
    "atan2",
    "atanh",
    "baddbmm",
    "bitwise_and",
    "bitwise_left_shift",
    "bitwise_not",
    "bitwise_or",
    "bitwise_right_shift",
    "bitwise_xor",
    "bmm",
    "broadcast_tensors",
    "broadcast_to",
    "bucketize",
    "cat",
    "ceil",
    "chunk",
    "column_stack",
    "copysign",
    "cos",
    "cosh",
    "count_nonzero",
    "cummax",
    "cummin",
    "cumprod",
    "cumsum",
    "deg2rad",
    "diag",
    "diag_embed",
    "diagonal",
    "diff",
    "digamma",
    "dist",
    "dot",
    "dstack",
    "eq",
    "erf",
    "erfc",
    "exp",
    "exp2",
    "expand",
    "expand_as",
    "expm1",
    "flatten",
    "flip",
    "fliplr",
    "flipud",
    "floor",
    "floor_divide",
    "fmax",
    "fmin",
    "fmod",
    "frac",
    "gather",
    "ge",
    "gt",
    "heaviside",
    "hstack",
    "hypot",
    "index_add",
    "index_copy",
    "index_fill",
    "index_put",
    "index_select",
    "inner",
    "isclose",
    "isfinite",
    "isinf",
    "isnan",
    "kron",
    "kthvalue",
    "le",
    "lerp",
    "lgamma",
    "log",
    "log10",
    "log1p",
    "log2",
    "logaddexp",
    "logaddexp2",
    "logcumsumexp",
    "logical_and",
    "logical_not",
    "logical_or",
    "logical_xor",
    "logit",
    "logsumexp",
    "lt",
    "masked_scatter",
    "masked_select",
    "matmul",
    "maximum",
    "mean",
    "minimum",
    "mm",
    "movedim",
    "msort",
    "mul",
    "mv",
    "nan_to_num",
    "nanmean",
    "nansum",
    "narrow",
    "ne",
    "neg",
    "nonzero",
    "outer",
    "permute",
    "positive",
    "pow",
    "prod",
    "rad2deg",
    "reciprocal",
    "remainder",
    "repeat",
    "reshape",
    "roll",
    "rot90",
    "rsqrt",
    "scatter_add",
    "select",
    "sigmoid",
    "sign",
    "signbit",
    "sin",
    "sinc",
    "sinh",
    "sort",
    "sqrt",
    "square",
    "squeeze",
    "stack",
    "sum",
    "take",
    "take_along_dim",
    "tan",
    "tanh",
    "tensordot",
    "tile",
    "topk",
    "trace",
    "transpose",
    "tril",
    "triu",
    "true_divide",
    "trunc",
    "unbind",
    "unfold",
    "unsqueeze",
    "view",
    "vstack",
    "where",
    "xlogy",
    "clone",
    "contiguous",
    "round",
]
_FUNCTIONAL = [
    "celu",
    "elu",
    "gelu",
    "glu",
    "group_norm",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "leaky_relu",
    "linear",
    "logsigmoid",
    "mish",
    "mse_loss",
    "normalize",
    "one_hot",
    "pairwise_distance",
    "prelu",
    "relu",
    "relu6",
    "selu",
    "silu",
    "smooth_l1_loss",
    "softmin",
    "softplus",
    "softshrink",
    "softsign",
    "tanhshrink",
    "threshold",
    "cosine_similarity",
]
_DROP: dict[str, dict[str, Any]] = {
    "cumsum": {"dtype": None}, "cumprod": {"dtype": None}, "prod": {"dtype": None}, "sum": {"dtype": None},
    "mean": {"dtype": None}, "nansum": {"dtype": None}, "nanmean": {"dtype": None}, "gather": {"sparse_grad": False},
    "bucketize": {"out_int32": False}, "contiguous": {"memory_format": torch.contiguous_format},
    "clone": {"memory_format": torch.preserve_format}, "celu": {"inplace": False}, "elu": {"inplace": False},
}  # fmt: skip
_DROP_FUNCTIONAL = {"inplace": False}


def _default(name: str) -> Adapter:
    return _plain("div" if name == "true_divide" else name, drop=_DROP.get(name))


ADAPTERS: dict[str, Adapter] = {
    **{name: _default(name) for name in _SAME},
    **{f"nn.functional.{name}": _plain(name, drop=_DROP_FUNCTIONAL) for name in _FUNCTIONAL},
    **{name: _unbiased(name) for name in ("std", "var", "std_mean", "var_mean")},
    **{f"{name}|unbiased": _unbiased(name) for name in ("std", "var", "std_mean", "var_mean")},
    "__getitem__": _index,
    "add": _alpha("add"),
    "sub": _alpha("sub"),
    "__radd__": lambda x, y: y + x,
    "__rmul__": lambda x, y: y * x,
    "__rsub__": lambda x, y: y - x,
    "__rdiv__": lambda x, y: y / x,
    "__rmod__": lambda x, y: y % x,
    "__rpow__": lambda x, y: y**x,
    "__rand__": lambda x, y: y & x,
    "__ror__": lambda x, y: y | x,
    "__rxor__": lambda x, y: y ^ x,
    "__rmatmul__": lambda x, y: y @ x,
    "T": lambda x: x.T if x.ndim == 2 else x.permute(tuple(reversed(range(x.ndim)))),
    "mT": lambda x: x.mT,
    "t": lambda x: x.T if x.ndim == 2 else x,
    "argwhere": mt.nonzero,
    "nonzero": lambda x, as_tuple=False: _nonzero(x, as_tuple),
    "gather": lambda x, dim, index, sparse_grad=False: _gather(x, dim, index),
    "addr": lambda x, *args, **kwargs: _addr(x, *args, **kwargs),
    "all": _not_bytes("all"),
    "any": _not_bytes("any"),
    "broadcast_tensors": lambda *tensors: mt.broadcast_tensors(list(tensors)),
    "cat": lambda tensors, dim=0: _cat(tensors, dim),
    "tensordot": lambda a, b, dims=2: _tensordot(a, b, dims),
    "where": lambda x, condition, y: _where(condition, x, y),
    "atleast_1d": lambda x, *more: _atleast(1, x, *more),
    "div|floor_rounding": _rounding("floor"),
    "div|no_rounding_mode": _rounding(None),
    "clamp": _clip,
    "clamp_max": lambda x, bound: mt.clip(x, max=bound),
    "clamp_min": lambda x, bound: mt.clip(x, min=bound),
    "einsum": _einsum,
    "split": _split,
    "tensor_split": lambda x, sections, dim=0: mt.tensor_split(x, _whole(sections), dim),
    "max|binary": mt.maximum,
    "min|binary": mt.minimum,
    "max|reduction_no_dim": _extreme("amax"),
    "min|reduction_no_dim": _extreme("amin"),
    "median": _take_pair(mt.median),
    "meshgrid|list_of_tensors": _meshgrid,
    "meshgrid|variadic_tensors": _meshgrid,
    "log_softmax": _plain("log_softmax", drop={"dtype": None}),
    "softmax": _plain("softmax", drop={"dtype": None}),
    "masked_fill": _masked_fill,
    "linalg.vector_norm": lambda x, ord=2, dim=None, keepdim=False, dtype=None: _norm(
        x, ord, dim, keepdim, dtype
    ),
    "linalg.vecdot": lambda x, y, dim=-1: mt.sum(x * y, dim),
    "linalg.diagonal": lambda x, offset=0, dim1=-2, dim2=-1: mt.diagonal(x, offset, dim1, dim2),
    "ravel": lambda x: x.reshape(-1),
    "reshape_as": lambda x, y: x.reshape(y.shape),
    "view_as": lambda x, y: x.reshape(y.shape),
    "repeat_interleave": _repeat_interleave,
    "scatter": _scatter,
    "searchsorted": _searchsorted,
    "unflatten": lambda x, dim, sizes: mt.unflatten(x, dim, sizes),
    "unique": _unique,
    "vdot": mt.dot,
    "rsub": lambda x, y, *, alpha=1: y - (x if alpha == 1 else x * alpha),
    "bfloat16": lambda x, memory_format=None: x.bfloat16(),
    "bool": lambda x, memory_format=None: x.bool(),
    "byte": lambda x, memory_format=None: x.byte(),
    "char": lambda x, memory_format=None: x.char(),
    "double": lambda x, memory_format=None: x.double(),
    "float": lambda x, memory_format=None: x.float(),
    "half": lambda x, memory_format=None: x.half(),
    "int": lambda x, memory_format=None: x.int(),
    "long": lambda x, memory_format=None: x.long(),
    "short": lambda x, memory_format=None: x.short(),
    "diagonal_copy": lambda x, offset=0, dim1=0, dim2=1: mt.diagonal(x, offset, dim1, dim2),
    "expand_copy": lambda x, shape: x.expand(shape),
    "permute_copy": lambda x, dims: mt.permute(x, dims),
    "transpose_copy": lambda x, a, b: mt.transpose(x, a, b),
    "unsqueeze_copy": lambda x, dim: mt.unsqueeze(x, dim),
    "squeeze_copy": lambda x, *dim: mt.squeeze(x, *dim),
    "unbind_copy": lambda x, dim=0: mt.unbind(x, dim),
    "t_copy": lambda x: x.T if x.ndim == 2 else x,
    "zeros_like": lambda x, **kwargs: mt.zeros_like(x, dtype=kwargs.get("dtype")),
    "ones_like": lambda x, **kwargs: mt.ones_like(x, dtype=kwargs.get("dtype")),
    "full_like": lambda x, value, **kwargs: _full_like(x, value, **kwargs),
    "nn.functional.binary_cross_entropy": _weighted("binary_cross_entropy"),
    "nn.functional.binary_cross_entropy_with_logits": _weighted("binary_cross_entropy_with_logits"),
    "nn.functional.conv1d": _conv("conv1d"),
    "nn.functional.conv2d": _conv("conv2d"),
    "nn.functional.cross_entropy": _cross_entropy,
    "nn.functional.nll_loss": _nll_loss,
    "nn.functional.embedding": lambda weight, index, **kwargs: _embedding(weight, index, **kwargs),
    "nn.functional.layer_norm": _layer_norm,
    "nn.functional.rms_norm": _rms_norm,
    "nn.functional.pad|constant": _pad,
    "constant_pad_nd": lambda x, pad, value=0: mt.pad(x, pad, float(value)),
    "nn.functional.scaled_dot_product_attention": _scaled_dot_product,
}


def _cat(tensors: Any, dim: int) -> Any:
    if isinstance(tensors, mt.Tensor) or (
        any(t is None or t.shape == (0,) for t in tensors) and len({t.ndim for t in tensors}) > 1
    ):
        raise Unsupported("an empty vector among matrices")
    return mt.cat(list(tensors), dim)


def _tensordot(a: Any, b: Any, dims: Any) -> Any:
    if not isinstance(dims, int):
        raise Unsupported("lists of dimensions")
    return mt.tensordot(a, b, dims)


def _nonzero(x: Any, as_tuple: bool) -> Any:
    if as_tuple and not x.ndim:
        raise Unsupported("positions of a number")
    return mt.unbind(mt.nonzero(x), 1) if as_tuple else mt.nonzero(x)


def _gather(x: Any, dim: int, index: Any) -> Any:
    if index.numel() == 0 or index.ndim != x.ndim:
        raise Unsupported("an empty index of any shape")
    return mt.gather(x, dim, index)


def _addr(x: Any, *args: Any, **kwargs: Any) -> Any:
    if x.dtype == mt.bool:
        raise Unsupported("products of truth values")
    return mt.addr(x, *args, **kwargs)


def _where(condition: Any, x: Any, y: Any) -> Any:
    if condition.dtype != mt.bool:
        raise Unsupported("a condition of numbers")
    return mt.where(condition, x, y)


def _atleast(ndim: int, *tensors: Any) -> Any:
    tensors = tuple(tensors[0]) if isinstance(tensors[0], (list, tuple)) else tensors
    wide = [x.reshape(1) if x.ndim < ndim else x for x in tensors]
    return wide[0] if len(wide) == 1 else tuple(wide)


def _whole(sections: Any) -> int:
    if not isinstance(sections, int):
        raise Unsupported("a list of places")
    return sections


def _full_like(x: Any, value: Any, **kwargs: Any) -> Any:
    if kwargs:
        raise Unsupported("dtype")
    return mt.full_like(x, value)


def _embedding(weight: Any, index: Any, **kwargs: Any) -> Any:
    if any(
        kwargs.get(name) is not None and kwargs[name] is not False
        for name in ("max_norm", "scale_grad_by_freq")
    ):
        raise Unsupported("max_norm")
    if kwargs.get("padding_idx") is not None:
        raise Unsupported("padding_idx")
    return mt.embedding(index, weight)


def full_name(op: Any) -> str:
    return f"{op.name}|{op.variant_test_name}" if op.variant_test_name else op.name


# Our ops that an entry of another name drives.
_UNDER_ANOTHER_NAME = {
    "clip", "vector_norm", "unique_all", "dot", "nonzero", "tensor_split", "tensordot", "meshgrid", "unflatten",
    "masked_fill", "attention", "pad", "embedding", "scatter", "searchsorted", "repeat_interleave", "std_mean",
    "var_mean", "split", "median", "einsum",
}  # fmt: skip
DRIVEN = {name.removeprefix("nn.functional.") for name in ADAPTERS} | _UNDER_ANOTHER_NAME
ENTRIES = {full_name(op): op for op in op_db if full_name(op) in ADAPTERS}


def to_ours(value: Any) -> Any:
    """PyTorch's tensors, also inside lists, as ours on the same memory."""
    if isinstance(value, torch.Tensor):
        leaf = value.detach()
        if leaf.is_conj() or leaf.is_neg():
            raise Unsupported("a lazy view")
        shared = mt.from_dlpack(leaf)
        if value.requires_grad:
            shared.requires_grad = True
        return shared
    if isinstance(value, torch.dtype):
        return getattr(mt, str(value).removeprefix("torch."), value)
    if isinstance(value, (list, tuple)):
        return (
            type(value)(to_ours(v) for v in value)
            if not hasattr(value, "_fields")
            else tuple(map(to_ours, value))
        )
    if isinstance(value, dict):
        return {k: to_ours(v) for k, v in value.items()}
    return value


def leaves(value: Any) -> Iterable[Any]:
    """The tensors in a nest of lists and dicts, in order; of either kind."""
    if isinstance(value, (torch.Tensor, mt.Tensor)):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from leaves(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from leaves(v)
