"""liger-kernel's kernels as peers, where that package is installed (Hsu et al., arXiv 2410.10989).

Each function returns the calls to time, or nothing without the package.
"""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor

from kernel_groups.timing import Calls

NAME = "liger-kernel"
PRESENT = find_spec("liger_kernel") is not None
EPS, OFFSET, CASTING = 1e-5, 0.0, "llama"
Peers = dict[str, Calls]


def rms_norm(x: Tensor, weight: Tensor) -> Peers:
    if not PRESENT:
        return {}
    from liger_kernel.ops.rms_norm import rms_norm_forward

    return {NAME: [lambda: rms_norm_forward(x, weight, EPS, OFFSET, CASTING, None)]}


def rms_norm_backward(x: Tensor, weight: Tensor, grad: Tensor) -> Peers:
    if not PRESENT:
        return {}
    from liger_kernel.ops.rms_norm import rms_norm_backward, rms_norm_forward

    _, rows, scales, block, warps, casting = rms_norm_forward(x, weight, EPS, OFFSET, CASTING, None)
    arguments = grad, rows, weight, scales, OFFSET, casting, block, warps, False, None
    return {NAME: [lambda: rms_norm_backward(*arguments)]}


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Peers:
    if not PRESENT:
        return {}
    from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_forward

    return {NAME: [lambda: fused_add_rms_norm_forward(x, residual, weight, EPS, OFFSET, CASTING)]}


def add_rms_norm_backward(x: Tensor, residual: Tensor, weight: Tensor, grad: Tensor) -> Peers:
    """The gradient of the sum comes from both results, as it does in ours."""
    if not PRESENT:
        return {}
    from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_backward, fused_add_rms_norm_forward

    _, total, scales, *launch = fused_add_rms_norm_forward(x, residual, weight, EPS, OFFSET, CASTING)
    block, warps, stages, casting = launch
    arguments = grad, residual, total, weight, scales, OFFSET, casting, block, warps, stages, False
    return {NAME: [lambda: fused_add_rms_norm_backward(*arguments)]}


def swiglu(gate_up: Tensor) -> Peers:
    if not PRESENT:
        return {}
    from liger_kernel.ops.swiglu import swiglu_fused_gate_up_forward

    return {NAME: [lambda: swiglu_fused_gate_up_forward(gate_up)]}


def swiglu_backward(gate_up: Tensor, grad: Tensor) -> Peers:
    if not PRESENT:
        return {}
    from liger_kernel.ops.swiglu import swiglu_fused_gate_up_backward

    return {NAME: [lambda: swiglu_fused_gate_up_backward(gate_up, grad)]}


def rope(q: Tensor, k: Tensor, angles: Tensor) -> Peers:
    """q: [T, Hq, D], k: [T, Hkv, D], angles: [T, D / 2]; its tables of sines and cosines are made beforehand."""
    if not PRESENT:
        return {}
    from liger_kernel.ops.rope import rope_forward

    cos, sin = (table.repeat(1, 2).to(q.dtype) for table in (angles.cos(), angles.sin()))
    heads_first = [x.contiguous()[None].transpose(1, 2) for x in (q, k)]  # rotated in place
    return {NAME: [lambda: rope_forward(*heads_first, cos, sin)]}


def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Linear + cross-entropy."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    value: Tensor = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets)[0]
    return value
