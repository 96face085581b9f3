"""Tensor parallelism: linear layers whose weight is cut by rows (column-parallel) or by columns (row-parallel).

Megatron-LM (Shoeybi et al., arXiv 1909.08053), with its sequence parallelism (Korthikanti et al., arXiv 2205.05198):
between the layers each rank holds a slice of the tokens, which a column-parallel layer gathers and the row-parallel
one after it sums and cuts again. Communication runs beside the product that does not need it.

    forward    column: gather x beside y = x Wᵀ of the        row: partial = x Wᵀ by pieces of rows, each summed
               own rows, then of the others'                  over the ranks beside the next one's product
    backward   column: gather x beside dx = g W,              row: gather g beside dx = g W of the
               then dW = gᵀ x beside the sum of dx            own rows, then of the others'; dW = gᵀ x
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mainspring import ops
from mainspring.model.layers import Linear
from mainspring.ops import Policy
from mainspring.ops.precision import accumulator
from mainspring.parallel.collectives import (
    Pending,
    gather_rows,
    gather_terms,
    in_order,
    pass_on,
    start_all_reduce,
    start_gather_rows,
    start_sum_rows,
)
from mainspring.parallel.mesh import Group, even_bounds

OVERLAP_ROWS = 1024
"""Rows of a rank from which communication runs beside products of pieces: smaller ones are too short to be cut."""


Product = tuple[nn.Parameter, Tensor, Tensor]
"""A parameter [out, in] to whose gradient gradᵀ x is to be added; grad: [T, out], x: [T, in]."""


@dataclass
class WeightGradients:
    """Where the gradients of the linear layers' weights go.

    A zero-bubble schedule computes them where a rank would idle (Qi et al., arXiv 2401.10241): while `deferring`, a
    layer's backward pass leaves its product here.
    """

    deferring: bool = False
    sink: Callable[[nn.Parameter, Tensor, Tensor], None] | None = None
    """Adds a product to the gradient that its owner keeps; else it goes to the parameter's `grad`."""
    _waiting: list[Product] = field(default_factory=list)

    def put(self, product: Product) -> None:
        self._waiting.append(product)

    def take(self) -> list[Product]:
        """What a backward pass has left, to be given to `run` later."""
        taken, self._waiting = self._waiting, []
        return taken

    @torch.no_grad()
    def run(self, waiting: list[Product]) -> None:
        """Computes and adds them."""
        for parameter, grad, x in waiting:
            if self.sink is not None:
                self.sink(parameter, grad, x)
                continue
            gradient = grad.t() @ x
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


@dataclass
class TensorParallel:
    """What the twins of one model share."""

    group: Group
    policy: Policy
    sliced: bool = False
    """Whether the ranks hold slices of the tokens between the layers."""
    invariant: bool = False
    tokens: int = 0
    """Of the stream that is going through the model now, over all ranks; the decoder sets it."""
    weight_gradients: WeightGradients = field(default_factory=WeightGradients)

    @property
    def ordered(self) -> bool:
        """Whether sums go from the first rank to the last, whatever the backend would choose."""
        return self.policy.numerics == "lockstep"

    def overlaps(self, x: Tensor) -> bool:
        """Whether the gather of x's rows runs beside a product of them."""
        return self.sliced and not self.ordered and x.shape[0] >= OVERLAP_ROWS


class start_sum:
    """The sum of the ranks' x: this rank's rows of it if the sequence is sliced, else all; calling it waits."""

    def __init__(self, x: Tensor, tp: TensorParallel) -> None:
        self._rows: start_sum_rows | None = None
        self._whole: Callable[[], Tensor]
        if tp.sliced:
            self._whole = start_sum_rows(x, tp.group, ordered=tp.ordered)
        elif tp.ordered:
            self._whole = lambda: in_order(gather_terms(x, tp.group))
        else:
            self._whole = start_all_reduce(x, tp.group).wait

    def __call__(self) -> Tensor:
        return self._whole()


class ColumnParallelLinear(nn.Module):
    """The rank's rows of W: x (all features) -> the rank's features."""

    def __init__(self, linear: Linear, tp: TensorParallel) -> None:
        super().__init__()
        self.weight, self.bias, self.tp = linear.weight, linear.bias, tp

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, in] (the rank's rows, if the sequence is sliced) -> [T, out / tp], of all tokens."""
        out: Tensor = _ColumnProduct.apply(x, self.weight, self.bias, self)
        return out


class RowParallelLinear(nn.Module):
    """The rank's columns of W: the rank's features -> all features, summed over the ranks."""

    def __init__(self, linear: Linear, tp: TensorParallel) -> None:
        super().__init__()
        self.weight, self.bias, self.tp = linear.weight, linear.bias, tp

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, in / tp], of all tokens -> [T, out] (the rank's rows, if the sequence is sliced)."""
        out: Tensor = _RowProduct.apply(x, self.weight, self.bias, self)
        return out


def whole_stream(x: Tensor, tp: TensorParallel) -> Tensor:
    """All tokens' rows on every rank, of which each then computes the same: a rank's gradient is that of its rows."""
    if not tp.sliced:
        return x
    out: Tensor = _WholeStream.apply(x, tp)
    return out


class _WholeStream(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        bounds = even_bounds(tp.tokens, tp.group.size)
        ctx.rows = slice(bounds[tp.group.rank], bounds[tp.group.rank + 1])
        return gather_rows(x, tp.tokens, tp.group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad[ctx.rows], None


class _ColumnProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: ColumnParallelLinear
    ) -> Tensor:
        tp = layer.tp
        ctx.layer, ctx.tokens = layer, tp.tokens
        ctx.save_for_backward(x, weight)  # a slice of x: the whole is gathered again
        if tp.overlaps(x):
            return gathered_product(x, weight.t(), bias, tp)[0]
        whole = gather_rows(x, tp.tokens, tp.group) if tp.sliced else x
        return ops.linear(whole, weight, bias, policy=tp.policy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        tp: TensorParallel = ctx.layer.tp
        gather = start_gather_rows(x, ctx.tokens, tp.group) if tp.sliced else (lambda: x)
        d_x = grad @ weight
        total = start_sum(d_x, tp)
        whole = gather()
        d_weight = weight_gradient(ctx.layer.weight, grad, whole, tp)
        d_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return total(), d_weight, d_bias, None


class _RowProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: RowParallelLinear) -> Tensor:
        tp = layer.tp
        ctx.layer, ctx.tokens = layer, tp.tokens
        ctx.save_for_backward(x, weight)
        return row_product(x, weight, bias, tp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        tp: TensorParallel = ctx.layer.tp
        # Of the rank's rows if the sequence is sliced: then a term of the sum over the ranks.
        d_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        if tp.overlaps(grad):
            d_x, whole = gathered_product(grad, weight, None, tp, ctx.tokens)
        else:
            whole = gather_rows(grad, ctx.tokens, tp.group) if tp.sliced else grad
            d_x = whole @ weight
        return d_x, weight_gradient(ctx.layer.weight, whole, x, tp), d_bias, None


def gathered_product(
    x: Tensor, matrix: Tensor, bias: Tensor | None, tp: TensorParallel, tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """(x M + b of all ranks' rows, those rows): the product of the own rows runs while the others' are on their way.

    x: [n, in], the rank's piece of `tokens` rows (`tp.tokens` by default), matrix: [in, out] -> [tokens, out] and
    [tokens, in]. Each piece is written where it belongs; the GEMM may cut its sums otherwise for pieces than for the
    whole, so this is for fast numerics. Without a gradient.
    """
    total = tp.tokens if tokens is None else tokens
    bounds = even_bounds(total, tp.group.size)
    begin, end = bounds[tp.group.rank], bounds[tp.group.rank + 1]
    gather = start_gather_rows(x, total, tp.group)
    out = x.new_empty(total, matrix.shape[1])
    _product_into(out[begin:end], x, matrix, bias)
    whole = gather()
    for first, last in ((0, begin), (end, total)):
        if first < last:
            _product_into(out[first:last], whole[first:last], matrix, bias)
    return out, whole


def summed_product(x: Tensor, matrix: Tensor, tp: TensorParallel) -> Tensor:
    """This rank's rows of the sum of the ranks' x M, piece by piece around a ring, each passed on beside the next's
    product.

    x: [tp.tokens, in / tp], matrix: [in / tp, out] -> [the rank's piece, out]. A rank begins with the piece of the one
    before it, adds what comes to the next piece, and ends with its own. Each sum has an order of its own, the same
    every time, and is rounded on its way as a backend's would be: for fast numerics. Without a gradient.
    """
    group = tp.group
    bounds = even_bounds(tp.tokens, group.size)
    pieces = [slice(a, b) for a, b in pairwise(bounds)]
    coming: tuple[Pending, Pending] | None = None
    for step in range(group.size):
        number = (group.rank - step - 1) % group.size
        total = x[pieces[number]] @ matrix
        if coming is not None:
            received, sent = coming
            total += received.wait()
            sent.wait()
        if step < group.size - 1:  # the rank before has just computed the piece that comes next here
            following = pieces[(number - 1) % group.size]
            coming = pass_on(total, total.new_empty(following.stop - following.start, total.shape[1]), group)
    return total


def _product_into(out: Tensor, x: Tensor, matrix: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        torch.mm(x, matrix, out=out)
    else:
        torch.addmm(bias, x, matrix, out=out)


def row_product(x: Tensor, weight: Tensor, bias: Tensor | None, tp: TensorParallel) -> Tensor:
    """x Wᵀ + b over the ranks' columns of W; in order, fp32 partial sums are added from the first rank to the last."""
    size = tp.group.size
    if size == 1:
        product = ops.linear_tp_invariant if tp.invariant else ops.linear
        return product(x, weight, bias, policy=tp.policy)
    if tp.invariant:
        partial = ops.linear_tp_partial(x, weight, degree=size, policy=tp.policy)
        terms = (
            start_sum_rows(partial, tp.group, ordered=True).terms()
            if tp.sliced
            else gather_terms(partial, tp.group)
        )
        return ops.join_tp_partials(terms, bias, x.dtype)
    if tp.sliced and not tp.ordered and x.shape[0] >= OVERLAP_ROWS * size:
        total = summed_product(x, weight.t(), tp)
    else:
        wide = accumulator(x.dtype) if tp.ordered else x.dtype
        partial = ops.linear(x, weight, None, out_dtype=wide, policy=tp.policy)
        total = start_sum(partial, tp)()
    return (total if bias is None else total + bias.to(total.dtype)).to(x.dtype)


def weight_gradient(parameter: nn.Parameter, grad: Tensor, x: Tensor, tp: TensorParallel) -> Tensor | None:
    """gradᵀ x, for autograd to add; None if that has been seen to, or will be."""
    gradients = tp.weight_gradients
    if not parameter.requires_grad:
        return None
    if gradients.deferring:
        gradients.put((parameter, grad, x))
        return None
    if gradients.sink is not None:
        gradients.sink(parameter, grad, x)
        return None
    return grad.t() @ x
