"""Which experts serve a token, where its rows go, and how their outputs are added."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops import library
from mainspring.ops.cpu.support import refuses as cpu_refuses
from mainspring.ops.policy import LOCKSTEP, Policy
from mainspring.ops.precision import accumulator
from mainspring.ops.registry import Implementation, Operation, accepts_floats, any_requires_grad
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
    dtype = logits.dtype if weights_dtype is None else weights_dtype
    if library.is_traced():
        return Routing(*library.route(logits, top_k, normalise, dtype, policy))
    needs_grad = any_requires_grad(logits)
    run = ROUTE.select(logits, policy, needs_grad)
    if not needs_grad:
        return Routing(*run(logits, top_k, normalise, dtype))
    return Routing(*_Route.apply(run, logits, top_k, normalise, dtype, policy))


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
    if rows.device != routing.places.device:
        raise BackendError(f"combine: rows are on {rows.device}, the routing on {routing.places.device}")
    weights, places, order = routing.weights, routing.places, routing.order
    if library.is_traced():
        return library.combine(rows, weights, places, order, policy)
    needs_grad = any_requires_grad(rows, weights)
    run = COMBINE.select(rows, policy, needs_grad)
    if not needs_grad:
        return run(rows, weights, places)
    combined: Tensor = _Combine.apply(run, rows, weights, places, order, policy)
    return combined


# weights [T, k], experts [T, k], order [T · k], places [T, k], offsets [E + 1]: what `Routing` holds
Routed = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def reference(logits: Tensor, top_k: int, normalise: bool, weights_dtype: torch.dtype) -> Routed:
    tokens, num_experts = logits.shape
    ranked = logits.float().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    experts = ranked.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    precise = logits.to(accumulator(logits.dtype))
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
    return (
        weights.to(weights_dtype), experts.to(int32), order.to(int32), places.view(tokens, top_k).to(int32),
        counts.cumsum(0).to(int32),
    )  # fmt: skip


def backward_reference(logits: Tensor, experts: Tensor, grad: Tensor, normalise: bool) -> Tensor:
    """Of w = softmax(l)[experts]: dl = p (g - sum(w g)), g at the chosen experts and 0 elsewhere; where the weights are
    normalised the softmax is that of the chosen logits alone, and so is dl. grad: [T, k] -> [T, E] in logits' dtype."""
    wide = accumulator(logits.dtype)
    precise, grad, experts = logits.to(wide), grad.to(wide), experts.long()
    if normalise:
        share = torch.softmax(precise.gather(1, experts), -1)
        slope = share * (grad - (share * grad).sum(-1, keepdim=True))
        return torch.zeros_like(precise).scatter_(1, experts, slope).to(logits.dtype)
    share = torch.softmax(precise, -1)
    upstream = torch.zeros_like(precise).scatter_(1, experts, grad)
    return (share * (upstream - (share * upstream).sum(-1, keepdim=True))).to(logits.dtype)


def combine_reference(rows: Tensor, weights: Tensor | None, places: Tensor) -> Tensor:
    """rows: [T · k, H], weights: [T, k] or None for ones, places: [T, k] -> [T, H]."""
    wide = accumulator(rows.dtype)
    total = torch.zeros(places.shape[0], rows.shape[1], dtype=wide, device=rows.device)
    for j in range(places.shape[1]):
        row = rows[places[:, j].long()].to(wide)
        total = total + (row if weights is None else row * weights[:, j : j + 1].to(wide))
    return total.to(rows.dtype)


def combine_backward_reference(
    rows: Tensor, weights: Tensor, order: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Of one sorted row: d row = w · g of its token, d w = <row, g>."""
    wide = accumulator(rows.dtype)
    slots = order.long()
    upstream = grad.to(wide)[slots // weights.shape[1]]
    grad_rows = (upstream * weights.flatten()[slots].to(wide)[:, None]).to(rows.dtype)
    grad_weights = torch.empty_like(weights, memory_format=torch.contiguous_format)
    grad_weights.view(-1)[slots] = (upstream * rows).sum(-1).to(weights.dtype)
    return grad_rows, grad_weights


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[Tensor, int, bool, torch.dtype], Routed],
        logits: Tensor,
        top_k: int,
        normalise: bool,
        weights_dtype: torch.dtype,
        policy: Policy,
    ) -> Routed:
        routed = run(logits, top_k, normalise, weights_dtype)
        ctx.normalise, ctx.policy = normalise, policy
        ctx.save_for_backward(logits, routed[1])
        ctx.mark_non_differentiable(*routed[1:])
        return routed

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, experts = ctx.saved_tensors
        gradient = ROUTE_BACKWARD.select(logits, ctx.policy)(logits, experts, grad, ctx.normalise)
        return None, gradient, None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[Tensor, Tensor | None, Tensor], Tensor],
        rows: Tensor,
        weights: Tensor,
        places: Tensor,
        order: Tensor,
        policy: Policy,
    ) -> Tensor:
        ctx.policy = policy
        ctx.save_for_backward(rows, weights, order)
        return run(rows, weights, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, order = ctx.saved_tensors
        gradients = COMBINE_BACKWARD.select(rows, ctx.policy)(rows, weights, order, grad)
        return None, *gradients, None, None, None


def _triton(logits: Tensor, top_k: int, normalise: bool, weights_dtype: torch.dtype) -> Routed:
    from mainspring.ops.triton import routing as kernels

    return kernels.route(logits, top_k, normalise, weights_dtype)


def _triton_backward(logits: Tensor, experts: Tensor, grad: Tensor, normalise: bool) -> Tensor:
    from mainspring.ops.triton import routing as kernels

    return kernels.route_backward(logits, experts, grad, normalise)


def _triton_combine(rows: Tensor, weights: Tensor | None, places: Tensor) -> Tensor:
    from mainspring.ops.triton import routing as kernels

    return kernels.combine(rows, weights, places)


def _triton_combine_backward(
    rows: Tensor, weights: Tensor, order: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    from mainspring.ops.triton import routing as kernels

    return kernels.combine_backward(rows, weights, order, grad)


ROUTE = Operation(
    "route",
    Implementation("cpu", reference, cpu_refuses),
    Implementation("triton", _triton, triton_refuses),
    Implementation("reference", reference, accepts_floats),
)
ROUTE_BACKWARD = Operation(
    "route_backward",
    Implementation("cpu", backward_reference, cpu_refuses),
    Implementation("triton", _triton_backward, triton_refuses),
    Implementation("reference", backward_reference, accepts_floats),
)
COMBINE = Operation(
    "combine",
    Implementation("cpu", combine_reference, cpu_refuses),
    Implementation("triton", _triton_combine, triton_refuses),
    Implementation("reference", combine_reference, accepts_floats),
)
COMBINE_BACKWARD = Operation(
    "combine_backward",
    Implementation("cpu", combine_backward_reference, cpu_refuses),
    Implementation("triton", _triton_combine_backward, triton_refuses),
    Implementation("reference", combine_backward_reference, accepts_floats),
)
