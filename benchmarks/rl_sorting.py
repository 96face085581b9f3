"""GRPO, PPO and VAPO on sorting digits, on the CPU: `python benchmarks/rl_sorting.py --out runs/sorting.jsonl`.

All begin with the same partly trained model (107,648 parameters, in lockstep with its engine). A step has 32 x 8
answers of GRPO, 128 x 1 of PPO, 64 x 4 of VAPO. Held-out accuracy is that of sampled answers to 200 prompts, four each;
the largest difference between the trainer's log-probabilities and the engine's is over the whole run. Seconds are of
the steps alone, with one thread: wall time, which says little on a machine that does other things, and CPU time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the task stands among the tests

from mainspring.ops.threads import set_num_threads
from rl import sorting_runs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--algorithms", nargs="+", default=list(sorting_runs.ALGORITHMS))
    parser.add_argument("--steps", type=int, default=sorting_runs.STEPS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    set_num_threads(1)
    torch.set_num_threads(1)
    table = Table(title=f"sorting, {arguments.steps} steps")
    for column in (
        "algorithm",
        "accuracy before",
        "after",
        "best of every 50",
        "max |delta|",
        "seconds",
        "CPU seconds",
    ):
        table.add_column(column)
    for algorithm in arguments.algorithms:
        row = one(algorithm, arguments.steps, arguments.seed)
        with arguments.out.open("a") as out:
            print(json.dumps(row), file=out)
        curve = [point["accuracy"] for point in row["curve"]]
        cells = (
            f"{curve[0]:.3f}",
            f"{curve[-1]:.3f}",
            f"{max(curve):.3f}",
            f"{row['max_delta']:g}",
            f"{row['seconds']:.0f}",
            f"{row['cpu_seconds']:.0f}",
        )
        table.add_row(algorithm, *cells)
    Console(width=110).print(table)


def one(algorithm: sorting_runs.Algorithm, steps: int, seed: int) -> dict[str, object]:
    """A whole run, validated every 50 steps."""
    model = sorting_runs.partly_trained()
    source = sorting_runs.start(algorithm, model, seed)
    curve = [{"step": 0, "accuracy": sorting_runs.accuracy(source, samples=4)}]
    seconds = cpu_seconds = max_delta = 0.0
    run = sorting_runs.train(algorithm, model, source, steps, seed)
    while True:
        began, cpu_began = time.monotonic(), time.process_time()
        metrics = next(run, None)
        if metrics is None:
            break
        seconds += time.monotonic() - began
        cpu_seconds += time.process_time() - cpu_began
        max_delta = max(max_delta, metrics.max_delta)
        if metrics.step % 50 == 0 or metrics.step == steps:
            accuracy = sorting_runs.accuracy(source, samples=4)
            curve.append({"step": metrics.step, "accuracy": accuracy})
            print(f"{algorithm}, step {metrics.step}: {accuracy:.3f}", flush=True)
    return {
        "algorithm": algorithm,
        "seed": seed,
        "curve": curve,
        "max_delta": max_delta,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
    }


if __name__ == "__main__":
    main()
