"""Which experts serve a token, where its rows go, and how their outputs are added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops.cpu.support import refuses as cpu_refuses
from mainspring.ops.policy import LOCKSTEP, Policy
from mainspring.ops.registry import Implementation, Operation, accepts_all, any_requires_grad
from mainspring.ops.triton.support import refuses as triton_refuses


@dataclass(frozen=True)
class Routing:
    """The experts of T tokens, and the order of the T · k rows that are sorted by expert. All on one device.

    weights: [T, k]; experts: [T, k] int32, the heaviest first. Slot t · k + j is token t's j-th expert; order: [T · k]
    int32, the slot of each sorted row; places: [T, k] int32, the sorted row of each slot; offsets: [E + 1] int32, the
    first row of each expert.
    """

    weights: Tensor
    experts: Tensor
    order: Tensor
    places: Tensor
    offsets: Tensor

    @property
    def tokens(self) -> Tensor:
        """The token of each sorted row, [T · k] int32: the `index` of `grouped_linear`."""
        return self.order // self.experts.shape[1]


def route(
    logits: Tensor,
    top_k: int,
    *,
    normalise: bool,
    weights_dtype: torch.dtype | None = None,
    policy: Policy = LOCKSTEP,
) -> Routing:
    """The top_k largest logits of each token, the lowest index first among equal ones. logits: [T, E].

    Weights are the experts' softmax probabilities, computed in fp32: over all experts (normalise=False), or over the
    chosen ones alone, which is softmax, top-k, divided by their sum (Qwen3-MoE, arXiv 2505.09388) and top-k, softmax
    (Mixtral, arXiv 2401.04088, eq. 2) alike. They are rounded to weights_dtype (logits' by default) and carry the
    gradient to the logits. Deterministic; a token's bits do not depend on the others.

    Raises:
        BackendError: top_k is not 1 to E, or a backend does not take the size.
    """
    if logits.dim() != 2 or not 1 <= top_k <= logits.shape[1]:
        raise BackendError(
            f"route: top_k is {top_k} for logits {tuple(logits.shape)}; it must be 1 to E of [T, E]"
        )
    run = ROUTE.select(logits, policy, any_requires_grad(logits))
    return run(logits, top_k, normalise, logits.dtype if weights_dtype is None else weights_dtype)


def combine(rows: Tensor, routing: Routing, *, policy: Policy = LOCKSTEP) -> Tensor:
    """Each token's expert rows, weighted and added from its first slot to its last in fp32, rounded once.

    rows: [T · k, H], sorted by expert -> [T, H] in rows' dtype.

    Raises:
        BackendError: rows are not one for each slot.
    """
    if rows.dim() != 2 or rows.shape[0] != routing.order.shape[0]:
        raise BackendError(
            f"combine: rows must be [{routing.order.shape[0]}, H], one for each slot, not {tuple(rows.shape)}"
        )
    run = COMBINE.select(rows, policy, any_requires_grad(rows, routing.weights))
    return run(rows, routing)


def reference(logits: Tensor, top_k: int, normalise: bool, weights_dtype: torch.dtype) -> Routing:
    tokens, num_experts = logits.shape
    detached = logits.detach().float()
    ranked = detached.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    experts = ranked.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    precise = logits if logits.dtype == torch.float64 else logits.float()
    if normalise:
        weights = torch.softmax(precise.gather(1, experts), -1)
    else:
        weights = torch.softmax(precise, -1).gather(1, experts)
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(order.shape[0], device=logits.device)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=logits.device)
    counts[1:] = (flat[:, None] == torch.arange(num_experts, device=logits.device)).sum(0)
    int32 = torch.int32
    return Routing(
        weights.to(weights_dtype), experts.to(int32), order.to(int32), places.view(tokens, top_k).to(int32),
        counts.cumsum(0).to(int32),
    )  # fmt: skip


def combine_reference(rows: Tensor, routing: Routing) -> Tensor:
    precise = rows if rows.dtype == torch.float64 else rows.float()
    total = torch.zeros(routing.places.shape[0], rows.shape[1], dtype=precise.dtype, device=rows.device)
    for j in range(routing.places.shape[1]):
        total = total + precise[routing.places[:, j].long()] * routing.weights[:, j : j + 1].to(precise.dtype)
    return total.to(rows.dtype)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, top_k: int, normalise: bool, weights_dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        from mainspring.ops.triton import routing as kernels

        weights, experts, *rest = kernels.route(logits, top_k, normalise, weights_dtype)
        ctx.normalise = normalise
        ctx.save_for_backward(logits, experts)
        ctx.mark_non_differentiable(experts, *rest)
        return weights, experts, *rest

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        from mainspring.ops.triton import routing as kernels

        logits, experts = ctx.saved_tensors
        return kernels.route_backward(logits, experts, grad, ctx.normalise), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, places: Tensor, order: Tensor) -> Tensor:
        from mainspring.ops.triton import routing as kernels

        ctx.save_for_backward(rows, weights, order)
        return kernels.combine(rows, weights, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from mainspring.ops.triton import routing as kernels

        rows, weights, order = ctx.saved_tensors
        return (*kernels.combine_backward(rows, weights, order, grad), None, None)


def _triton(logits: Tensor, top_k: int, normalise: bool, weights_dtype: torch.dtype) -> Routing:
    return Routing(*_Route.apply(logits, top_k, normalise, weights_dtype))


def _triton_combine(rows: Tensor, routing: Routing) -> Tensor:
    combined: Tensor = _Combine.apply(rows, routing.weights, routing.places, routing.order)
    return combined


ROUTE = Operation(
    "route",
    Implementation("cpu", reference, cpu_refuses),
    Implementation("triton", _triton, triton_refuses),
    Implementation("reference", reference, accepts_all),
)
COMBINE = Operation(
    "combine",
    Implementation("cpu", combine_reference, cpu_refuses),
    Implementation("triton", _triton_combine, triton_refuses),
    Implementation("reference", combine_reference, accepts_all),
)
