"""log softmax(z / temperature)[target]: the one routine behind the engine's and the trainer's log-probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mainspring.ops.cpu import log_probs as cpu
from mainspring.ops.cpu.support import refuses
from mainspring.ops.logit_loss import LossOptions, WeightGradient, logit_loss, product_for
from mainspring.ops.policy import LOCKSTEP, Policy
from mainspring.ops.precision import accumulator
from mainspring.ops.registry import Implementation, Operation, accepts_all
from mainspring.ops.triton.support import refuses as triton_refuses

LOGIT_CHUNK_ELEMENTS = 1 << 24  # logits held at once, 64 MB of fp32


def token_log_probs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, *, policy: Policy = LOCKSTEP
) -> Tensor:
    """logits: [M, V] float32, targets: [M] int64 -> [M] float32: log softmax(logits / temperature)[target]."""
    return TOKEN_LOG_PROBS.select(logits, policy)(logits, targets, temperature)


def token_log_probs_and_entropy(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, *, policy: Policy = LOCKSTEP
) -> tuple[Tensor, Tensor]:
    """(token_log_probs to the same bits, entropy in nats of softmax(logits / temperature)), each [M] float32."""
    return TOKEN_LOG_PROBS_AND_ENTROPY.select(logits, policy)(logits, targets, temperature)


def linear_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, *, policy: Policy = LOCKSTEP
) -> Tensor:
    """token_log_probs(hidden weightᵀ, targets), in chunks of rows: the logits are never held all at once.

    hidden: [M, H], weight: [V, H], targets: [M] int64 -> [M] float32, differentiable once.
    """
    result: Tensor = _LinearLogProbs.apply(hidden, weight, targets, temperature, False, policy)[0]
    return result


def linear_log_probs_and_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, *, policy: Policy = LOCKSTEP
) -> tuple[Tensor, Tensor]:
    """(`linear_log_probs` to the same bits, entropy in nats of softmax(hidden weightᵀ / temperature)).

    hidden: [M, H], weight: [V, H], targets: [M] int64 -> two of [M] float32, both differentiable once.
    """
    result: tuple[Tensor, Tensor] = _LinearLogProbs.apply(hidden, weight, targets, temperature, True, policy)
    return result


def rows_per_chunk(vocab_size: int, device: torch.device | None = None) -> int:
    """How many rows of logits are held at once: on a GPU a 32nd of its memory, for a chunk's products are then
    large and its weight gradients few."""
    elements = LOGIT_CHUNK_ELEMENTS
    if device is not None and device.type == "cuda":
        elements = max(elements, torch.cuda.get_device_properties(device).total_memory // (32 * 4))
    return max(16, elements // vocab_size)


def reference(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    # One row at a time would be the plain formula; torch reduces rows of a 2-D tensor independently already.
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    return log_p.gather(1, targets[:, None])[:, 0]


def entropy_reference(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return reference(logits, targets, temperature), _entropy(logits, temperature)


def _entropy(logits: Tensor, temperature: float) -> Tensor:
    terms: Tensor = torch.special.entr(torch.softmax(logits / temperature, dim=-1))
    return terms.sum(-1)


class _LinearLogProbs(torch.autograd.Function):
    """Backward recomputes each chunk's logits, which become their gradient.

    With x = z / t, p = softmax(x) and H the entropy: d log p[target] / dz = (onehot - p) / t and
    dH / dz = -p (log p + H) / t.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        entropy: bool,
        policy: Policy,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.policy, ctx.with_entropy = temperature, policy, entropy
        ctx.set_materialize_grads(False)
        needs_grad = any(ctx.needs_input_grad)
        rows = rows_per_chunk(weight.shape[0], hidden.device)
        log_probs, entropies = [], []
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = product_for(h, weight, policy, needs_grad)
            if entropy:
                both = token_log_probs_and_entropy(logits, t, temperature, policy=policy)
                log_probs.append(both[0])
                entropies.append(both[1])
            else:
                log_probs.append(token_log_probs(logits, t, temperature, policy=policy))
        return torch.cat(log_probs), torch.cat(entropies) if entropy else None

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        if grad is None and grad_entropy is None:
            return None, None, None, None, None, None
        wide = accumulator(hidden.dtype)
        row_weights = torch.zeros(targets.shape, dtype=wide, device=hidden.device) if grad is None else -grad
        # No target of a log-probability is left out: an index that none can have.
        options = LossOptions(temperature=ctx.temperature, ignore_index=-1 << 31)
        grads = recomputed_gradients(hidden, weight, targets, options, row_weights, grad_entropy, ctx.policy)
        return *grads, None, None, None, None


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
    grad_hidden = torch.empty_like(hidden)
    grad_weight = WeightGradient(weight.dtype, -(-hidden.shape[0] // rows))
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
        return grad_hidden, torch.zeros_like(weight)
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
    Implementation("reference", reference, accepts_all),
)
TOKEN_LOG_PROBS_AND_ENTROPY = Operation(
    "token_log_probs_and_entropy",
    Implementation("cpu", _cpu_with_entropy, refuses),
    Implementation("triton", _triton_with_entropy, triton_refuses),
    Implementation("reference", entropy_reference, accepts_all),
)
