"""The next token of each row of logits: Gumbel-max with noise by counter, after min-p, top-k and top-p.

argmax(z + t g) with g_i = -log(-log(u_i)) is a draw from softmax(z / t) (Gumbel 1954; Maddison, Tarlow and Minka 2014,
"A* sampling", section 2), and for t = 0 it is the likeliest token: no softmax, no sum and no case of its own.
The noise is a function of a key, a position and the token (SplitMix64, see `token_noise`), so a row's token is a
function of its own logits, parameters and position: the same in any batch, after a preemption, and wherever a drafted
token is verified.

Truncation is a floor under the logits. Equal logits share their fate, and masses are counted in integers, whose sums
have no order: the floor is the same however a row is cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops import library
from mainspring.ops.adjust_logits import cpu_refuses
from mainspring.ops.checks import check_indices
from mainspring.ops.cpu.sample import sample as cpu_sample
from mainspring.ops.policy import LOCKSTEP, Policy
from mainspring.ops.registry import Implementation, Operation, accepts_floats
from mainspring.ops.sampling_tensors import (
    GOLDEN,
    LARGEST_UNIFORM,
    MASS_UNIT,
    SMALL_UNIFORM,
    SMALLEST_TEMPERATURE,
    SamplingTensors,
)
from mainspring.ops.triton.support import refuses as triton_refuses


def sample(
    logits: Tensor,
    params: SamplingTensors,
    seats: Tensor,
    positions: Tensor,
    *,
    truncate: bool = True,
    policy: Policy = LOCKSTEP,
) -> Tensor:
    """Draw a token for each row. Waits for no device, and no shape depends on data: a CUDA graph can hold it.

    Args:
        logits: [N, V] float32, left unchanged; -inf is a token that is not taken.
        params: what the seats sample by.
        seats: [N] int64, the seat of each row.
        positions: [N] int64, where in its sequence the token of each row will stand.
        truncate: False: no row has a top_k, a top_p or a min_p; their parameters are then not looked at.

    Returns:
        [N] int64. The lowest id of equal scores; 0 if all logits are -inf.

    Raises:
        BackendError: dtypes or shapes are others than these.
    """
    rows = logits.shape[0]
    if logits.dtype is not torch.float32 or logits.dim() != 2 or logits.shape[1] == 0:
        raise BackendError(
            f"sample: logits must be [N, V] float32, not {tuple(logits.shape)} of {logits.dtype}"
        )
    for name, index in (("seats", seats), ("positions", positions)):
        if index.dtype is not torch.int64 or index.shape != (rows,) or index.device != logits.device:
            raise BackendError(
                f"sample: {name} must be [{rows}] int64 on {logits.device}, not {tuple(index.shape)} of "
                f"{index.dtype} on {index.device}"
            )
    if params.rows.device != logits.device:
        raise BackendError(f"sample: logits are on {logits.device}, their parameters on {params.rows.device}")
    check_indices("sample", "seat", seats, params.temperature.shape[0])
    if library.is_traced():
        return library.sample(logits, params.rows, seats, positions, truncate, policy)
    return SAMPLE.select(logits, policy)(logits, params, seats, positions, truncate)


def reference(
    logits: Tensor, params: SamplingTensors, seats: Tensor, positions: Tensor, truncate: bool
) -> Tensor:
    temperature = params.temperature[seats]
    if truncate:
        logits = logits.masked_fill(logits < floors(logits, params, seats)[:, None], -torch.inf)
    noise = token_noise(params.key[seats], positions, logits.shape[1])
    noise = torch.where(temperature[:, None] > 0, noise, 0.0)
    return (logits + temperature[:, None] * noise).argmax(-1)


def token_noise(keys: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Gumbel noise of every token. keys, positions: [N] int64 -> [N, vocab_size] float32, between -2.9 and 22.9.

    Position p of key k has a SplitMix64 stream of its own, whose word i serves the tokens 2 i (its low half) and
    2 i + 1. A half r stands for w = (r + 1/2) / 2^32; then -log(1 - w) is exponential, finest where it is smallest
    and decides, and minus its logarithm is the noise.
    """
    base = _mix(keys + (positions + 1) * _signed(GOLDEN))
    pairs = torch.arange(1, (vocab_size + 1) // 2 + 1, device=keys.device) * _signed(GOLDEN)
    words = _mix(base[:, None] + pairs)
    halves = torch.stack((words & 0xFFFFFFFF, (words >> 32) & 0xFFFFFFFF), -1).flatten(1)[:, :vocab_size]
    w = (halves.to(torch.float32) * 2.0**-32 + 2.0**-33).clamp(max=LARGEST_UNIFORM)
    series = w * (1 + w * (0.5 + w * (1 / 3)))
    return -torch.log(torch.where(w < SMALL_UNIFORM, series, -torch.log(1 - w)))


def floors(logits: Tensor, params: SamplingTensors, seats: Tensor) -> Tensor:
    """The smallest logit that min-p, then top-k, then top-p of the rest leave. logits: [N, V] -> [N] float32.

    A token stays if what is likelier than it has not reached the wanted share of the mass that top-k has left.
    """
    vocab_size = logits.shape[1]
    temperature = params.temperature[seats].clamp(min=SMALLEST_TEMPERATURE)[:, None]
    top_k, top_p, min_p = params.top_k[seats], params.top_p[seats], params.min_p[seats]
    peak = logits.amax(-1, keepdim=True)
    floor = (peak + temperature * min_p[:, None].log())[:, 0]  # -inf for min_p = 0
    ordered = logits.sort(dim=-1, descending=True).values
    limited = (top_k > 0) & (top_k < vocab_size)
    kth = ordered.gather(1, torch.where(limited, top_k - 1, 0).long()[:, None])[:, 0]
    floor = torch.where(limited, torch.maximum(floor, kth), floor)
    # Where all are -inf, there is no peak to count from.
    mass = (torch.exp((ordered - peak).nan_to_num(nan=0.0) / temperature) * MASS_UNIT).to(torch.int64)
    mass = torch.where(ordered >= floor[:, None], mass, 0)
    reached = mass.cumsum(-1)
    wanted = (top_p.double() * reached[:, -1].double()).to(torch.int64).clamp(min=1)
    # Equal logits are one step: what stands before the first of them decides for all.
    num_kept = (reached - mass < wanted[:, None]).sum(-1, keepdim=True)
    by_mass = ordered.gather(1, (num_kept - 1).clamp(min=0))[:, 0]
    floor = torch.where(top_p < 1, torch.maximum(floor, by_mass), floor)
    return torch.where(params.temperature[seats] > 0, floor, -torch.inf)


def _mix(value: Tensor) -> Tensor:
    """The finaliser of SplitMix64 on the bits of int64 tensors (their products wrap)."""
    value = (value ^ _shifted(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shifted(value, 27)) * _signed(0x94D049BB133111EB)
    return value ^ _shifted(value, 31)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """A logical shift to the right."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _triton(
    logits: Tensor, params: SamplingTensors, seats: Tensor, positions: Tensor, truncate: bool
) -> Tensor:
    from mainspring.ops.triton.sample import sample as triton_sample

    return triton_sample(logits, params, seats, positions, truncate)


SAMPLE = Operation(
    "sample",
    Implementation("cpu", cpu_sample, cpu_refuses),
    Implementation("triton", _triton, triton_refuses),
    Implementation("reference", reference, accepts_floats),
)
