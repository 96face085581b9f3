"""Linear layers and embeddings whose weights are split over the ranks of a group.

Every rank draws the whole weight from one stream and keeps its part, so that the parts together are, bit for bit, the
weight of a single process with the same generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from mainspring.tensor import _tensor as mt
from mainspring.tensor._tensor import Generator, Group, Parameter, ShapeError, Tensor, dtype
from mainspring.tensor.nn.module import Module
from mainspring.tensor.parallel import mappings

InitMethod = Callable[[tuple[int, ...], Generator | None], Tensor]


def uniform_init(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    """Uniform within 1 / sqrt(columns), as `nn.Linear` draws it."""
    return (mt.rand(shape, dtype=mt.float64, generator=generator) * 2.0 - 1.0) * (
        1 / math.sqrt(max(1, shape[-1]))
    )


def _share(total: int, group: Group, what: str) -> int:
    if total % group.size:
        raise ShapeError(f"{what} {total} is not divisible by {group.size} ranks")
    return total // group.size


class _ParallelLinear(Module):
    weight: Parameter
    bias: Parameter | None
    # float32, set by DataParallel: gradients of the weight are added to it in the backward pass itself.
    main_grad: Tensor | None

    def __init__(
        self, group: Group, skip_bias_add: bool, sequence_parallel: bool, fuse_gradients: bool
    ) -> None:
        super().__init__()
        self.group, self.skip_bias_add, self.sequence_parallel = group, skip_bias_add, sequence_parallel
        self.gradient_accumulation_fusion = fuse_gradients
        self.main_grad = None

    def _add_to_main_grad(self, gradient: Tensor) -> None:
        if self.main_grad is None:
            self.main_grad = mt.zeros(self.weight.shape)
        self.main_grad.add_(gradient.float())


def linear_with_overlap(
    layer: _ParallelLinear, x: Tensor, gather: bool, reduce_input_gradient: bool
) -> Tensor:
    """x weightᵀ. The gradient of x is reduced over the ranks while that of the weight is being computed.

    `gather`: x is this rank's part of the sequence; it is gathered here, and again in the backward pass, so that only
    the part is kept. `reduce_input_gradient`: the ranks hold different columns, so that gradients of x add up.
    """
    group, weight = layer.group, layer.weight
    part, detached_weight = x.detach(), weight.detach()
    whole = mappings.gather_first(part, group) if gather else part

    def backward(grad: Tensor) -> list[Tensor | None]:
        total, pending = part, None
        if gather and group.size > 1:
            total, pending = group.all_gather(part, async_op=True)
        grad_x = grad @ detached_weight
        if pending is not None:
            pending.wait()
        reduced = None
        if reduce_input_gradient and group.size > 1:
            if gather:
                grad_x, reduced = group.reduce_scatter(grad_x, async_op=True)
            else:
                reduced = group.all_reduce(grad_x, async_op=True)
        rows = grad.reshape(-1, grad.shape[-1])
        grad_weight: Tensor | None = rows.T @ total.reshape(-1, total.shape[-1])
        if layer.gradient_accumulation_fusion and grad_weight is not None:
            layer._add_to_main_grad(grad_weight)
            grad_weight = None
        if reduced is not None:
            reduced.wait()
        return [grad_x, grad_weight]

    return mt.record(mt.linear(whole, detached_weight), [x, weight], backward)


class ColumnParallelLinear(_ParallelLinear):
    """x [..., in] to this rank's part [..., out / ranks] of x Aᵀ + b, or all of it with gather_output.

    With `sequence_parallel`, x is this rank's part of the first dimension. `skip_bias_add` returns (output, bias).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group: Group,
        *,
        bias: bool = True,
        gather_output: bool = False,
        skip_bias_add: bool = False,
        sequence_parallel: bool = False,
        gradient_accumulation_fusion: bool = False,
        init_method: InitMethod = uniform_init,
        dtype: dtype = mt.float32,
        generator: Generator | None = None,
    ) -> None:
        super().__init__(group, skip_bias_add, sequence_parallel, gradient_accumulation_fusion)
        part = _share(out_features, group, "out_features")
        if gather_output and sequence_parallel:
            raise ShapeError("gather_output and sequence_parallel exclude each other")
        self.gather_output = gather_output
        whole = init_method((out_features, in_features), generator)
        self.weight = Parameter(whole[group.rank * part : (group.rank + 1) * part].to(dtype).clone())
        self.bias = Parameter(mt.zeros(part, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        out = linear_with_overlap(self, x, gather=self.sequence_parallel, reduce_input_gradient=True)
        if self.bias is not None and not self.skip_bias_add:
            out = out + self.bias
        if self.gather_output:
            out = mappings.gather_from_tensor_parallel(out, self.group)
        return (out, self.bias) if self.skip_bias_add else out


class RowParallelLinear(_ParallelLinear):
    """This rank's part x [..., in / ranks] to the sum over the ranks [..., out] of x Aᵀ, plus b.

    Without `input_is_parallel`, x is whole and its part is taken here. With `sequence_parallel` the result is this
    rank's part of the first dimension.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group: Group,
        *,
        bias: bool = True,
        input_is_parallel: bool = True,
        skip_bias_add: bool = False,
        sequence_parallel: bool = False,
        gradient_accumulation_fusion: bool = False,
        init_method: InitMethod = uniform_init,
        dtype: dtype = mt.float32,
        generator: Generator | None = None,
    ) -> None:
        super().__init__(group, skip_bias_add, sequence_parallel, gradient_accumulation_fusion)
        part = _share(in_features, group, "in_features")
        if sequence_parallel and not input_is_parallel:
            raise ShapeError("sequence_parallel needs input_is_parallel")
        self.input_is_parallel = input_is_parallel
        whole = init_method((out_features, in_features), generator)
        self.weight = Parameter(whole[:, group.rank * part : (group.rank + 1) * part].to(dtype).clone())
        self.bias = Parameter(mt.zeros(out_features, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        if not self.input_is_parallel:
            x = mappings.scatter_to_tensor_parallel(x, self.group)
        out = linear_with_overlap(self, x, gather=False, reduce_input_gradient=False)
        if self.sequence_parallel:
            out = mappings.reduce_scatter_to_sequence_parallel(out, self.group)
        else:
            out = mappings.reduce_from_tensor_parallel(out, self.group)
        if self.skip_bias_add:
            return out, self.bias
        return out if self.bias is None else out + self.bias


class VocabParallelEmbedding(Module):
    """Indices [...] to rows [..., dim] of a table whose rows are split over the ranks.

    With `reduce_scatter_embeddings` (sequence parallelism) indices [batch, sequence] give this rank's part of
    [sequence, batch, dim].
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        group: Group,
        *,
        reduce_scatter_embeddings: bool = False,
        dtype: dtype = mt.float32,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        self.group, self.reduce_scatter_embeddings = group, reduce_scatter_embeddings
        part = _share(num_embeddings, group, "num_embeddings")
        self.start, self.end = group.rank * part, (group.rank + 1) * part
        whole = mt.randn(num_embeddings, embedding_dim, dtype=mt.float64, generator=generator)
        self.weight = Parameter(whole[self.start : self.end].to(dtype).clone())

    def forward(self, index: Tensor) -> Tensor:
        elsewhere = mt.logical_or(index < self.start, index >= self.end)
        local = mt.where(elsewhere, mt.tensor(0), index - self.start)
        rows = mt.embedding(local, self.weight)
        rows = mt.masked_fill(rows, elsewhere.unsqueeze(-1), 0.0)
        if self.reduce_scatter_embeddings:
            return mappings.reduce_scatter_to_sequence_parallel(rows.transpose(0, 1), self.group)
        return mappings.reduce_from_tensor_parallel(rows, self.group)
