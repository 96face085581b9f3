"""What flows between ranks forward, and its transpose backward: Megatron's mapping functions.

In C++: csrc/parallel/mappings.h.

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

A dimension that is not divisible by the number of ranks is a ShapeError.
"""

from __future__ import annotations

from mainspring.tensor import _tensor as mt
from mainspring.tensor._tensor import Group, Tensor


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum over the ranks, as a new tensor; not recorded."""
    return mt._all_reduced(x, group)


def gather_last(x: Tensor, group: Group) -> Tensor:
    """The ranks' parts side by side along the last dimension; not recorded."""
    return mt._gathered(x.detach(), group, last=True)


def gather_first(x: Tensor, group: Group) -> Tensor:
    """The ranks' parts below each other; not recorded."""
    return mt._gathered(x.detach(), group, last=False)


def reduce_scatter_first(x: Tensor, group: Group) -> Tensor:
    """This rank's part of the sum; not recorded."""
    return mt._reduce_scattered(x, group)


def own_part(x: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's share of a dimension, as a new tensor; not recorded."""
    return mt._own_part(x, group, dim)


def copy_to_tensor_parallel(x: Tensor, group: Group) -> Tensor:
    return mt._copy_to_ranks(x, group)


def reduce_from_tensor_parallel(x: Tensor, group: Group) -> Tensor:
    return mt._reduce_from_ranks(x, group)


def scatter_to_tensor_parallel(x: Tensor, group: Group) -> Tensor:
    return mt._scatter_to_ranks(x, group, last=True)


def gather_from_tensor_parallel(x: Tensor, group: Group) -> Tensor:
    return mt._gather_from_ranks(x, group, last=True, sums=False)


def scatter_to_sequence_parallel(x: Tensor, group: Group) -> Tensor:
    return mt._scatter_to_ranks(x, group, last=False)


def gather_from_sequence_parallel(
    x: Tensor, group: Group, tensor_parallel_output_grad: bool = True
) -> Tensor:
    """`tensor_parallel_output_grad`: the ranks' gradients differ and are summed; else they are copies."""
    return mt._gather_from_ranks(x, group, last=False, sums=tensor_parallel_output_grad)


def reduce_scatter_to_sequence_parallel(x: Tensor, group: Group) -> Tensor:
    return mt._reduce_scatter_to_ranks(x, group)


def all_to_all(x: Tensor, group: Group) -> Tensor:
    """Piece r of the first dimension goes to rank r."""
    return mt._all_to_all(x, group)
