"""Cross-entropy of logits that are at hand, and its gradient in their place: what the fused losses do with a chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops.accumulated_product import accumulate_product
from mainspring.ops.cpu.support import refuses as cpu_refuses
from mainspring.ops.linear import LINEAR
from mainspring.ops.policy import Policy
from mainspring.ops.precision import accumulator
from mainspring.ops.registry import Implementation, Operation, accepts_floats
from mainspring.ops.triton.support import refuses as triton_refuses

IGNORE_INDEX = -100
LOGIT_CHUNK_ELEMENTS = 1 << 24  # logits held at once, 64 MB of fp32


@dataclass(frozen=True)
class LossOptions:
    """What is computed of a row of logits z: with x = softcap · tanh(z / softcap) / temperature (or z / temperature),
    lse = logsumexp(x), e = label_smoothing: (1 - e) (lse - x[target]) + e (lse - mean x) + z_loss · lse².

    Sources: label smoothing, arXiv 1512.00567, section 7; z-loss, PaLM, arXiv 2204.02311, section 5; soft-cap,
    Gemma 2, arXiv 2408.00118, section 2. Raises BackendError for a value out of range.
    """

    temperature: float = 1.0
    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    ignore_index: int = IGNORE_INDEX

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise BackendError(f"temperature must be greater than 0, not {self.temperature}")
        if self.softcap is not None and not self.softcap > 0:
            raise BackendError(f"softcap must be greater than 0 or None, not {self.softcap}")
        if not 0 <= self.label_smoothing < 1:
            raise BackendError(f"label_smoothing must be in [0, 1), not {self.label_smoothing}")
        if not self.z_loss >= 0:
            raise BackendError(f"z_loss must be at least 0, not {self.z_loss}")


def logit_loss(
    logits: Tensor,
    targets: Tensor,
    options: LossOptions,
    weights: Tensor | None,
    entropy_weights: Tensor | None,
    gradient_dtype: torch.dtype | None,
    policy: Policy,
) -> tuple[Tensor, Tensor | None]:
    """(loss of each row, gradient by the logits of sum weights · loss + entropy_weights · entropy).

    logits: [M, V] float32 or float64, used up; targets: [M] int64; weights: [M] in the logits' dtype or None for
    ones; entropy_weights: [M] or None for zeros; gradient_dtype: None for no gradient
    -> ([M], [M, V] of gradient_dtype or None). A row whose target is ignore_index has loss and gradient 0.
    """
    run = LOGIT_LOSS.select(logits, policy)
    return run(logits, targets, options, weights, entropy_weights, gradient_dtype)


def product_for(hidden: Tensor, weight: Tensor, policy: Policy, needs_grad: bool) -> Tensor:
    """hidden weightᵀ [M, V], contiguous, in float32 (float64 for float64)."""
    out_dtype = accumulator(hidden.dtype)
    if policy.numerics == "fast" and policy.backend is None and _narrow_on_cuda(hidden):
        return torch.mm(hidden, weight.t(), out_dtype=out_dtype)
    return LINEAR.select(hidden, policy, needs_grad)(hidden, weight, None, out_dtype, policy)


class WeightGradient:
    """sum over chunks of d_logitsᵀ hidden, [V, H]: in the weight's dtype if one chunk is all, else in `accumulator`."""

    def __init__(self, dtype: torch.dtype, chunks: int) -> None:
        # Unscaled sums of float16 products can exceed its largest value.
        keep = chunks <= 1 and dtype is not torch.float16
        self.dtype = dtype if keep else accumulator(dtype)
        self.total: Tensor | None = None

    def add(self, d_logits: Tensor, hidden: Tensor) -> None:
        a, first = d_logits.t(), self.total is None
        if self.total is None:
            self.total = torch.empty(a.shape[0], hidden.shape[1], dtype=self.dtype, device=hidden.device)
        accumulate_product(self.total, a, hidden, add=not first)


def rows_per_chunk(vocab_size: int, device: torch.device | None = None) -> int:
    """How many rows of logits are held at once: on a GPU a 32nd of its memory, for a chunk's products are then
    large and its weight gradients few."""
    elements = LOGIT_CHUNK_ELEMENTS
    if device is not None and device.type == "cuda":
        elements = max(elements, torch.cuda.get_device_properties(device).total_memory // (32 * 4))
    return max(16, elements // vocab_size)


def weight_gradient_of(hidden: Tensor, weight: Tensor) -> WeightGradient:
    """The sum for this product's chunks: its dtype depends on how many they are."""
    return WeightGradient(weight.dtype, -(-hidden.shape[0] // rows_per_chunk(weight.shape[0], hidden.device)))


def _narrow_on_cuda(tensor: Tensor) -> bool:
    """Whether torch's products of such tensors can give float32 (its CPU ones cannot)."""
    return tensor.is_cuda and tensor.dtype in (torch.bfloat16, torch.float16)


def reference(
    logits: Tensor,
    targets: Tensor,
    options: LossOptions,
    weights: Tensor | None,
    entropy_weights: Tensor | None,
    gradient_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """The formulas on whole rows; the log-probabilities become the gradient in place."""
    e, z_loss, softcap = options.label_smoothing, options.z_loss, options.softcap
    kept = targets != options.ignore_index
    target = torch.where(kept, targets, 0)[:, None]
    slope = None  # of the soft-cap
    if softcap is not None:
        bent = torch.tanh(logits / softcap)
        logits = bent * softcap
        slope = 1 - bent.square_()
    if options.temperature != 1.0:
        logits = logits / options.temperature
    log_p = torch.log_softmax(logits, dim=-1)
    lse = torch.logsumexp(logits, dim=-1) if z_loss else None
    del logits
    losses = -log_p.gather(1, target)[:, 0]
    if e:
        losses = (1 - e) * losses - e * log_p.mean(-1)
    if lse is not None:
        losses = losses + z_loss * lse.square()
    losses = torch.where(kept, losses, 0)
    if gradient_dtype is None:
        return losses, None
    row_weights = kept.to(log_p.dtype) if weights is None else torch.where(kept, weights, 0).to(log_p.dtype)
    entropy_gradient = None
    if entropy_weights is not None:
        p = log_p.exp()
        entropy = -(p * log_p).sum(-1, keepdim=True)
        factor = torch.where(kept, entropy_weights, 0)[:, None]
        entropy_gradient = p.mul_(log_p.add(entropy)).mul_(-factor)
    gradient = log_p.exp_()
    if lse is not None:
        gradient.mul_((1 + 2 * z_loss * lse)[:, None])
    gradient.scatter_add_(1, target, gradient.new_full((target.shape[0], 1), e - 1.0))
    if e:
        gradient.sub_(e / gradient.shape[1])
    gradient.mul_(row_weights[:, None])
    if entropy_gradient is not None:
        gradient.add_(entropy_gradient)
    if options.temperature != 1.0:
        gradient.div_(options.temperature)
    if slope is not None:
        gradient.mul_(slope)
    return losses, gradient.to(gradient_dtype)


def _triton(
    logits: Tensor,
    targets: Tensor,
    options: LossOptions,
    weights: Tensor | None,
    entropy_weights: Tensor | None,
    gradient_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    from mainspring.ops.triton import cross_entropy as triton

    return triton.cross_entropy(
        logits,
        targets,
        temperature=options.temperature,
        softcap=options.softcap,
        label_smoothing=options.label_smoothing,
        z_loss=options.z_loss,
        ignore_index=options.ignore_index,
        weights=weights,
        entropy_weights=entropy_weights,
        gradient_dtype=gradient_dtype,
    )


def scaled(x: Tensor, scale: Tensor, dtype: torch.dtype, policy: Policy) -> Tensor:
    """x · scale (a scalar of float32) in dtype: a scale rounded to bf16 first would bend every gradient one way."""
    return SCALED.select(x, policy)(x, scale, dtype)


def _scaled_reference(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mul(x, scale.view(1), out=torch.empty(x.shape, dtype=dtype, device=x.device))


def _scaled_triton(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    from mainspring.ops.triton.cross_entropy import scaled as triton_scaled

    return triton_scaled(x, scale, dtype)


SCALED = Operation(
    "scaled",
    Implementation("cpu", _scaled_reference, cpu_refuses),
    Implementation("triton", _scaled_triton, triton_refuses),
    Implementation("reference", _scaled_reference, accepts_floats),
)
LOGIT_LOSS = Operation(
    "logit_loss",
    Implementation(
        "cpu", reference, cpu_refuses
    ),  # torch's row-wise functions serve the CPU kernels' policy too
    Implementation("triton", _triton, triton_refuses),
    Implementation("reference", reference, accepts_floats),
)
