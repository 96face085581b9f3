"""Resharding of a trainer's weights into whole engines, on two ranks or more: seconds, memory, checksums.

    torchrun --nproc-per-node 2 benchmarks/rl_resharding.py --out runs/resharding.json
    torchrun --nproc-per-node 2 benchmarks/rl_resharding.py --device cpu --small --out runs/resharding.json

A model of 1.1 billion random weights in bfloat16 (TinyLlama's shape), with AdamW's float32 masters and moments, under
each layout. Memory is what is allocated on a rank from before the engine's model is made to the peak of resharding it,
over the model's bytes; seconds are of the slowest rank, the first run apart. Weights move before each run, so that a
tensor that did not arrive would be seen; checksums are compared in each, and in the end all bits with the first
layout's. The bar: two GPUs, under 0.5 s and under 1.3 times the model's bytes.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mainspring.formats.model_config import ModelConfig
from mainspring.model.decoder import Decoder
from mainspring.ops import LOCKSTEP
from mainspring.parallel.checkpoint import fill_weights
from mainspring.parallel.launch import joined, local_device
from mainspring.parallel.layout import Layout
from mainspring.parallel.mesh import Mesh
from mainspring.parallel.parallelize import parallelize
from mainspring.parallel.placement import hf_shapes
from mainspring.parallel.units import Units
from mainspring.rl.resharding import Resharding
from mainspring.train.rank_optimizer import RankOptimizer
from mainspring.train.recipe import OptimizerSection

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4}


@dataclass(frozen=True)
class Row:
    """One layout; seconds of the slowest rank, bytes of the rank that needs most."""

    layout: str
    weights: int
    model_bytes: int
    first_seconds: float
    seconds: list[float]
    peak_bytes: int | None
    checksums: list[str]

    @property
    def factor(self) -> float | None:
        return None if self.peak_bytes is None else self.peak_bytes / self.model_bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--layouts", nargs="+", default=["zero=3", "zero=1", "tp"])
    arguments = parser.parse_args()
    with joined(arguments.device):
        device = local_device(arguments.device)
        rows = []
        for name in arguments.layouts:
            world = dist.get_world_size()
            layout = f"tp={world}" if name == "tp" else f"dp={world},{name}"
            rows.append(one(layout, device, SHAPE | (SMALL if arguments.small else {}), arguments.runs))
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if dist.get_rank() == 0:
            same = all(row.checksums == rows[0].checksums for row in rows)
            report(rows, same, device, arguments.out)


def one(text: str, device: torch.device, shape: dict[str, object], runs: int) -> Row:
    config, layout = ModelConfig.from_dict(shape), Layout.parse(text)
    mesh = Mesh.build(layout.axes, key_copies=layout.key_copies(config))
    empty = Decoder(config, policy=LOCKSTEP, device="meta", dtype=torch.bfloat16).train()
    units = Units(parallelize(empty, layout, mesh), device)
    fill_weights(units, random_tensors(hf_shapes(config), device))
    optimizer = RankOptimizer(units, OptimizerSection(lr=1e-6))
    cuda = device.type == "cuda"
    gc.collect()  # a former layout's units refer to each other: they must not be freed between the two looks at memory
    if cuda:
        torch.cuda.synchronize(device)
    own = torch.cuda.memory_allocated(device) if cuda else 0
    whole = Decoder(config, policy=LOCKSTEP, device=device, dtype=torch.bfloat16).requires_grad_(False)
    resharding = Resharding(units, whole)
    seconds, checksums, peak = [], [], None
    for _ in range(1 + runs):
        with torch.no_grad():  # each element by itself, so that all layouts come to the same weights
            for unit in units.units:
                unit.shard.mul_(1.015625)
        dist.barrier()
        report = resharding.run()
        seconds.append(largest(report.seconds, device))
        checksums.append(report.checksum)
        if cuda:
            peak = max(peak or 0, int(largest(torch.cuda.max_memory_allocated(device) - own, device)))
    del optimizer
    return Row(
        text,
        sum(p.numel() for p in whole.parameters()),
        report.model_bytes,
        seconds[0],
        seconds[1:],
        peak,
        checksums,
    )


def random_tensors(
    shapes: Mapping[str, tuple[int, ...]], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """The same on every rank and under every layout."""
    generator = torch.Generator(device).manual_seed(0)
    for name, shape in shapes.items():
        yield name, 0.02 * torch.randn(shape, generator=generator, device=device)


def largest(value: float, device: torch.device) -> float:
    """Over the ranks."""
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def report(rows: list[Row], same: bool, device: torch.device, out: Path) -> None:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    record = {
        "device": f"{dist.get_world_size()} x {name}",
        "torch": torch.__version__,
        "same_weights_under_all_layouts": same,
        "rows": [asdict(row) | {"factor": row.factor} for row in rows],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    table = Table(
        title=f"{rows[0].weights:,} weights in bfloat16, {record['device']}, torch {torch.__version__}"
    )
    for column in ("layout", "median s", "slowest", "first", "peak / model's bytes", "checksums"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row.layout,
            f"{median(row.seconds):.3f}",
            f"{max(row.seconds):.3f}",
            f"{row.first_seconds:.3f}",
            "" if row.factor is None else f"{row.factor:.3f}",
            f"{len(row.checksums)} equal",  # `Resharding.run` raises where one differs
        )
    console = Console(width=110)
    console.print(table)
    console.print(f"the same weights under all layouts: {same}")


if __name__ == "__main__":
    main()
