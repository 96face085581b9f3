"""Faults that real layouts have had, to be planted in a worker: each must be seen by the verification."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from mainspring import ops
from mainspring.parallel import decoder, recompute, ring, tensor, vocabulary
from mainspring.parallel.context import ContextBatch, Rectangle, cut_stream
from mainspring.parallel.experts import Dispatched
from mainspring.parallel.flat import FlatUnit
from mainspring.parallel.mesh import Group
from mainspring.parallel.tensor import TensorParallel, WeightGradients
from mainspring.parallel.units import Units


def row_parallel_without_its_sum() -> AbstractContextManager[Any]:
    def alone(x: Tensor, weight: Tensor, bias: Tensor | None, tp: TensorParallel) -> Tensor:
        return ops.linear(x, weight, bias, policy=tp.policy)

    return patch.object(tensor, "row_product", alone)


def column_parallel_without_its_sum() -> AbstractContextManager[Any]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x, grad.sum(0) if ctx.needs_input_grad[2] else None, None

    return patch.object(tensor._ColumnProduct, "backward", staticmethod(backward))


def _without_sum_over(name: str) -> AbstractContextManager[Any]:
    whole = Units._sum

    def some(tensors: list[Tensor], group: Group) -> None:
        if group.name != name:
            whole(tensors, group)

    return patch.object(Units, "_sum", staticmethod(some))


def norms_without_their_sum_over_slices() -> AbstractContextManager[Any]:
    return _without_sum_over("tp")


def shared_key_heads_without_their_sum() -> AbstractContextManager[Any]:
    return _without_sum_over("keys")


def tied_embeddings_without_their_sum() -> AbstractContextManager[Any]:
    return _without_sum_over("tied")


def causal_mask_off_by_one_in_the_ring() -> AbstractContextManager[Any]:
    whole = Rectangle.mask

    def late(self: Rectangle, window: int | None, device: torch.device) -> Tensor | None:
        return whole(replace(self, ahead=self.ahead - 1), window, device)

    return patch.object(Rectangle, "mask", late)


def ring_without_its_causal_mask() -> AbstractContextManager[Any]:
    whole = ring._call

    def open_call(parts: list[Rectangle], causal: bool, device: torch.device) -> Any:
        return replace(whole(parts, causal, device), causal=False)

    return patch.object(ring, "_call", open_call)


def ring_that_drops_gradients_of_other_pieces_keys() -> AbstractContextManager[Any]:
    whole = ring._attend_backward

    def partial(*arguments: Any) -> None:
        d_kv: Tensor = arguments[8]
        whole(*arguments[:8], d_kv if arguments[5].causal else torch.zeros_like(d_kv))

    return patch.object(ring, "_attend_backward", partial)


def ring_without_gradients_of_earlier_keys() -> AbstractContextManager[Any]:
    whole = ring.rectangle_gradient

    def partial(*arguments: Any) -> None:
        part: Rectangle = arguments[5]
        d_kv: Tensor = arguments[9]
        whole(*arguments[:9], d_kv if part.ahead == 0 else torch.zeros_like(d_kv))

    return patch.object(ring, "rectangle_gradient", partial)


def positions_that_begin_anew_on_each_context_rank() -> AbstractContextManager[Any]:
    def anew(lengths: Sequence[int], group: Group, device: torch.device, rope: Any) -> ContextBatch:
        batch = cut_stream(lengths, group, device, rope)
        return replace(batch, positions=torch.arange(batch.num_tokens))

    return patch.object(decoder, "cut_stream", anew)


def expert_gradients_doubled() -> AbstractContextManager[Any]:
    whole = FlatUnit.collect

    def doubled(self: FlatUnit, name: str) -> None:
        gradient = self.parameters[name].grad
        if name.endswith("mlp.gate_up") and gradient is not None:
            gradient.mul_(2)
        whole(self, name)

    return patch.object(FlatUnit, "collect", doubled)


def expert_rows_that_come_back_in_another_order() -> AbstractContextManager[Any]:
    whole = Dispatched.bring_back

    def mixed(self: Dispatched, rows: Tensor) -> Tensor:
        if self.order is None:
            return whole(self, rows)
        inverse = torch.empty_like(self.order)
        inverse[self.order] = torch.arange(self.order.shape[0])
        return whole(replace(self, order=inverse), rows)

    return patch.object(Dispatched, "bring_back", mixed)


def data_parallel_mean_of_what_is_a_sum() -> AbstractContextManager[Any]:
    whole = FlatUnit.finish_reduce

    def mean(self: FlatUnit) -> Tensor:
        return whole(self).div_(self.copy_group.size)

    return patch.object(FlatUnit, "finish_reduce", mean)


def zero_2_that_keeps_the_last_micro_batch_only() -> AbstractContextManager[Any]:
    whole = FlatUnit.start_reduce

    def forgetful(self: FlatUnit, *, last: bool) -> None:
        if self._reducing is not None:
            self._reducing.wait()
        self._reducing = self.gradient_shard = None
        whole(self, last=last)

    return patch.object(FlatUnit, "start_reduce", forgetful)


def zero_1_that_does_not_refresh_its_copies() -> AbstractContextManager[Any]:
    return patch.object(FlatUnit, "start_refresh", lambda self: None)


def cross_entropy_of_the_first_ranks_vocabulary() -> AbstractContextManager[Any]:
    return patch.object(vocabulary, "in_order", lambda terms: terms[0])


def zero_bubble_that_loses_a_weight_gradient() -> AbstractContextManager[Any]:
    whole = WeightGradients.run

    def short(self: WeightGradients, waiting: list[tensor.Product]) -> None:
        whole(self, waiting[1:])

    return patch.object(WeightGradients, "run", short)


def weight_gradients_of_the_last_micro_batch_only() -> AbstractContextManager[Any]:
    whole = FlatUnit._held

    def forgetful(self: FlatUnit, name: str) -> tuple[Tensor, bool]:
        return whole(self, name)[0], False

    return patch.object(FlatUnit, "_held", forgetful)


def gradient_norm_that_counts_copies() -> AbstractContextManager[Any]:
    whole = Units._pieces

    def heavy(self: Units, unit: FlatUnit) -> Any:
        return (replace(piece, weight=1.0) for piece in whole(self, unit))

    return patch.object(Units, "_pieces", heavy)


def tokens_cut_at_another_rank_for_the_loss() -> AbstractContextManager[Any]:
    whole = decoder.ParallelDecoder.own

    def shifted(self: decoder.ParallelDecoder, tokens: Tensor, batch: Any) -> Tensor:
        mine = whole(self, tokens, batch)
        return mine.roll(1) if (tokens == ops.IGNORE_INDEX).any() else mine  # only targets have left-out ones

    return patch.object(decoder.ParallelDecoder, "own", shifted)


def recomputation_that_loses_the_gradient_of_the_residual_stream() -> AbstractContextManager[Any]:
    def backward(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        gradient = recompute._backward(ctx, grad)
        return None, gradient, gradient

    return patch.object(recompute._ForgettableSum, "backward", staticmethod(backward))


def recomputation_from_another_micro_batchs_positions() -> AbstractContextManager[Any]:
    whole = recompute._again

    def shifted(node: Any) -> Tensor:
        run = node.run
        node.run = lambda kept: run(kept.roll(1, 0))
        return whole(node)

    return patch.object(recompute, "_again", shifted)
