"""mainspring.tensor against PyTorch on one thread, interleaved in one run, the best of N.

Run it with `python benchmarks/tensor_cpu.py`.

Times are minima: on a shared machine the least disturbed run says most about the code. `ratio` is ours / PyTorch's
(for products: the faster of PyTorch's and NumPy's, divided by ours, so that 1.0 is as fast). `must` and `goal` are
the bars that the framework is held to.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import mainspring.tensor as mt
from mainspring.tensor import nn, optim

Run = Callable[[], object]


def best(runs: dict[str, Run], number: int, repeat: int) -> dict[str, float]:
    """Seconds of one call of each, taken in turns."""
    least = dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        run()
    for _ in range(repeat):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(number):
                run()
            least[name] = min(least[name], (time.perf_counter() - start) / number)
    return least


class Rows:
    def __init__(self) -> None:
        self.table = Table("row", "ours", "PyTorch", "other", "measure", "must", "goal")

    def add(self, name: str, times: dict[str, float], measure: str, must: str, goal: str) -> None:
        def show(key: str) -> str:
            return f"{times[key] * 1e6:.2f} µs" if key in times else ""

        self.table.add_row(name, show("ours"), show("torch"), show("numpy"), measure, must, goal)


def overhead(rows: Rows, repeat: int) -> None:
    a, b, p, q = mt.ones(1), mt.ones(1), torch.ones(1), torch.ones(1)

    def loop(x: Any, y: Any) -> Run:
        def run() -> None:  # ten in a row, so that the call of this function hardly counts
            x + y
            x + y
            x + y
            x + y
            x + y
            x + y
            x + y
            x + y
            x + y
            x + y

        return run

    def tenth(runs: dict[str, Run]) -> dict[str, float]:
        return {name: seconds / 10 for name, seconds in best(runs, 2000, repeat).items()}

    times = tenth({"ours": loop(a, b), "torch": loop(p, q)})
    rows.add("add, one element", times, f"{times['ours'] * 1e6:.3f} µs", "0.35", "0.25")
    c, r = mt.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    times = tenth({"ours": loop(a, c), "torch": loop(p, r)})
    rows.add("add, one element, with gradient", times, f"{times['ours'] * 1e6:.3f} µs", "0.5", "0.35")

    def chain(x: Any) -> Run:
        def run() -> None:
            y = x
            for _ in range(10):
                y = y * x
            y.backward()

        return run

    times = best({"ours": chain(c), "torch": chain(r)}, 300, repeat)
    rows.add("10 multiplications and backward", times, f"{times['ours'] * 1e6:.1f} µs", "12", "6")


def _product(a: Any, b: Any) -> Run:
    return lambda: a @ b


def products(rows: Rows, repeat: int) -> None:
    for n in (512, 768, 1024):
        a, b = torch.randn(n, n), torch.randn(n, n)
        x, y, u, v = mt.from_dlpack(a), mt.from_dlpack(b), a.numpy(), b.numpy()
        runs = {"ours": _product(x, y), "torch": _product(a, b), "numpy": _product(u, v)}
        times = best(runs, 1, 2 * repeat)
        ratio = min(times["torch"], times["numpy"]) / times["ours"]
        rows.add(f"sgemm {n}", times, f"{ratio:.2f}x", "0.95x", "1.0x")
    a, b = torch.randn(1024, 1024).bfloat16(), torch.randn(1024, 1024).bfloat16()
    x, y = mt.from_dlpack(a), mt.from_dlpack(b)
    times = best({"ours": _product(x, y), "torch": _product(a, b)}, 1, 2 * repeat)
    rows.add("bf16 GEMM 1024", times, f"{times['torch'] / times['ours']:.2f}x", "0.7x", "1.0x")


def mlp_step(rows: Rows, repeat: int) -> None:
    for batch, must, goal in ((1, "0.4x", "0.2x"), (64, "0.7x", "0.5x")):
        net = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
        peer = torch.nn.Sequential(torch.nn.Linear(784, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
        mine = optim.Adam(net.parameters(), lr=1e-3)
        fused = torch.optim.Adam(peer.parameters(), lr=1e-3, fused=True)
        p, q = torch.randn(batch, 784), torch.randint(0, 10, (batch,))
        x, y = mt.from_dlpack(p), mt.from_dlpack(q)

        def ours(net: nn.Module = net, mine: optim.Adam = mine, x: mt.Tensor = x, y: mt.Tensor = y) -> None:
            mine.zero_grad()
            mt.cross_entropy(net(x), y).backward()
            mine.step()

        def theirs(
            peer: torch.nn.Module = peer,
            fused: torch.optim.Adam = fused,
            p: torch.Tensor = p,
            q: torch.Tensor = q,
        ) -> None:
            fused.zero_grad()
            F.cross_entropy(peer(p), q).backward()
            fused.step()

        times = best({"ours": ours, "torch": theirs}, 20, 2 * repeat)
        rows.add(
            f"MLP 784-128-10 Adam step, batch {batch}",
            times,
            f"{times['ours'] / times['torch']:.2f}x",
            must,
            goal,
        )


def importing(rows: Rows) -> None:
    code = "import time; t = time.perf_counter(); import mainspring.tensor; print(time.perf_counter() - t)"
    seconds = min(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    )
    rows.add("import mainspring.tensor", {"ours": seconds}, f"{seconds:.3f} s", "0.1", "0.05")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=8, help="turns that each measurement takes")
    repeat = parser.parse_args().repeat
    torch.set_num_threads(1)
    mt.set_num_threads(1)
    torch.manual_seed(0)
    rows = Rows()
    overhead(rows, repeat)
    products(rows, repeat)
    mlp_step(rows, repeat)
    importing(rows)
    Console(width=130).print(rows.table)


if __name__ == "__main__":
    main()
