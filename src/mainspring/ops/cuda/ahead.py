"""What a served model needs of the CUDA C++ kernels, compiled side by side before it is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mainspring.ops.cuda import compiler, flash_forward, linear, paged_attention
from mainspring.ops.cuda.support import refuses
from mainspring.ops.policy import Policy
from mainspring.ops.registry import Call


def build_for_serving(
    head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype, windows: Sequence[int | None], policy: Policy
) -> None:
    """Starts compiling the kernels of a model's steps on a paged cache, and returns; where they do not serve, nothing.

    The first use of a kernel waits for it then, and raises its errors. windows: of the layers.
    """
    device = torch.device("cuda")
    served = (
        policy.backend in (None, "cuda")
        and refuses(Call(device.type, dtype, policy, False, head_dim)) is None
    )
    if not served:
        return
    kernels = [paged_attention.kernel(head_dim, dtype, cache_dtype == paged_attention.FP8)]
    if cache_dtype == dtype:
        kernels += [
            flash_forward.paged_kernel(head_dim, dtype, windowed) for windowed in {bool(w) for w in windows}
        ]
    compiler.build_ahead(kernels)
    linear.build_ahead(dtype)
    linear.build_ahead(dtype, gated=True)
