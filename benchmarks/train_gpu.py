"""Our training step on one device, and a plain compiled PyTorch Llama, in one run.

    python benchmarks/train_gpu.py --json train.json              # an H100: the three shapes, experts, the peer
    python benchmarks/train_gpu.py --dry-run                      # a CPU: tiny shapes, to see that all of it runs

A step is one micro-batch in bfloat16 with float32 masters, its gradient clipped, AdamW. Steps are timed one by one,
from an idle device to an idle device, the loss read on the host; the median counts. MFU is `train.flops`'s. A
further step is profiled: kernels by their time, products by their shapes. `training/` has the parts.
"""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from mainspring.parallel.layout import Layout
from mainspring.train.flops import peak_flops, training_flops
from mainspring.train.memory import Batch, estimate
from mainspring.train.runner import usable_device
from training.ours import Step, dtype_for, on_one_device
from training.peers import step_of
from training.shapes import CASES, Case
from training.timing import Row, measure, print_profile

_RUNS = "1.1b,1.1b:graph,1.1b:peer,1.1b-16:graph,qwen3-0.6b,qwen3-0.6b:graph,1.1b-8:graph,moe:graph"
_DRY = "tiny,tiny:graph,tiny:free,tiny:peer,tiny-qwen:graph,tiny-moe:graph"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", help=f"shape or shape:kind, see _row, in order; default {_RUNS}")
    parser.add_argument(
        "--profile", default="1.1b:graph,qwen3-0.6b:graph,moe:graph", help="which are profiled as well"
    )
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", type=Path, help="write the rows here too, after each")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, everything profiled")
    arguments = parser.parse_args()
    device = usable_device("cpu" if arguments.dry_run else "cuda")
    runs = (arguments.runs or (_DRY if arguments.dry_run else _RUNS)).split(",")
    dtype = dtype_for(device)
    peak, source = peak_flops(device, dtype)
    print(f"torch {torch.__version__}; MFU of {peak / 1e12:.4g} TFLOP/s ({source})", flush=True)
    rows: list[Row] = []
    for run in runs:
        name, _, kind = run.partition(":")
        case = CASES[name]
        try:
            row = _row(run, kind, case, peak, device, arguments)
        except Exception:  # the next one may well run: what the device has cost is not to be lost
            traceback.print_exc()
            continue
        rows.append(row)
        print(row.text(), flush=True)
        if kind != "peer":
            bytes_planned = estimate(
                case.config, Layout(), Batch(1, case.tokens, dtype.itemsize), _memory(device)
            )
            print(f"  planned {bytes_planned.total / 2**30:.2f} GiB", bytes_planned, flush=True)
        if row.kernels or row.shapes:
            print_profile(row)
        if arguments.json:
            arguments.json.write_text(json.dumps([asdict(r) for r in rows], indent=1))


def _row(
    run: str, kind: str, case: Case, peak: float, device: torch.device, arguments: argparse.Namespace
) -> Row:
    """kind "": ours, with deterministic kernels as the trainer has them; "free": ours without; "graph" and
    "free-graph": likewise, passes replayed from a CUDA graph; "peer"."""
    torch.use_deterministic_algorithms(device.type == "cuda" and kind in ("", "graph"))
    make: Callable[[], Step]
    if kind == "peer":
        make = partial(step_of, "alone", case.config, case.length, device)
    else:
        make = partial(on_one_device, case, device, captured="graph" in kind)
    flops = training_flops(case.config, [case.length] * case.sequences)
    profiled = arguments.dry_run or run in arguments.profile.split(",")
    return measure(
        run, make, case.micro_batches(1), case.tokens, flops, peak, device, arguments.rounds, profiled
    )


def _memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


if __name__ == "__main__":
    main()
