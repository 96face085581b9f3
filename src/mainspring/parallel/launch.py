"""Joining the process group that torchrun (or `mainspring verify`) has prepared in the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from mainspring.errors import ConfigError
from mainspring.parallel.mesh import TIMEOUT


def ranks_started() -> int:
    """How many processes the launcher has started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_device(kind: str) -> torch.device:
    """This process's device. Raises ConfigError for CUDA where there is none."""
    if kind != "cuda":
        return torch.device(kind)
    if torch.cuda.device_count() == 0:
        raise ConfigError("device cuda was asked for, but PyTorch sees no CUDA device; use cpu")
    return torch.device("cuda", local_rank())


@contextmanager
def joined(device: str, *, in_order: bool = False) -> Iterator[None]:
    """Inside, the process belongs to the group of all ranks: gloo on the CPU, NCCL on CUDA.

    in_order: kernels start in the order in which they are launched. A collective then begins before the product that
    is to hide it, which else takes all of the device first: for tensor parallelism (with the priority below it took
    TP 2 from 77 to 83 % of two H100).

    Raises ConfigError if there are fewer devices than ranks on this host.
    """
    if ranks_started() == 1:
        yield
        return
    if device == "cuda":
        # Sums and gathers begin as soon as a layer's kernel ends, not when the device has nothing else to do.
        os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
        if in_order:
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # CUDA reads it when it starts
        present = torch.cuda.device_count()
        if local_rank() >= present:
            raise ConfigError(
                f"rank {os.environ['RANK']} is number {local_rank()} on this host, which has {present} CUDA devices; "
                "start at most as many processes a host"
            )
        torch.cuda.set_device(local_rank())
    # torchrun may give its restarted processes the store of those that died, where a fast rank would find a slow one's
    # old address: on one host, which counts its restarts alone, each attempt has names of its own there.
    store, rank, world = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
