"""Which layouts of a model fit a number of GPUs, what each rank then holds, and what it sends in a step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import get_args

from mainspring.errors import ConfigError
from mainspring.formats.model_config import ModelConfig
from mainspring.parallel.layout import Layout, Recompute, ScheduleName
from mainspring.parallel.placement import rule_of
from mainspring.parallel.schedule import Kind, make_schedule, simulate
from mainspring.train.flops import matrix_weights, training_flops
from mainspring.train.memory import Batch, Memory, estimate, rank_shapes

HOST = 8
"""GPUs of a host: tensor parallelism stays inside, by default."""
_ALGORITHM = 0.55
"""Part of a GPU's peak that a layer's products and attention reach; only the order of plans depends on it."""
_PEAK = 989e12
_SELECTIVE = 1.05
"""Of a step's time: attention's forward pass and the elementwise ones once more; it only serves to sort, too."""
_FAST, _SLOW = 300e9, 40e9
"""Bytes a second inside a host (NVLink) and between hosts, of a GPU."""


@dataclass(frozen=True)
class Communication:
    """Bytes that the busiest rank sends in a step, by dimension."""

    tp: float
    pp: float
    cp: float
    data: float
    ep: float


@dataclass(frozen=True)
class Plan:
    """seconds: of a step, a rough figure that only serves to sort plans."""

    layout: Layout
    memory: Memory
    communication: Communication
    bubble: float
    seconds: float


def plans(
    config: ModelConfig,
    gpus: int,
    memory_bytes: int,
    batch: Batch,
    sequence_length: int,
    per_host: int = HOST,
) -> list[Plan]:
    """Every layout of the GPUs that the model, the batch and the memory allow, the fastest estimate first.

    Raises ConfigError if there is none, naming the layout that comes nearest.
    """
    smallest: tuple[float, Layout] | None = None
    found = []
    for layout in _candidates(config, gpus, batch, sequence_length, per_host):
        for recompute in get_args(
            Recompute
        ):  # from the one that keeps most: the first that fits is the fastest
            layout = replace(layout, recompute=recompute)
            memory = estimate(config, layout, batch, memory_bytes)
            if memory.total <= memory_bytes:
                break
        if smallest is None or memory.total < smallest[0]:
            smallest = (memory.total, layout)
        if memory.total <= memory_bytes:
            found.append(_plan(config, layout, memory, batch, sequence_length, per_host))
    if not found:
        if smallest is None:
            raise ConfigError(
                f"no layout of {gpus} GPUs divides {config.num_heads} heads, {config.num_layers} layers and "
                f"{batch.micro_batches} micro-batches; change the number of GPUs or of micro-batches"
            )
        raise ConfigError(
            f"no layout of {gpus} GPUs fits {memory_bytes / 1e9:.1f} GB: the smallest, {smallest[1]}, needs "
            f"{smallest[0] / 1e9:.1f} GB a rank; take more GPUs or smaller micro-batches"
        )
    return sorted(found, key=lambda plan: plan.seconds)


def communication(config: ModelConfig, layout: Layout, batch: Batch) -> Communication:
    """What the busiest rank sends in a step. A collective over n ranks sends (n - 1) / n of the whole, a sum twice."""
    size, count = batch.itemsize, batch.micro_batches // layout.dp
    tokens = batch.tokens / layout.cp
    layers = (
        max(len(layout_range) for layout_range in layout.stage_layers(config.num_layers)) * layout.virtual
    )
    stream = tokens * config.hidden_size * size
    # Forward: gather and scatter twice a layer. Backward: the same, and the inputs of two layers gathered again.
    per_layer = (4 + 4 + 2) if layout.sequence_sliced else 2 * (2 + 2)
    # The embedding's rows are summed and its gradient gathered; the head gathers its input and sums its gradient.
    ends = 4 if layout.pp == 1 else 2
    tp = count * (layers * per_layer + ends) * stream * (layout.tp - 1) / layout.tp
    slices = layout.tp if layout.sequence_sliced else 1
    # Every stage but the last sends its output on, every one but the first a gradient back.
    messages = 2 * layout.virtual - (layout.pp == 2) if layout.pp > 1 else 0
    pp = messages * count * stream / slices
    cp = count * layers * _context(config, layout, tokens, size)
    ep = 0.0
    if layout.ep > 1:
        moe = math.ceil(sum(config.moe_layers) / layout.pp)
        rows = tokens * config.num_experts_per_token * config.hidden_size * size
        ep = 4 * count * moe * rows * (layout.ep - 1) / layout.ep
    return Communication(tp, pp, cp, _data(config, layout, size, count), ep)


def _context(config: ModelConfig, layout: Layout, tokens: float, size: int) -> float:
    """Of one layer and micro-batch, forward and backward."""
    cp = layout.cp
    heads, kv_heads = config.num_heads / layout.tp, max(1.0, config.num_kv_heads / layout.tp)
    if layout.context == "ring":  # keys and values twice, their fp32 gradients once more and home
        own = 2 * kv_heads * config.head_dim * tokens
        return (2 * (cp - 1) * size + (cp if cp > 1 else 0) * max(size, 4)) * own
    exchanged = (2 * heads + 2 * max(kv_heads, cp)) * config.head_dim * tokens
    return 2 * exchanged * size * (cp - 1) / cp


def _data(config: ModelConfig, layout: Layout, size: int, count: int) -> float:
    """Gradients in fp32 (or narrow), parameters in their dtype; experts are shared by fewer ranks."""
    wide = size if layout.gradient_sums == "narrow" and count == 1 else 4
    sent = 0.0
    for rank in range(layout.pp):
        mine = 0.0
        for name, shape in rank_shapes(config, layout, rank).items():
            elements = math.prod(shape)
            fewer = layout.ep if rule_of(name).experts else 1
            shards = max(1, layout.axes.dp_shard * layout.cp // fewer)
            copies = layout.replicate
            if layout.zero == 0:
                holders = shards * copies
                mine += 2 * wide * elements * (holders - 1) / holders
                continue
            part = elements * (shards - 1) / shards
            scatters = count if layout.zero >= 2 and name.startswith("layers.") else 1
            # ZeRO-3 gathers for each pass through a layer; 1 and 2 after the optimizer's step.
            gathers = 2 * count if layout.zero == 3 and name.startswith("layers.") else 1
            mine += wide * part * scatters + size * part * gathers
            mine += 2 * wide * elements / shards * (copies - 1) / copies
        sent = max(sent, mine)
    return sent


def _plan(
    config: ModelConfig, layout: Layout, memory: Memory, batch: Batch, sequence_length: int, per_host: int
) -> Plan:
    count = batch.micro_batches // layout.dp
    lengths = [sequence_length] * max(1, batch.tokens // sequence_length)
    schedule = make_schedule(layout.schedule, layout.pp, layout.virtual, count)
    bubble = simulate(schedule, layout.stages, _costs(config, lengths)).bubble
    sent = communication(config, layout, batch)
    flops = training_flops(config, lengths) * batch.micro_batches / layout.world
    inside = layout.tp * layout.cp
    wide = _FAST if layout.world <= per_host else _SLOW
    near = sent.tp / _FAST + (sent.cp + sent.ep) / (_FAST if inside <= per_host else _SLOW)
    again = {"none": 1.0, "selective": _SELECTIVE, "full": 4 / 3}[layout.recompute]
    compute = again * flops / (_PEAK * _ALGORITHM) / (1 - bubble)
    hidden = max(0.0, sent.data / wide - 0.5 * compute)  # half of it runs behind the layers
    return Plan(layout, memory, sent, bubble, compute + near + sent.pp / wide + hidden)


def _costs(config: ModelConfig, lengths: list[int]) -> dict[Kind, float]:
    """Of the parts of a pass, in forward passes: attention has no weights, and its gradient costs two of it."""
    products = 2.0 * matrix_weights(config) * sum(lengths)
    attention = training_flops(config, lengths) / 3 - products
    forward = products + attention
    inputs, weights = (products + 2 * attention) / forward, products / forward
    return {"F": 1.0, "B": inputs + weights, "I": inputs, "W": weights}


def _candidates(
    config: ModelConfig, gpus: int, batch: Batch, sequence_length: int, per_host: int
) -> Iterator[Layout]:
    for pp in _divisors(gpus):
        for tp in _divisors(gpus // pp):
            for cp in _divisors(gpus // (pp * tp)):
                if tp > per_host or (cp > 1 and batch.tokens // cp < 1024 and sequence_length < 8192):
                    continue  # context parallelism is for long streams
                dp = gpus // (pp * tp * cp)
                for ep in _divisors(dp * cp) if any(config.moe_layers) else [1]:
                    for zero in (0, 1, 2, 3) if dp * cp > 1 else (0,):
                        schedules: tuple[ScheduleName, ...] = ("1f1b",)
                        if pp > 1:
                            late = ("zero_bubble_h2", "zero_bubble") if zero < 2 else ()
                            schedules = (*late, "1f1b")
                        for schedule in schedules:
                            layout = Layout(pp=pp, dp=dp, cp=cp, tp=tp, ep=ep, zero=zero, schedule=schedule)
                            if _fits(layout, config, batch):
                                yield layout


def _fits(layout: Layout, config: ModelConfig, batch: Batch) -> bool:
    try:
        layout.check(config, batch.micro_batches)
    except ConfigError:
        return False
    return True


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
