"""What the ranks of the parallel tests do. Each function runs in a process of its own and returns plain lists."""

from __future__ import annotations

import os
import time
from typing import Any

import mainspring.tensor as mt
from mainspring.tensor import nn, parallel

F64 = mt.float64


def collectives(world: parallel.World, transport: str) -> str:
    size, rank = world.size, world.rank
    group = parallel.new_group(world, list(range(size)), transport)
    assert group is not None
    for n in (0, 1, 3, 16_384, 300_000):
        for kind in (mt.float32, mt.bfloat16, mt.int64):
            base = mt.arange(n).to(kind) % 7
            t = base + rank
            group.all_reduce(t)
            assert (t == base * size + size * (size - 1) // 2).all().item()
    for op, want in (("max", size), ("min", 1), ("avg", (size + 1) / 2)):
        t = mt.full((5,), float(rank + 1))
        group.all_reduce(t, op)
        assert t.tolist() == [want] * 5
    # Same bits on every rank, whatever the values.
    noise = mt.randn(1000, generator=mt.Generator(rank))
    group.all_reduce(noise)
    everyone = group.all_gather(noise.unsqueeze(0))
    assert all(everyone[r].tolist() == noise.tolist() for r in range(size))
    part = group.reduce_scatter(mt.arange(size * 2).reshape(size * 2, 1))
    assert part.flatten().tolist() == [2 * rank * size, (2 * rank + 1) * size]
    assert group.all_to_all(mt.arange(size) + 10 * rank).tolist() == [10 * i + rank for i in range(size)]
    big = mt.full((700_000,), float(rank))
    group.broadcast(big, 1)
    assert (big == 1).all().item()
    group.barrier()
    # A ring in which everyone sends more than sockets buffer, asynchronously.
    mine, got = mt.full((3_000_000,), float(rank)), mt.empty(3_000_000)
    sent = group.send(mine, (rank + 1) % size, async_op=True)
    received = group.recv(got, (rank - 1) % size, async_op=True)
    sent.wait()
    received.wait()
    assert (got == (rank - 1) % size).all().item()
    work = group.all_reduce(mine, async_op=True)
    work.wait()
    assert mine[0].item() == size * (size - 1) / 2
    pair = parallel.new_group(world, [0, size - 1], transport)
    assert (pair is None) == (rank not in (0, size - 1))
    if pair is not None:
        t = mt.ones(2)
        pair.all_reduce(t)
        assert t.tolist() == [2, 2]
    return group.transport


def disagreement(world: parallel.World, transport: str) -> str:
    group = parallel.new_group(world, list(range(world.size)), transport)
    assert group is not None
    try:
        if world.rank == 0:
            group.all_reduce(mt.ones(4))
        else:
            group.all_reduce(mt.ones(5))
    except mt.CommunicationError as error:
        return str(error)
    return "no error"


def death(world: parallel.World, transport: str) -> tuple[str, float]:
    group = parallel.new_group(world, list(range(world.size)), transport)
    assert group is not None
    group.barrier()
    if world.rank == 1:
        os._exit(3)
    began = time.monotonic()
    try:
        group.all_reduce(mt.ones(100))
    except mt.CommunicationError as error:
        return str(error), time.monotonic() - began
    return "no error", 0.0


def silence(world: parallel.World, transport: str) -> str:
    group = parallel.new_group(world, list(range(world.size)), transport)
    assert group is not None
    if world.rank == 1:
        time.sleep(4)
        return ""
    try:
        group.all_reduce(mt.ones(100))
    except mt.CommunicationError as error:
        return str(error)
    return "no error"


def mlp(world: parallel.World, options: dict[str, bool]) -> dict[str, Any]:
    """Column then row, as in a transformer's MLP: output, gradients, whole where they are split."""
    group = parallel.new_group(world, list(range(world.size)))
    assert group is not None
    sequence, fused = options.get("sequence", False), options.get("fused", False)
    first = parallel.ColumnParallelLinear(
        6, 8, group, sequence_parallel=sequence, gradient_accumulation_fusion=fused, dtype=F64,
        generator=mt.Generator(1), skip_bias_add=options.get("skip", False),
    )  # fmt: skip
    second = parallel.RowParallelLinear(
        8, 6, group, sequence_parallel=sequence, gradient_accumulation_fusion=fused, dtype=F64,
        generator=mt.Generator(2),
    )  # fmt: skip
    x = mt.randn(4, 3, 6, dtype=F64, generator=mt.Generator(3))
    weight = mt.randn(4, 3, 6, dtype=F64, generator=mt.Generator(4))
    part = parallel.mappings.own_part(x, group, 0) if sequence else x.clone()
    share = parallel.mappings.own_part(weight, group, 0) if sequence else weight
    part.requires_grad = True
    hidden = first(part)
    if isinstance(hidden, tuple):
        hidden = hidden[0] + hidden[1]
    out = second(mt.gelu(hidden))
    (out * share).sum().backward()
    gather = parallel.mappings.gather_first
    grad = first.main_grad.double() if fused else first.weight.grad
    return {
        "out": (gather(out, group) if sequence else out).tolist(),
        "grad_x": (gather(part.grad, group) if sequence else part.grad).tolist(),
        "first": gather(first.weight, group).tolist(),
        "grad_first": gather(grad, group).tolist(),
        "second": parallel.mappings.gather_last(second.weight, group).tolist(),
        "grad_second": None if fused else parallel.mappings.gather_last(second.weight.grad, group).tolist(),
        "grad_bias": gather(first.bias.grad, group).tolist(),
    }


def gathered_column(world: parallel.World) -> Any:
    group = parallel.new_group(world, list(range(world.size)))
    assert group is not None
    layer = parallel.ColumnParallelLinear(
        4, 8, group, gather_output=True, dtype=F64, generator=mt.Generator(1)
    )
    row = parallel.RowParallelLinear(
        8, 4, group, input_is_parallel=False, dtype=F64, generator=mt.Generator(2)
    )
    x = mt.randn(3, 4, dtype=F64, generator=mt.Generator(3)).requires_grad_()
    y = layer(x)
    out = row(y)
    mt.square(out).sum().backward()
    return y.tolist(), out.tolist(), x.grad.tolist()


def vocabulary(world: parallel.World, smoothing: float) -> dict[str, Any]:
    group = parallel.new_group(world, list(range(world.size)))
    assert group is not None
    table = parallel.VocabParallelEmbedding(12, 4, group, dtype=F64, generator=mt.Generator(5))
    index = mt.randint(0, 12, (3, 5), generator=mt.Generator(6))
    rows = table(index)
    weight = mt.randn(3, 5, 4, dtype=F64, generator=mt.Generator(7))
    (rows * weight).sum().backward()
    logits = mt.randn(3, 5, 12, dtype=F64, generator=mt.Generator(8)) * 3.0
    part = parallel.mappings.own_part(logits, group, -1).requires_grad_()
    losses = parallel.vocab_parallel_cross_entropy(part, index, group, smoothing)
    (losses * weight[..., 0]).sum().backward()
    gather = parallel.mappings.gather_first
    return {
        "rows": rows.tolist(),
        "grad_table": gather(table.weight.grad, group).tolist(),
        "losses": losses.tolist(),
        "grad_logits": parallel.mappings.gather_last(part.grad, group).tolist(),
    }


def three_reductions(world: parallel.World, smoothing: float) -> str:
    """Rank 0 computes the loss; the other answers with exactly three all-reduces of its own and a barrier."""
    group = parallel.new_group(world, [0, 1])
    assert group is not None
    if world.rank == 0:
        parallel.vocab_parallel_cross_entropy(mt.randn(7, 4), mt.zeros(7).long(), group, smoothing)
    else:
        group.all_reduce(mt.full((7,), -1e9), "max")
        group.all_reduce(mt.zeros(7))
        group.all_reduce(mt.zeros(2 if smoothing else 1, 7))
    group.barrier()
    return "met"


def second_gradients(world: parallel.World) -> Any:
    """Second derivatives through scatter and gather, of sum(x^3) / 6: x on the diagonal."""
    group = parallel.new_group(world, list(range(world.size)))
    assert group is not None
    x = mt.arange(8).double().reshape(2, 4).requires_grad_()
    part = parallel.scatter_to_tensor_parallel(x, group)
    y = parallel.gather_from_tensor_parallel(part * part * part / 6.0, group)
    (first,) = mt.grad(y.sum(), [x], create_graph=True)
    assert first is not None
    first.sum().backward()
    return first.tolist(), x.grad.tolist()


def data_parallel(world: parallel.World) -> Any:
    group = parallel.new_group(world, list(range(world.size)))
    assert group is not None
    mt.manual_seed(world.rank)  # rank 0's parameters count
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).to(F64)
    wrapped = parallel.DataParallel(net, group, bucket_elements=20)
    x = mt.randn(8, 5, dtype=F64, generator=mt.Generator(9))
    mine = parallel.mappings.own_part(x, group, 0)
    grads = []
    for _ in range(2):
        mt.square(wrapped(mine)).mean().backward()
        wrapped.finish()
        grads.append([p.grad.tolist() for p in net.parameters()])
        for p in net.parameters():
            p.grad = None
    wrapped.remove_hooks()
    mt.square(net(x)).mean().backward()
    return grads, [p.grad.tolist() for p in net.parameters()]


def pipeline(world: parallel.World) -> Any:
    group = parallel.new_group(world, list(range(world.size)))
    assert group is not None
    stage = nn.Linear(4, 4, dtype=F64, generator=mt.Generator(20 + world.rank))
    last = world.size - 1
    if world.rank == 0:
        x = mt.randn(3, 4, dtype=F64, generator=mt.Generator(30)).requires_grad_()
    else:
        x = parallel.receive_activation((3, 4), group, world.rank - 1, F64)
    y = mt.tanh(stage(x))
    total = parallel.send_activation(y, group, world.rank + 1) if world.rank < last else mt.square(y).sum()
    total.backward()
    return stage.weight.grad.tolist(), total.item()
