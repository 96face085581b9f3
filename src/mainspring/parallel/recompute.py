"""Selective recomputation: what is cheap to compute is not kept for the backward pass, but computed again there.

As in Megatron-LM (Korthikanti et al., arXiv 2205.05198, section 5, and its later "output-discarding" form). Of a layer
are kept: the two sums of the residual stream, the projection qkv and the projection gate_up (of experts also the rows
that were sent to them and came back, and the router's logits). Computed again: norms, the rotation of queries and
keys, attention itself, and the gated product. No matrix product of a weight is computed twice.

A product keeps its input for its own gradient, so throwing away what a norm gave takes more than not keeping it: its
memory is emptied once the product has read it, and filled again just before the product's backward pass begins.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mainspring import ops
from mainspring.model.layers import DecoderLayer, Mlp, RmsNorm
from mainspring.ops import Policy, RopeAngles, TokenBatch


def run_layer(
    layer: DecoderLayer, update: Tensor | None, residual: Tensor, batch: TokenBatch, angles: RopeAngles
) -> tuple[Tensor, Tensor]:
    """As the layer's forward pass, with the same bits; see above for what it keeps."""
    attention = layer.attention
    x, residual = _norm(layer.input_norm, update, residual)
    qkv = attention.qkv(x)
    forget(x, qkv)
    attended = forgettable(partial(attention.attend, batch=batch, angles=angles), qkv)
    update = attention.output(attended)
    forget(attended, update)
    x, residual = _norm(layer.post_attention_norm, update, residual)
    if isinstance(layer.mlp, Mlp):
        gate_up = layer.mlp.gate_up(x)
        forget(x, gate_up)
        inner = forgettable_swiglu(gate_up, policy=layer.mlp.policy)
        out: Tensor = layer.mlp.down(inner)
        forget(inner, out)
        return out, residual
    out = layer.mlp(x)
    forget(x, out)
    return out, residual


def forgettable(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """run(x), of which nothing but x is kept; `forget` may throw the output away as well.

    run must give the same bits each time, and a tensor that shares no memory with x. Parameters inside it get their
    gradients, as in `torch.utils.checkpoint`.
    """
    if not torch.is_grad_enabled():
        return run(x)
    out: Tensor = _Forgettable.apply(run, x)
    return out


def forgettable_swiglu(gate_up: Tensor, *, policy: Policy) -> Tensor:
    """The gated product by `forgettable`."""
    return forgettable(partial(ops.swiglu, policy=policy), gate_up)


def forget(x: Tensor, after: Tensor) -> None:
    """Empties the memory of x, an output of `forgettable` or of a norm here, until `after` has its gradient.

    `after` must come from x and be what all that keep x lead to: then x is there again when they need it.
    """
    if x.grad_fn is None or not after.requires_grad:
        return
    node, storage, like = x.grad_fn, x.untyped_storage(), x.detach().to("meta")
    size = storage.nbytes()
    if size != x.numel() * x.element_size():
        return  # its memory holds something else as well
    storage.resize_(0)

    def restore(grad: Tensor) -> None:
        storage.resize_(size)
        again = _again(node).detach()
        again.new_empty(0).set_(storage, 0, like.shape, like.stride()).copy_(again)

    after.register_hook(restore)


def _norm(norm: RmsNorm, update: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
    """(norm(update + residual), update + residual); of both the sum alone is kept."""
    if not torch.is_grad_enabled():
        return (norm(residual), residual) if update is None else norm.add(update, residual)
    if update is None:
        return forgettable(norm, residual), residual
    x, total = _ForgettableSum.apply(norm, update, residual)
    return x, total


def _again(node: Any) -> Tensor:
    """Computes a node's output again from what it has kept; its backward pass then starts from there."""
    (kept,) = node.saved_tensors
    node.leaf = kept.detach().requires_grad_()
    with torch.enable_grad():
        node.computed = node.run(node.leaf)
    out: Tensor = node.computed
    return out


def _backward(node: Any, grad: Tensor) -> Tensor | None:
    """The gradient of what was kept. Parameters take theirs on the way."""
    if node.computed is None:  # nobody has asked for the output again
        _again(node)
    computed, leaf = node.computed, node.leaf
    node.computed = node.leaf = None
    torch.autograd.backward(computed, grad)
    gradient: Tensor | None = leaf.grad
    return gradient


class _Forgettable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.run, ctx.computed, ctx.leaf = run, None, None
        ctx.save_for_backward(x)
        with torch.enable_grad():  # so that the same implementation is chosen as later
            return run(x.detach().requires_grad_()).detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, _backward(ctx, grad)


class _ForgettableSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, norm: RmsNorm, update: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x, total = norm.add(update.detach().requires_grad_(), residual.detach().requires_grad_())
        x, total = x.detach(), total.detach()
        ctx.run, ctx.computed, ctx.leaf = norm, None, None
        ctx.save_for_backward(total)
        return x, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        gradient = _backward(ctx, grad)
        total = grad_total if gradient is None else gradient.add_(grad_total)
        return None, total, total
