"""What flows between ranks forward, and its transpose backward: Megatron's mapping functions.

| function | forward | backward |
| --- | --- | --- |
| copy_to_tensor_parallel | nothing | all-reduce |
| reduce_from_tensor_parallel | all-reduce | nothing |
| scatter_to_tensor_parallel | own part of the last dimension | all-gather |
| gather_from_tensor_parallel | all-gather along the last dimension | own part |
| scatter_to_sequence_parallel | own part of the first dimension | all-gather |
| gather_from_sequence_parallel | all-gather along the first dimension | reduce-scatter (or own part) |
| reduce_scatter_to_sequence_parallel | reduce-scatter | all-gather |
| all_to_all | all-to-all | all-to-all |
"""

from __future__ import annotations

from mainspring.tensor import _tensor as mt
from mainspring.tensor._tensor import Group, ShapeError, Tensor


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum over the ranks, as a new tensor; not recorded."""
    out = x.detach().clone()
    group.all_reduce(out)
    return out


def gather_last(x: Tensor, group: Group) -> Tensor:
    """The ranks' parts side by side along the last dimension; not recorded."""
    if group.size == 1:
        return x.detach()
    parts: Tensor = group.all_gather(x.detach().unsqueeze(0).contiguous())
    return mt.cat(list(mt.unbind(parts, 0)), -1)


def gather_first(x: Tensor, group: Group) -> Tensor:
    """The ranks' parts below each other; not recorded."""
    if group.size == 1:
        return x.detach()
    out: Tensor = group.all_gather(x.detach())
    return out


def reduce_scatter_first(x: Tensor, group: Group) -> Tensor:
    """This rank's part of the sum; not recorded."""
    if group.size == 1:
        return x.detach()
    out: Tensor = group.reduce_scatter(x.detach())
    return out


def own_part(x: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's share of a dimension.

    Raises:
        ShapeError: the dimension is not divisible by the number of ranks.
    """
    size = x.shape[dim]
    if size % group.size:
        raise ShapeError(f"dimension {dim} of shape {tuple(x.shape)} is not divisible by {group.size} ranks")
    part = size // group.size
    return x.detach().narrow(dim, group.rank * part, part).contiguous()


def copy_to_tensor_parallel(x: Tensor, group: Group) -> Tensor:
    return mt.record(x.detach(), [x], lambda g: [all_reduce(g, group)])


def reduce_from_tensor_parallel(x: Tensor, group: Group) -> Tensor:
    return mt.record(all_reduce(x, group), [x], lambda g: [g])


def scatter_to_tensor_parallel(x: Tensor, group: Group) -> Tensor:
    return mt.record(own_part(x, group, -1), [x], lambda g: [gather_last(g, group)])


def gather_from_tensor_parallel(x: Tensor, group: Group) -> Tensor:
    return mt.record(gather_last(x, group), [x], lambda g: [own_part(g, group, -1)])


def scatter_to_sequence_parallel(x: Tensor, group: Group) -> Tensor:
    return mt.record(own_part(x, group, 0), [x], lambda g: [gather_first(g, group)])


def gather_from_sequence_parallel(
    x: Tensor, group: Group, tensor_parallel_output_grad: bool = True
) -> Tensor:
    """`tensor_parallel_output_grad`: the ranks' gradients differ and are summed; else they are copies."""

    def backward(g: Tensor) -> list[Tensor | None]:
        return [reduce_scatter_first(g, group) if tensor_parallel_output_grad else own_part(g, group, 0)]

    return mt.record(gather_first(x, group), [x], backward)


def reduce_scatter_to_sequence_parallel(x: Tensor, group: Group) -> Tensor:
    return mt.record(reduce_scatter_first(x, group), [x], lambda g: [gather_first(g, group)])


def all_to_all(x: Tensor, group: Group) -> Tensor:
    """Piece r of the first dimension goes to rank r."""
    return mt.record(group.all_to_all(x.detach()), [x], lambda g: [group.all_to_all(g.detach())])
