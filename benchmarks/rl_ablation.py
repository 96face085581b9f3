"""VAPO without each of its parts, on sorting digits, over several seeds: `python benchmarks/rl_ablation.py`.

    python benchmarks/rl_ablation.py run --out runs/ablation.jsonl --seeds 6 --seconds 3000
    python benchmarks/rl_ablation.py table runs/*.jsonl

Prompts have 2 to 10 digits, so that answers differ in length, and a step has four mini-batches, so that ratios leave 1
and are clipped. Every variant starts from the same partly trained model (107,648 parameters) and has as many answers a
step and as many steps of the policy; value pretraining comes before them. Accuracy is that of two sampled answers to
each of 500 held-out prompts, the mean over four places: after a quarter, half, three quarters and all of the steps.
Runs go seed by seed through all variants, so that stopping early leaves equal numbers; with --share i/n a
process takes every n-th of them. The table gives means over seeds, and of each variant's difference from full VAPO at
the same seed a 95% interval (Student's t).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the task stands among the tests

from mainspring.model.checkpoint import load_model, save_model
from mainspring.model.decoder import Decoder
from mainspring.ops.threads import set_num_threads
from mainspring.rl.vapo import VapoSettings, vapo
from rl import sorting_runs

ANSWERS, GROUP = 128, 4  # of a step, and of a prompt
STEPS, PRETRAINING = 100, 15
DIGITS = (2, 10)
HELD_OUT = sorting_runs.held_out(DIGITS, 500)
# Answers have 3 to 11 tokens: alpha = 1 gives them a λ of 0.67 to 0.91.
FULL = VapoSettings(
    mini_batches=4, schedule=sorting_runs.WARM, alpha=1.0, shortest_lam=0.5, entropy_bonus=0.01
)
VARIANTS: dict[str, VapoSettings] = {
    "VAPO": FULL,
    "without value pretraining": FULL,
    "without decoupled GAE": replace(FULL, critic_lam=FULL.lam),
    "without length-adaptive GAE": replace(FULL, alpha=None),
    "without clip-higher": replace(FULL, clip_high=0.2),
    "without token-level loss": replace(FULL, loss_mean="sequences"),
    "without positive NLL": replace(FULL, positive_nll=0.0),
    "without group sampling": FULL,
    "PPO, in groups": replace(
        FULL, critic_lam=FULL.lam, alpha=None, clip_high=0.2, loss_mean="sequences", positive_nll=0.0
    ),
}
Row = dict[str, Any]
MEASURES: dict[str, Callable[[Row], float]] = {
    "held-out accuracy, four looks": lambda row: mean(row["accuracy"]),
    "at the end": lambda row: row["accuracy"][-1],
    "mean training reward": lambda row: mean(row["rewards"]),
}
WITHOUT_PRETRAINING = ("without value pretraining", "PPO, in groups")
FULL_NAME = next(iter(VARIANTS))
# Student's t at 0.975, for 1 to 30 degrees of freedom.
_T_975 = (
    "12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262 2.228 2.201 2.179 2.160 2.145 2.131 "
    "2.120 2.110 2.101 2.093 2.086 2.080 2.074 2.069 2.064 2.060 2.056 2.052 2.048 2.045 2.042"
)
T_975 = tuple(map(float, _T_975.split()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--seeds", type=int, default=6)
    run.add_argument("--first-seed", type=int, default=0)
    run.add_argument("--share", default="0/1")
    run.add_argument("--seconds", type=float, default=math.inf, help="begin no run that would end later")
    run.add_argument(
        "--base", type=Path, help="directory of the partly trained model; made if it is not there"
    )
    run.add_argument("--steps", type=int, default=STEPS, help="of the policy")
    run.add_argument("--pretraining", type=int, default=PRETRAINING, help="steps of the critic alone")
    run.add_argument("--numerics", choices=("lockstep", "fast"), default="lockstep")
    table = commands.add_parser("table")
    table.add_argument("files", type=Path, nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "table":
        show([json.loads(line) for file in arguments.files for line in file.read_text().splitlines()])
        return
    set_num_threads(1)
    torch.set_num_threads(1)
    run_all(arguments)


def run_all(arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    base = arguments.base or arguments.out.parent / "base"
    if not base.exists():
        save_model(sorting_runs.partly_trained(150, digits=DIGITS), base)
    share, shares = map(int, arguments.share.split("/"))
    jobs = [
        (seed, name)
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds)
        for name in VARIANTS
    ]
    done = set()
    if arguments.out.exists():
        done = {
            (row["seed"], row["variant"]) for row in map(json.loads, arguments.out.read_text().splitlines())
        }
    longest = 0.0
    with arguments.out.open("a") as out:
        for seed, name in jobs[share::shares]:
            if (seed, name) in done:  # by a former call
                continue
            started = time.monotonic()
            if started - began + 1.05 * longest > arguments.seconds:
                break
            model = load_model(base, numerics=arguments.numerics)
            row = one(model, name, seed, arguments.steps, arguments.pretraining)
            longest = max(longest, time.monotonic() - started)
            row["seconds"] = round(time.monotonic() - started, 1)
            print(json.dumps(row), file=out, flush=True)


def one(model: Decoder, name: str, seed: int, policy_steps: int, pretraining: int) -> Row:
    """A whole run of a variant."""
    if name in WITHOUT_PRETRAINING:
        pretraining = 0
    settings = replace(
        VARIANTS[name], seed=seed, warmup_steps=pretraining, max_steps=pretraining + policy_steps
    )
    group = 1 if name == "without group sampling" else GROUP
    source = sorting_runs.rollouts(
        model, seed, prompts_per_step=ANSWERS // group, group_size=group, digits=DIGITS
    )
    critic = sorting_runs.critic_of(model, lr=5e-4)
    looks = {pretraining + policy_steps * quarter // 4 for quarter in (1, 2, 3, 4)}
    steps, accuracies = [], []
    for metrics in vapo(model, sorting_runs.optimizer(model, lr=5e-4), critic, source, settings):
        steps.append(metrics)
        if metrics.step in looks:
            accuracies.append(sorting_runs.accuracy(source, 2, HELD_OUT))
    trained = [m for m in steps if m.step > settings.warmup_steps]
    return {
        "variant": name,
        "seed": seed,
        "steps": policy_steps,
        "numerics": model.numerics,
        "accuracy": accuracies,
        "start": mean(m.reward for m in steps[:3]),
        "rewards": [round(m.reward, 4) for m in trained],
        "explained_variance": [round(m.explained_variance, 3) for m in steps],
        "entropy": [round(m.entropy, 3) for m in trained],
        "clip_fraction": round(mean(m.clip_fraction for m in trained), 4),
        "max_delta": max(m.max_delta for m in steps),
    }


def show(rows: Sequence[Row]) -> None:
    """The table, of the seeds that every variant has."""
    found = {(r["variant"], r["seed"]): r for r in rows}
    seeds = sorted(
        seed for seed in {seed for _, seed in found} if all((name, seed) in found for name in VARIANTS)
    )
    if len(seeds) < 2:
        raise SystemExit(f"there are {len(seeds)} seeds of which all variants are done; a table needs two")
    steps = {row["steps"] for row in rows}
    if len(steps) > 1:
        raise SystemExit(f"runs of {steps} steps are no table; give files of one length")
    table = Table(title=f"{len(seeds)} seeds, {steps.pop()} policy steps of {ANSWERS} answers")
    table.add_column("variant")
    for measure in MEASURES:
        table.add_column(measure)
        table.add_column("less full VAPO [95%]")
    table.add_column("explained variance")
    table.add_column("clipped")
    for name in VARIANTS:
        cells = []
        for value in MEASURES.values():
            values = [value(found[name, seed]) for seed in seeds]
            full = [value(found[FULL_NAME, seed]) for seed in seeds]
            cells.append(f"{mean(values):.3f}")
            differences = [v - f for v, f in zip(values, full, strict=True)]
            cells.append("" if name == FULL_NAME else _interval(differences))
        rows_of = [found[name, seed] for seed in seeds]
        cells.append(f"{mean(mean(row['explained_variance'][-50:]) for row in rows_of):.2f}")
        cells.append(f"{mean(row['clip_fraction'] for row in rows_of):.3f}")
        table.add_row(name, *cells)
    Console(width=190).print(table)


def _interval(differences: Sequence[float]) -> str:
    half = T_975[min(len(differences) - 1, len(T_975)) - 1] * stdev(differences) / math.sqrt(len(differences))
    return f"{mean(differences):+.3f} [{mean(differences) - half:+.3f}, {mean(differences) + half:+.3f}]"


if __name__ == "__main__":
    main()
