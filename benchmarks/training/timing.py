"""How a training step is timed, and where its time goes."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from mainspring.train.packing import MicroBatch
from training.ours import Step

TABLE_ROWS = 30


@dataclass
class Row:
    """One contestant. seconds: of a step, median over the timed ones, of the slowest rank; peak_bytes: likewise."""

    name: str
    seconds: float
    spread: float
    """Half the distance between the quartiles over the median."""
    tokens: int
    """Of a step and device."""
    mfu: float
    peak_bytes: int
    loss: float
    start_seconds: float
    """Until the second step had ended: building, compiling."""
    kernels: list[dict[str, Any]] = field(default_factory=list)
    shapes: list[dict[str, Any]] = field(default_factory=list)
    planned_bytes: int = 0
    """Of `mainspring plan`'s formulas, for the fullest rank."""
    left_bytes: int = 0
    """What earlier contestants had left behind; not in peak_bytes."""
    samples: list[float] = field(default_factory=list)
    """Seconds of a step in each round, of the slowest rank."""
    busy: float = 0.0
    """Seconds of a profiled step in which a kernel ran, summed over streams."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def text(self) -> str:
        return (
            f"{self.name:30s} {1e3 * self.seconds:8.1f} ms ±{self.spread:5.1%} {self.tokens_per_second:9,.0f} tokens/s"
            f" MFU {self.mfu:6.2%} {self.peak_bytes / 2**30:6.2f} GiB, loss {self.loss:.4f},"
            f" ready in {self.start_seconds:.0f} s"
        )


def measure(
    name: str,
    make: Callable[[], Step],
    batches: Sequence[MicroBatch],
    tokens: int,
    flops: float,
    peak: float,
    device: torch.device,
    rounds: int,
    profiled: bool = False,
    steps: int = 1,
) -> Row:
    """Makes a contestant, times its steps and forgets it. flops: of a step and device; peak: of the device.

    steps: of a round, one after the other as a trainer takes them (each reads its loss), from an idle device to an
    idle device.
    """
    cuda = device.type == "cuda"
    clear(device)
    before = torch.cuda.memory_allocated(device) if cuda else 0
    began = time.perf_counter()
    step = make()
    loss = step(batches)
    step(batches)
    settle(device)
    start_seconds = time.perf_counter() - began
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(rounds):
        settle(device)
        start = time.perf_counter()
        for _ in range(steps):
            step(batches)
        settle(device)
        seconds.append((time.perf_counter() - start) / steps)
    memory = torch.cuda.max_memory_allocated(device) - before if cuda else 0
    figures = torch.tensor([*seconds, float(memory), float(before)], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(figures, op=dist.ReduceOp.MAX)
    *samples, memory_most, before_most = figures.tolist()
    row = Row(
        name,
        0.0,
        0.0,
        tokens,
        0.0,
        int(memory_most),
        loss,
        start_seconds,
        left_bytes=int(before_most),
        samples=samples,
    )
    summarise(row, flops / peak)
    if profiled:
        _profile(row, partial(step, batches), device)
    del step
    clear(device)
    return row


def summarise(row: Row, seconds_at_peak: float) -> None:
    """Sets what follows from a row's samples. seconds_at_peak: of a step, were the device always at its peak."""
    quartiles = statistics.quantiles(row.samples, n=4) if len(row.samples) > 1 else row.samples * 3
    row.seconds = statistics.median(row.samples)
    row.spread = (quartiles[2] - quartiles[0]) / 2 / row.seconds
    row.mfu = seconds_at_peak / row.seconds


def joined_rows(rows: Sequence[Row]) -> Row:
    """One contestant's rows of several passes: all its rounds, the most memory."""
    whole = replace(rows[0], samples=[seconds for row in rows for seconds in row.samples])
    whole.peak_bytes = max(row.peak_bytes for row in rows)
    whole.left_bytes = max(row.left_bytes for row in rows)
    summarise(whole, rows[0].mfu * rows[0].seconds)
    return whole


def _profile(row: Row, step: Callable[[], float], device: torch.device) -> None:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities, record_shapes=True) as recorded:
        step()
        settle(device)
    averages = recorded.key_averages()
    kernels = [e for e in averages if e.device_type != torch.autograd.DeviceType.CPU]
    row.busy = sum(e.self_device_time_total for e in kernels) / 1e6
    row.kernels = [
        {"name": e.key[:110], "calls": e.count, "ms": e.self_device_time_total / 1e3}
        for e in sorted(kernels, key=lambda e: -e.self_device_time_total)[:TABLE_ROWS]
    ]
    products = [
        e
        for e in recorded.key_averages(group_by_input_shape=True)
        if e.key in ("aten::mm", "aten::addmm", "aten::copy_", "aten::cat", "aten::add_", "aten::fill_")
    ]
    row.shapes = [
        {
            "name": e.key,
            "shapes": str(e.input_shapes)[:120],
            "calls": e.count,
            "ms": e.self_device_time_total / 1e3,
        }
        for e in sorted(products, key=lambda e: -e.self_device_time_total)[:TABLE_ROWS]
    ]


def print_profile(row: Row) -> None:
    print(f"  profiled step of {row.name}: kernels {1e3 * row.busy:.1f} ms of {1e3 * row.seconds:.1f} ms")
    for entry in row.kernels:
        print(f"  {entry['ms']:9.2f} ms {entry['calls']:6d} x  {entry['name'][:90]}")
    for entry in row.shapes[:16]:
        print(f"  {entry['ms']:9.2f} ms {entry['calls']:6d} x  {entry['name']} {entry['shapes'][:80]}")


def clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if dist.is_initialized():
        dist.barrier()
