"""log softmax(z / temperature)[target]: the one routine behind the engine's and the trainer's log-probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mainspring.ops import library
from mainspring.ops.checks import check_indices, check_product, check_targets, described, reject
from mainspring.ops.cpu import log_probs as cpu
from mainspring.ops.cpu.support import refuses
from mainspring.ops.linear import linear
from mainspring.ops.logit_loss import (
    LossOptions,
    logit_loss,
    product_for,
    rows_per_chunk,
    weight_gradient_of,
)
from mainspring.ops.policy import LOCKSTEP, Policy
from mainspring.ops.precision import accumulator
from mainspring.ops.quantised_linear import QuantisedWeight
from mainspring.ops.registry import Implementation, Operation, accepts_floats, any_requires_grad
from mainspring.ops.triton.support import refuses as triton_refuses


def token_log_probs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, *, policy: Policy = LOCKSTEP
) -> Tensor:
    """logits: [M, V] float32, targets: [M] int64 -> [M] float32: log softmax(logits / temperature)[target].

    Differentiable once. Raises BackendError.
    """
    _check_logits(logits, targets, temperature)
    if library.is_traced():
        return library.token_log_probs(logits, targets, temperature, policy)
    if not any_requires_grad(logits):
        return TOKEN_LOG_PROBS.select(logits, policy)(logits, targets, temperature)
    result: Tensor = _TokenLogProbs.apply(logits, targets, temperature, False, policy)[0]
    return result


def token_log_probs_and_entropy(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, *, policy: Policy = LOCKSTEP
) -> tuple[Tensor, Tensor]:
    """(token_log_probs to the same bits, entropy in nats of softmax(logits / temperature)), each [M] float32.

    Both are differentiable once. Raises BackendError.
    """
    _check_logits(logits, targets, temperature)
    if library.is_traced():
        return library.token_log_probs_and_entropy(logits, targets, temperature, policy)
    if not any_requires_grad(logits):
        return TOKEN_LOG_PROBS_AND_ENTROPY.select(logits, policy)(logits, targets, temperature)
    result: tuple[Tensor, Tensor] = _TokenLogProbs.apply(logits, targets, temperature, True, policy)
    return result


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor | QuantisedWeight,
    targets: Tensor,
    temperature: float = 1.0,
    *,
    policy: Policy = LOCKSTEP,
) -> Tensor:
    """token_log_probs(hidden weightᵀ, targets), in chunks of rows: the logits are never held all at once.

    hidden: [M, H], weight: [V, H], targets: [M] int64 -> [M] float32, differentiable once. Raises BackendError.
    """
    _check_linear(hidden, weight, targets, temperature)
    if isinstance(weight, QuantisedWeight):  # never trained: no backward pass to keep anything for
        rows = rows_per_chunk(weight.shape[0], hidden.device)
        products = (linear(h, weight, out_dtype=torch.float32, policy=policy) for h in hidden.split(rows))
        pairs = zip(products, targets.split(rows), strict=True)
        return torch.cat([token_log_probs(z, t, temperature, policy=policy) for z, t in pairs])
    if library.is_traced():
        return library.linear_log_probs(hidden, weight, targets, temperature, policy)
    needs_grad = any_requires_grad(hidden, weight)
    result: Tensor = _LinearLogProbs.apply(hidden, weight, targets, temperature, False, policy, needs_grad)[0]
    return result


def linear_log_probs_and_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, *, policy: Policy = LOCKSTEP
) -> tuple[Tensor, Tensor]:
    """(`linear_log_probs` to the same bits, entropy in nats of softmax(hidden weightᵀ / temperature)).

    hidden: [M, H], weight: [V, H], targets: [M] int64 -> two of [M] float32, both differentiable once. Raises
    BackendError.
    """
    _check_linear(hidden, weight, targets, temperature)
    if library.is_traced():
        return library.linear_log_probs_and_entropy(hidden, weight, targets, temperature, policy)
    needs_grad = any_requires_grad(hidden, weight)
    result: tuple[Tensor, Tensor] = _LinearLogProbs.apply(
        hidden, weight, targets, temperature, True, policy, needs_grad
    )
    return result


def _check_logits(logits: Tensor, targets: Tensor, temperature: float) -> None:
    if logits.dim() != 2 or logits.dtype not in (torch.float32, torch.float64):
        raise reject("token_log_probs", f"logits must be [M, V] float32, not {described(logits)}")
    _check_rows("token_log_probs", targets, logits, logits.shape[1], temperature)


def _check_linear(
    hidden: Tensor, weight: Tensor | QuantisedWeight, targets: Tensor, temperature: float
) -> None:
    if isinstance(weight, Tensor):
        check_product("linear_log_probs", hidden, weight)
    _check_rows("linear_log_probs", targets, hidden, weight.shape[0], temperature)


def _check_rows(operation: str, targets: Tensor, rows: Tensor, vocab_size: int, temperature: float) -> None:
    check_targets(operation, targets, rows)
    if not temperature > 0:
        raise reject(operation, f"temperature must be greater than 0, not {temperature}")
    check_indices(operation, "target", targets, vocab_size)


def reference(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    # One row at a time would be the plain formula; torch reduces rows of a 2-D tensor independently already.
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    return log_p.gather(1, targets[:, None])[:, 0]


def entropy_reference(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return reference(logits, targets, temperature), _entropy(logits, temperature)


def _entropy(logits: Tensor, temperature: float) -> Tensor:
    terms: Tensor = torch.special.entr(torch.softmax(logits / temperature, dim=-1))
    return terms.sum(-1)


def options_at(temperature: float) -> LossOptions:
    """A log-probability as a negative loss, no target of which is left out: by an index that none can have."""
    return LossOptions(temperature=temperature, ignore_index=-1 << 31)


def logits_gradient(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    grad: Tensor,
    grad_entropy: Tensor | None,
    policy: Policy,
) -> Tensor:
    """The gradient of logits [M, V] from those of their tokens' log-probabilities and of the entropies, [M] each."""
    grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
    copy = logits.clone(memory_format=torch.contiguous_format)  # which is used up
    options = options_at(temperature)
    gradient = logit_loss(copy, targets, options, -grad, grad_entropy, logits.dtype, policy)[1]
    assert gradient is not None  # a dtype was given
    return gradient


class _TokenLogProbs(torch.autograd.Function):
    """With x = z / t, p = softmax(x) and H the entropy: d log p[target] / dz = (onehot - p) / t and
    dH / dz = -p (log p + H) / t."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool, policy: Policy
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(logits, targets)
        ctx.temperature, ctx.policy, ctx.with_entropy = temperature, policy, with_entropy
        if with_entropy:
            return TOKEN_LOG_PROBS_AND_ENTROPY.select(logits, policy)(logits, targets, temperature)
        return TOKEN_LOG_PROBS.select(logits, policy)(logits, targets, temperature), None

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets = ctx.saved_tensors
        of_entropy = grad_entropy if ctx.with_entropy else None
        gradient = logits_gradient(logits, targets, ctx.temperature, grad, of_entropy, ctx.policy)
        return gradient, None, None, None, None


class _LinearLogProbs(torch.autograd.Function):
    """Backward recomputes each chunk's logits, which become their gradient (that of `_TokenLogProbs`)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        with_entropy: bool,
        policy: Policy,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.policy = temperature, policy
        ctx.set_materialize_grads(False)
        return chunked_log_probs(hidden, weight, targets, temperature, with_entropy, policy, needs_grad)

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        if grad is None and grad_entropy is None:
            return (None,) * 7
        wide = accumulator(hidden.dtype)
        row_weights = torch.zeros(targets.shape, dtype=wide, device=hidden.device) if grad is None else -grad
        options = options_at(ctx.temperature)
        grads = recomputed_gradients(hidden, weight, targets, options, row_weights, grad_entropy, ctx.policy)
        return *grads, None, None, None, None, None


def chunked_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    with_entropy: bool,
    policy: Policy,
    needs_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """(log-probabilities, entropies or None) of the rows, a chunk of logits at a time; nothing is recorded."""
    rows = rows_per_chunk(weight.shape[0], hidden.device)
    log_probs, entropies = [], []
    for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = product_for(h, weight, policy, needs_grad)
        if with_entropy:
            both = TOKEN_LOG_PROBS_AND_ENTROPY.select(logits, policy)(logits, t, temperature)
            log_probs.append(both[0])
            entropies.append(both[1])
        else:
            log_probs.append(TOKEN_LOG_PROBS.select(logits, policy)(logits, t, temperature))
    return torch.cat(log_probs), torch.cat(entropies) if with_entropy else None


def recomputed_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    options: LossOptions,
    row_weights: Tensor,
    entropy_weights: Tensor | None,
    policy: Policy,
) -> tuple[Tensor, Tensor]:
    """Gradients by hidden and weight of sum row_weights · loss + entropy_weights · entropy (see `logit_loss`)."""
    rows = rows_per_chunk(weight.shape[0], hidden.device)
    grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    grad_weight = weight_gradient_of(hidden, weight)
    for first in range(0, hidden.shape[0], rows):
        chunk = slice(first, first + rows)
        logits = product_for(hidden[chunk], weight, policy, True)
        _, d_logits = logit_loss(
            logits,
            targets[chunk],
            options,
            row_weights[chunk],
            None if entropy_weights is None else entropy_weights[chunk],
            hidden.dtype,
            policy,
        )
        del logits
        assert d_logits is not None  # a dtype was given
        torch.mm(d_logits, weight, out=grad_hidden[chunk])
        grad_weight.add(d_logits, hidden[chunk])
    if grad_weight.total is None:
        return grad_hidden, torch.zeros_like(weight, memory_format=torch.contiguous_format)
    return grad_hidden, grad_weight.total.to(weight.dtype)


def _triton(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    from mainspring.ops.triton.log_probs import token_log_probs as triton_token_log_probs

    return triton_token_log_probs(logits, targets, temperature)


def _cpu_with_entropy(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return cpu.token_log_probs(logits, targets, temperature), _entropy(logits, temperature)


def _triton_with_entropy(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    from mainspring.ops.triton import log_probs as triton

    return triton.token_log_probs_and_entropy(logits, targets, temperature)


TOKEN_LOG_PROBS = Operation(
    "token_log_probs",
    Implementation("cpu", cpu.token_log_probs, refuses),
    Implementation("triton", _triton, triton_refuses),
    Implementation("reference", reference, accepts_floats),
)
TOKEN_LOG_PROBS_AND_ENTROPY = Operation(
    "token_log_probs_and_entropy",
    Implementation("cpu", _cpu_with_entropy, refuses),
    Implementation("triton", _triton_with_entropy, triton_refuses),
    Implementation("reference", entropy_reference, accepts_floats),
)
