"""What Megatron-core computes on two ranks of PyTorch's gloo: each function runs in a process of its own."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch


def _start(rank: int, size: int, port: int) -> None:
    warnings.simplefilter("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.init_process_group("gloo", rank=rank, world_size=size)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)


def layers(rank: int, size: int, port: int, arrays: dict[str, Any]) -> dict[str, Any]:
    """Column then row on given weights; float64."""
    _start(rank, size, port)
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    config = ModelParallelConfig(
        tensor_model_parallel_size=size, use_cpu_initialization=True, params_dtype=torch.float64
    )
    plain: dict[str, Any] = {"config": config, "init_method": torch.nn.init.zeros_, "bias": True}
    first = ColumnParallelLinear(6, 8, gather_output=False, skip_bias_add=False, **plain)
    second = RowParallelLinear(8, 6, input_is_parallel=True, skip_bias_add=False, **plain)
    w1, w2 = torch.tensor(arrays["first"]), torch.tensor(arrays["second"])
    with torch.no_grad():
        first.weight.copy_(w1.chunk(size, 0)[rank])
        second.weight.copy_(w2.chunk(size, 1)[rank])
    x = torch.tensor(arrays["x"], requires_grad=True)
    hidden, _ = first(x)
    out, _ = second(torch.nn.functional.gelu(hidden))
    (out * torch.tensor(arrays["weight"])).sum().backward()
    return {
        "out": out.tolist(),
        "grad_x": x.grad.tolist(),
        "grad_first": first.weight.grad.tolist(),
        "grad_second": second.weight.grad.tolist(),
    }


def cross_entropy(rank: int, size: int, port: int, arrays: dict[str, Any]) -> dict[str, Any]:
    _start(rank, size, port)
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    logits = torch.tensor(arrays["logits"]).chunk(size, -1)[rank].contiguous().requires_grad_()
    losses = vocab_parallel_cross_entropy(logits.clone(), torch.tensor(arrays["target"]), 0.0)
    (losses * torch.tensor(arrays["weight"])).sum().backward()
    return {"losses": losses.tolist(), "grad": logits.grad.tolist()}


def run(rank: int, job: str, size: int, port: int, arrays: dict[str, Any], answers: Any) -> None:
    import traceback

    try:
        answers.put((rank, globals()[job](rank, size, port, arrays)))
    except BaseException:
        answers.put((rank, traceback.format_exc()))
