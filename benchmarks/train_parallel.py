"""Layouts of several ranks beside PyTorch's own FSDP2 and DDP, in one run.

    torchrun --standalone --nproc-per-node 2 benchmarks/train_parallel.py                    # CPU, gloo, a tiny model
    torchrun --standalone --nproc-per-node 2 benchmarks/train_parallel.py --device cuda --shape 1.1b --micro-batches 8

Each contestant trains the same shape on the same tokens: tokens a second and rank, peak memory of the fullest rank
(on CUDA), what it reaches of `one`: every rank training a whole model for itself, without communication. FSDP2 and
DDP wrap the plain decoder, whose operations are ours; their optimizer is torch's fused AdamW. They come one after the
other, for together they would not fit; the median of the rounds counts. The first step's loss is printed, for all but
`one` (whose ranks have a batch each) must agree.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from mainspring.formats.model_config import ModelConfig
from mainspring.model.decoder import Decoder
from mainspring.model.initialise import create_model
from mainspring.ops import FAST, TokenBatch
from mainspring.parallel.checkpoint import fill_weights
from mainspring.parallel.launch import joined, local_device
from mainspring.parallel.layout import Layout
from mainspring.parallel.mesh import Mesh
from mainspring.parallel.parallelize import parallelize
from mainspring.parallel.pipeline import Pipeline
from mainspring.parallel.placement import hf_shapes
from mainspring.parallel.units import Units
from mainspring.train.flops import peak_flops, training_flops
from mainspring.train.initialise import initial_tensors, initialise
from mainspring.train.packing import MicroBatch
from mainspring.train.recipe import ModelSection, OptimizerSection
from mainspring.train.sharded_optimizer import ShardedOptimizer

_SHAPES = {  # layers, hidden, inner, heads, key heads, vocabulary
    "tiny": (4, 128, 384, 4, 2, 1024),
    "1.1b": (22, 2048, 5632, 32, 4, 32000),
    "1.1b-16": (22, 2048, 5632, 16, 16, 32000),
}
_LAYOUTS = (
    "dp=2",
    "dp=2,zero=1",
    "dp=2,zero=2",
    "dp=2,zero=3",
    "tp=2",
    "pp=2",
    "pp=2,schedule=zero_bubble",
    "cp=2",
)
_SETTINGS = ModelSection(zero_init_residual=False)
_OPTIMIZER = OptimizerSection(lr=1e-4)

Step = Callable[[Sequence[MicroBatch]], float]


def shape(name: str) -> ModelConfig:
    layers, hidden, inner, heads, kv_heads, vocabulary = _SHAPES[name]
    return ModelConfig.from_dict(
        {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary,
            "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 1 << 16,
        }
    )  # fmt: skip


def ours(config: ModelConfig, layout: Layout, mesh: Mesh, device: torch.device, dtype: torch.dtype) -> Step:
    model = parallelize(Decoder(config, policy=FAST, device="meta", dtype=dtype).train(), layout, mesh)
    units = Units(model, device)
    fill_weights(units, initial_tensors(hf_shapes(config), config.num_layers, _SETTINGS, 0))
    pipeline, optimizer = Pipeline(model, units), ShardedOptimizer(units, _OPTIMIZER)

    def step(batches: Sequence[MicroBatch]) -> float:
        loss = pipeline.run(batches)
        optimizer.step(1.0, 1.0)
        return loss

    return step


def ours_on_all(config: ModelConfig, layout: Layout, device: torch.device, dtype: torch.dtype) -> Step:
    mesh = Mesh.build(layout.axes, key_copies=layout.key_copies(config))
    return ours(config, layout, mesh, device, dtype)


def pytorchs(config: ModelConfig, kind: str, device: torch.device, dtype: torch.dtype) -> Step:
    """FSDP2 (float32 weights, computed in dtype, summed in float32) or DDP (under autocast)."""
    model = create_model(config, device=device, numerics="fast").train()
    initialise(model, _SETTINGS, 0)
    world, rank = dist.get_world_size(), dist.get_rank()
    narrow = dtype != torch.float32
    forward: torch.nn.Module = model
    if kind == "fsdp2":
        mesh = init_device_mesh(device.type, (world,))
        policy = MixedPrecisionPolicy(dtype, torch.float32) if narrow else MixedPrecisionPolicy()
        for layer in model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        model.forward = _loss_of(model)  # type: ignore[method-assign]  # the root's own unit covers the loss
        fully_shard(model, mesh=mesh, mp_policy=policy)
    else:
        model.forward = _loss_of(model)  # type: ignore[method-assign]
        forward = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_OPTIMIZER.lr, betas=(0.9, 0.95), fused=True)

    def step(batches: Sequence[MicroBatch]) -> float:
        mine = batches[rank::world]
        total = torch.zeros((), device=device)
        for number, batch in enumerate(mine):
            last = number == len(mine) - 1
            if kind == "fsdp2":
                model.set_requires_gradient_sync(True)
            else:
                forward.require_backward_grad_sync = last
            with torch.autocast(device.type, dtype, enabled=narrow and kind == "ddp"):
                loss = forward(
                    torch.from_numpy(batch.tokens).to(device), TokenBatch.packed(batch.lengths, device),
                    torch.from_numpy(batch.targets).to(device),
                ) / len(mine)  # fmt: skip
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        dist.all_reduce(total)
        return float(total) / world

    return step


def _loss_of(model: Decoder) -> Callable[..., torch.Tensor]:
    whole = type(model).forward

    def loss(tokens: torch.Tensor, batch: TokenBatch, targets: torch.Tensor) -> torch.Tensor:
        from mainspring.ops import cross_entropy

        hidden = whole(model, tokens, batch)
        return cross_entropy(hidden, model.output_weight, targets, policy=model.policy)

    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=sorted(_SHAPES), default="tiny")
    parser.add_argument("--micro-batches", type=int, default=8, help="of a step, over all ranks")
    parser.add_argument("--tokens", type=int, default=512, help="of a micro-batch")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--layouts", nargs="*", default=list(_LAYOUTS))
    parser.add_argument("--peers", nargs="*", default=["fsdp2", "ddp"])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    with joined(arguments.device):
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    device = local_device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = shape(arguments.shape)
    random = np.random.default_rng(0)
    lengths = (arguments.sequence_length,) * (arguments.tokens // arguments.sequence_length)
    stream = random.integers(0, config.vocab_size, (arguments.micro_batches, sum(lengths) + 1))
    batches = [MicroBatch(row[:-1].copy(), row[1:].copy(), lengths) for row in stream]
    world, rank = dist.get_world_size(), dist.get_rank()
    whole = sum(lengths) * len(batches)
    flops = training_flops(config, lengths) / sum(lengths)
    peak, source = peak_flops(device, dtype)
    if rank == 0:
        print(
            f"{arguments.shape}, {world} ranks, {dtype}, {device.type}; {len(batches)} micro-batches of {sum(lengths)}"
        )
        print(f"MFU of {peak / 1e12:.3g} TFLOP/s ({source})")
        print(f"{'':28s} tokens/s a rank    MFU   of one   peak GB   first loss")
    makers: list[tuple[str, Callable[[], Step], int]] = [
        ("one", lambda: ours(config, Layout(), Mesh.single(), device, dtype), whole // world)
    ]
    for text in arguments.layouts:
        layout = Layout.parse(text)
        makers.append((text, partial(ours_on_all, config, layout, device, dtype), whole // world))
    for peer in arguments.peers:
        makers.append((peer, partial(pytorchs, config, peer, device, dtype), whole // world))
    alone = 0.0
    for name, make, tokens in makers:
        given = batches[rank::world] if name == "one" else batches
        speed, memory, loss = measure(make, given, tokens, device, arguments.rounds)
        alone = speed if name == "one" else alone
        if rank == 0:
            print(
                f"{name:28s} {speed:15,.0f} {speed * flops / peak:6.1%} {speed / alone:8.2f} "
                f"{memory / 1e9:9.2f} {loss:12.6f}",
                flush=True,
            )


def measure(
    make: Callable[[], Step], batches: Sequence[MicroBatch], tokens: int, device: torch.device, rounds: int
) -> tuple[float, float, float]:
    """(median tokens a second and rank, peak bytes of the fullest rank, loss of the first step)."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = make()
    loss = step(batches)
    step(batches)
    seconds = []
    for _ in range(rounds):
        _settle(device)
        start = time.perf_counter()
        step(batches)
        _settle(device)
        seconds.append(time.perf_counter() - start)
    memory = float(torch.cuda.max_memory_allocated()) if device.type == "cuda" else 0.0
    figures = torch.tensor([statistics.median(seconds), memory], dtype=torch.float64, device=device)
    dist.all_reduce(figures, op=dist.ReduceOp.MAX)
    del step
    gc.collect()
    return tokens / float(figures[0]), float(figures[1]), loss


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


if __name__ == "__main__":
    main()
