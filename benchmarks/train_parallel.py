"""Layouts of several ranks beside PyTorch's own FSDP2 and DDP, in one run.

    torchrun --standalone --nproc-per-node 2 benchmarks/train_parallel.py                          # CPU, gloo, tiny
    torchrun --standalone --nproc-per-node 2 benchmarks/train_parallel.py --device cuda --case 1.1b --json two.json

Each contestant trains the same shape on the same sequences a step, cut into as many micro-batches as its line says:
tokens a second and rank, MFU, peak memory of the fullest rank beside what `mainspring plan` estimates (on CUDA), and
what it reaches of `single`: every rank training a whole model for itself by the code of one device (`one`: by that of
layouts). FSDP2 and DDP wrap a plain PyTorch Llama whose
blocks are compiled (`training/peers.py`). They come one after the other, for together they would not fit, in as many
passes as are asked for, every second one backwards, so that a card that warms up or slows down does so for all; the
median over the rounds of all passes counts, of the slowest rank. A round is a few steps in a row, as a trainer takes
them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from mainspring.model.checkpoint import save_model
from mainspring.parallel.launch import joined, local_rank
from mainspring.parallel.layout import Layout
from mainspring.parallel.mesh import Mesh
from mainspring.train.flops import peak_flops, training_flops
from mainspring.train.memory import Batch, estimate
from mainspring.train.runner import usable_device
from training.ours import Step, dtype_for, on_one_device, random_model, under
from training.peers import step_of
from training.shapes import CASES, Case
from training.timing import Row, joined_rows, measure, print_profile, settle

_RUNS = (
    "single x1", "one x1", "dp=2 x2", "dp=2,zero=1 x2", "dp=2,zero=3 x2", "fsdp2 x2", "ddp x2", "tp=2 x1",
    "pp=2,schedule=zero_bubble x8", "pp=2,schedule=interleaved,virtual=2 x8",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--case", choices=sorted(CASES), default="tiny", help="shape; its batch is a rank's")
    parser.add_argument(
        "--runs",
        nargs="*",
        default=list(_RUNS),
        help="'LAYOUT xN' or 'LAYOUT xNxSEQUENCES', micro-batches and their size; single, one, fsdp2 or ddp for LAYOUT",
    )
    parser.add_argument("--profile", nargs="*", default=[], help="which are profiled as well")
    parser.add_argument("--rounds", type=int, default=5, help="of each contestant in each pass")
    parser.add_argument("--steps", type=int, default=1, help="of a round, one after the other")
    parser.add_argument("--passes", type=int, default=1, help="through all contestants, to and fro")
    parser.add_argument("--until", type=float, default=1e9, help="seconds after which no further run begins")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    # All ranks of this start know the name.
    weights = Path(tempfile.gettempdir()) / f"mainspring-train-parallel-{os.environ['MASTER_PORT']}"
    try:
        in_order = any(text.startswith("tp=") for text in arguments.runs)  # one start has one setting for all
        with joined(arguments.device, in_order=in_order):
            run(arguments, weights)
    finally:
        shutil.rmtree(weights, ignore_errors=True)


def run(arguments: argparse.Namespace, weights: Path) -> None:
    """weights: the directory for the weights that all layouts begin with."""
    began = time.perf_counter()
    device = usable_device(arguments.device, local_rank() if arguments.device == "cuda" else None)
    dtype, case = dtype_for(device), CASES[arguments.case]
    peak, source = peak_flops(device, dtype)
    world, speaks = dist.get_world_size(), dist.get_rank() == 0
    say = partial(print, flush=True) if speaks else _silent
    say(f"{arguments.case}, {world} ranks, {dtype}; MFU of {peak / 1e12:.4g} TFLOP/s ({source})")
    if speaks:
        save_model(random_model(case.config, device), weights)
    settle(device)
    rows: dict[str, list[Row]] = {}
    order = [text for number in range(arguments.passes) for text in arguments.runs[:: 1 - 2 * (number % 2)]]
    for text in order:
        late = torch.tensor(float(time.perf_counter() - began > arguments.until), device=device)
        dist.all_reduce(late)
        if float(late):
            say(f"{text}: not run, {arguments.until:.0f} s are over")
            continue
        try:
            row = _row(text, case, weights, world, peak, device, arguments, text not in rows)
        except Exception:  # the next one may well run
            say(text)
            traceback.print_exc()
            continue
        rows.setdefault(text, []).append(row)
        say(f"{row.text()}; {row.left_bytes / 2**30:.2f} GiB were there before")
        if row.kernels and speaks:
            print_profile(row)
        if arguments.json and speaks:
            arguments.json.write_text(
                json.dumps([asdict(r) for pair in rows.values() for r in pair], indent=1)
            )
    _summary([joined_rows(several) for several in rows.values()], say)


def _summary(rows: list[Row], say: Callable[..., None]) -> None:
    alone = next((row.tokens_per_second for row in rows if row.name.startswith("single")), None)
    for row in rows:
        share = "" if alone is None else f" {row.tokens_per_second / alone:7.1%} of single"
        planned = f", planned {row.planned_bytes / 2**30:.2f} GiB" if row.planned_bytes else ""
        if row.planned_bytes and row.peak_bytes:
            planned += f" ({row.planned_bytes / row.peak_bytes:.1%})"
        say(f"all passes: {row.text()}{share}{planned}; {len(row.samples)} rounds")


def _row(
    text: str,
    case: Case,
    weights: Path,
    world: int,
    peak: float,
    device: torch.device,
    arguments: argparse.Namespace,
    first: bool,
) -> Row:
    """first: whether it has not run yet; it is profiled then, if it is to be."""
    name, _, cuts = text.partition(" ")
    number, _, each = cuts.removeprefix("x").partition("x")
    lonely = name in ("single", "one")  # a rank alone has its own share of the sequences
    ranks = 1 if lonely else world
    cut = replace(case, sequences=int(each) if each else case.sequences * ranks // int(number))
    count, tokens = int(number), int(number) * cut.tokens // ranks
    planned = 0
    make: Callable[[], Step]
    if name in ("fsdp2", "ddp"):
        torch.use_deterministic_algorithms(False)
        make = partial(step_of, "fsdp2" if name == "fsdp2" else "ddp", case.config, case.length, device)
    elif name == "single":
        torch.use_deterministic_algorithms(device.type == "cuda")
        make = partial(on_one_device, case, device)
    else:
        torch.use_deterministic_algorithms(device.type == "cuda")
        layout = Layout() if name == "one" else Layout.parse(name)
        mesh = Mesh.single() if name == "one" else None
        make = partial(under, case.config, weights, layout, device, mesh)
        memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
        batch = Batch(count, cut.tokens, dtype_for(device).itemsize)
        planned = int(estimate(case.config, layout, batch, memory).total)
    flops = training_flops(case.config, [case.length]) * tokens / case.length
    seed = dist.get_rank() if lonely else 0
    row = measure(
        text, make, cut.micro_batches(count, seed), tokens, flops, peak, device, arguments.rounds,
        first and text in arguments.profile, arguments.steps,
    )  # fmt: skip
    row.planned_bytes = planned
    return row


def _silent(*_: object) -> None:
    """Of the other ranks."""


if __name__ == "__main__":
    main()
