"""Logits as a request wants them: tokens that are forbidden, biases, and penalties for what the text has already."""

from __future__ import annotations

import torch
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops import library
from mainspring.ops.checks import check_indices
from mainspring.ops.cpu.adjust_logits import adjust_logits as cpu_adjust_logits
from mainspring.ops.policy import LOCKSTEP, Policy
from mainspring.ops.registry import Call, Implementation, Operation, accepts_floats
from mainspring.ops.sampling_tensors import SamplingTensors
from mainspring.ops.triton.support import refuses as triton_refuses


def adjust_logits(
    logits: Tensor,
    params: SamplingTensors,
    seats: Tensor,
    *,
    history: Tensor | None = None,
    bias: Tensor | None = None,
    bitmask: Tensor | None = None,
    policy: Policy = LOCKSTEP,
) -> Tensor:
    """A new tensor of logits: masked, then biased, then penalised, in this order (vLLM's).

    For a token that is in prompt or completion a positive logit is divided by the repetition penalty and a negative
    one multiplied by it (Keskar et al. 2019, "CTRL", section 4.1); then `frequency` times its count in the completion
    and, if there is one, `presence` are taken off (OpenAI's API reference).

    Args:
        logits: [N, V] float32.
        params: what the seats sample by.
        seats: [N] int64, the seat of each row.
        history: [S, V] int32, of each seat twice the count of a token in the completion, plus one if the prompt has
            it; None: no seat of the call has penalties.
        bias: [S, V] float32, added where the seat is `biased`; -inf forbids a token. None: no seat of the call is.
        bitmask: [N, ceil(V / 32)] int32: bit t % 32 of word t // 32 of a row allows its token t. None: all may come.

    Returns:
        [N, V] float32.

    Raises:
        BackendError: a tensor is of another shape or dtype.
    """
    if logits.dim() != 2:
        raise BackendError(f"adjust_logits: logits must be [N, V] float32, not {tuple(logits.shape)}")
    rows, v = logits.shape
    if logits.dtype is not torch.float32 or seats.dtype is not torch.int64 or seats.shape != (rows,):
        raise BackendError(
            f"adjust_logits: takes [N, V] float32 and [N] int64, not {tuple(logits.shape)} of {logits.dtype} and "
            f"{tuple(seats.shape)} of {seats.dtype}"
        )
    num_seats = params.rows.shape[0]
    wanted = (
        ("history", history, (num_seats, v), torch.int32),
        ("bias", bias, (num_seats, v), torch.float32),
        ("bitmask", bitmask, (rows, -(-v // 32)), torch.int32),
    )
    for name, tensor, shape, dtype in wanted:
        if tensor is not None and (tensor.shape != shape or tensor.dtype is not dtype):
            raise BackendError(
                f"adjust_logits: {name} must be {list(shape)} of {dtype}, not {list(tensor.shape)} of {tensor.dtype}"
            )
    if params.rows.device != logits.device:
        raise BackendError(
            f"adjust_logits: logits are on {logits.device}, their parameters on {params.rows.device}"
        )
    check_indices("adjust_logits", "seat", seats, num_seats)
    if library.is_traced():
        return library.adjust_logits(logits, params.rows, seats, history, bias, bitmask, policy)
    return ADJUST_LOGITS.select(logits, policy)(logits, params, seats, history, bias, bitmask)


def reference(
    logits: Tensor,
    params: SamplingTensors,
    seats: Tensor,
    history: Tensor | None,
    bias: Tensor | None,
    bitmask: Tensor | None,
) -> Tensor:
    z = logits
    if bitmask is not None:
        bits = (bitmask[:, :, None] >> torch.arange(32, dtype=torch.int32, device=bitmask.device)) & 1
        z = z.masked_fill(bits.flatten(1)[:, : z.shape[1]] == 0, -torch.inf)
    if bias is not None:
        z = torch.where(params.biased[seats][:, None] != 0, z + bias[seats], z)
    if history is not None:
        seen = history[seats]
        repetition = params.repetition[seats][:, None]
        count = (seen >> 1).to(torch.float32)
        z = torch.where(seen > 0, torch.where(z > 0, z / repetition, z * repetition), z)
        z = z - params.frequency[seats][:, None] * count
        z = z - params.presence[seats][:, None] * (count > 0)
    return z.clone() if z is logits else z


def cpu_refuses(call: Call) -> str | None:
    """The kernels of the sampler need NumPy only."""
    return None if call.device_type == "cpu" else f"runs on the CPU, not on {call.device_type}"


def _triton(
    logits: Tensor,
    params: SamplingTensors,
    seats: Tensor,
    history: Tensor | None,
    bias: Tensor | None,
    bitmask: Tensor | None,
) -> Tensor:
    from mainspring.ops.triton.adjust_logits import adjust_logits as triton_adjust_logits

    return triton_adjust_logits(logits, params, seats, history, bias, bitmask)


ADJUST_LOGITS = Operation(
    "adjust_logits",
    Implementation("cpu", cpu_adjust_logits, cpu_refuses),
    Implementation("triton", _triton, triton_refuses),
    Implementation("reference", reference, accepts_floats),
)
