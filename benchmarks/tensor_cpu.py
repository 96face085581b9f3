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
import multiprocessing
import socket
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
from mainspring.errors import MainspringError
from mainspring.tensor import nn, optim, parallel

Run = Callable[[], object]


def best(
    runs: dict[str, Run], number: int, repeat: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Seconds of one call of each, taken in turns."""
    least = dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        run()
    for _ in range(repeat):
        for name, run in runs.items():
            start = clock()
            for _ in range(number):
                run()
            least[name] = min(least[name], (clock() - start) / number)
    return least


class Rows:
    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.table = Table("row", "ours", "PyTorch", "other", "measure", "must", "goal")

    def add(self, name: str, times: dict[str, float], measure: str, must: str, goal: str) -> None:
        def show(key: str) -> str:
            return f"{times[key] * 1e6:.2f} µs" if key in times else ""

        print(f"{name}: {measure}", file=sys.stderr, flush=True)  # the table comes at the end
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
        return {name: seconds / 10 for name, seconds in best(runs, 2000, repeat, rows.clock).items()}

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

    times = best({"ours": chain(c), "torch": chain(r)}, 300, repeat, rows.clock)
    rows.add("10 multiplications and backward", times, f"{times['ours'] * 1e6:.1f} µs", "12", "6")


def _product(a: Any, b: Any) -> Run:
    return lambda: a @ b


def products(rows: Rows, repeat: int) -> None:
    for n in (512, 768, 1024):
        a, b = torch.randn(n, n), torch.randn(n, n)
        x, y, u, v = mt.from_dlpack(a), mt.from_dlpack(b), a.numpy(), b.numpy()
        runs = {"ours": _product(x, y), "torch": _product(a, b), "numpy": _product(u, v)}
        times = best(runs, 1, 2 * repeat, rows.clock)
        ratio = min(times["torch"], times["numpy"]) / times["ours"]
        rows.add(f"sgemm {n}", times, f"{ratio:.2f}x", "0.95x", "1.0x")
    a, b = torch.randn(1024, 1024).bfloat16(), torch.randn(1024, 1024).bfloat16()
    x, y = mt.from_dlpack(a), mt.from_dlpack(b)
    times = best({"ours": _product(x, y), "torch": _product(a, b)}, 1, 2 * repeat, rows.clock)
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

        times = best({"ours": ours, "torch": theirs}, 20, 2 * repeat, rows.clock)
        rows.add(
            f"MLP 784-128-10 Adam step, batch {batch}",
            times,
            f"{times['ours'] / times['torch']:.2f}x",
            must,
            goal,
        )


class _TorchBlock(torch.nn.Module):
    """The peer of nn.TransformerBlock, as one writes it with PyTorch's own layers."""

    def __init__(self, hidden: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.input_norm, self.post_norm = torch.nn.RMSNorm(hidden, 1e-6), torch.nn.RMSNorm(hidden, 1e-6)
        self.qkv = torch.nn.Linear(hidden, 3 * hidden, bias=False)
        self.output = torch.nn.Linear(hidden, hidden, bias=False)
        self.gate, self.up = (torch.nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down = torch.nn.Linear(inner, hidden, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        b, t, h = x.shape
        q, k, v = (
            self.qkv(self.input_norm(x)).view(b, t, 3, self.heads, h // self.heads).permute(2, 0, 3, 1, 4)
        )

        def turn(y: torch.Tensor) -> torch.Tensor:
            first, second = y.chunk(2, -1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

        out = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
        x = x + self.output(out.transpose(1, 2).reshape(b, t, h))
        y = self.post_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def gpt_step(rows: Rows, repeat: int) -> None:
    layers, hidden, inner, heads, length, batch, vocabulary = 4, 128, 344, 4, 256, 4, 4096
    angles = nn.RotaryAngles(hidden // heads)
    embedding = nn.Embedding(vocabulary, hidden)
    blocks = nn.ModuleList([nn.TransformerBlock(hidden, inner, heads, angles=angles) for _ in range(layers)])
    norm, head = nn.RMSNorm(hidden), nn.Linear(hidden, vocabulary, bias=False)
    mine = optim.AdamW(p for m in (embedding, blocks, norm, head) for p in m.parameters())
    t_embedding = torch.nn.Embedding(vocabulary, hidden)
    t_blocks = torch.nn.ModuleList([_TorchBlock(hidden, inner, heads) for _ in range(layers)])
    t_norm, t_head = torch.nn.RMSNorm(hidden, 1e-6), torch.nn.Linear(hidden, vocabulary, bias=False)
    peers = [p for m in (t_embedding, t_blocks, t_norm, t_head) for p in m.parameters()]
    fused = torch.optim.AdamW(peers, fused=True)
    p, q = (torch.randint(0, vocabulary, (batch, length)) for _ in range(2))
    x, y = mt.from_dlpack(p), mt.from_dlpack(q).reshape(-1)
    cos, sin = (torch.from_dlpack(t.clone()) for t in angles.at(0, length))

    def ours() -> None:
        mine.zero_grad()
        h = embedding(x)
        for block in blocks:
            h = block(h)
        mt.cross_entropy(head(norm(h)).reshape(-1, vocabulary), y).backward()
        mine.step()

    def theirs() -> None:
        fused.zero_grad()
        h = t_embedding(p)
        for block in t_blocks:
            h = block(h, cos, sin)
        F.cross_entropy(t_head(t_norm(h)).view(-1, vocabulary), q.view(-1)).backward()
        fused.step()

    times = best({"ours": ours, "torch": theirs}, 1, repeat, rows.clock)
    name = "GPT step (4 layers, d 128, T 256, B 4, V 4096)"
    rows.add(name, times, f"{times['ours'] / times['torch']:.2f}x", "1.0x", "0.8x")


def _ranks(rank: int, port: int, repeat: int, answer: Any) -> None:
    """Both libraries in the same two processes, in turns; rank 0 reports the minima."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    mt.set_num_threads(1)
    world = parallel.World(rank, 2, f"127.0.0.1:{port}")
    group = parallel.new_group(world, [0, 1])
    assert group is not None
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port + 1}", rank=rank, world_size=2)
    mine, theirs = mt.randn(16_384), torch.randn(16_384)
    reduce = best(
        {"ours": lambda: group.all_reduce(mine, "avg"), "torch": lambda: dist.all_reduce(theirs)},
        20,
        4 * repeat,
    )

    hidden, inner, tokens = 512, 2048, 128
    first = parallel.ColumnParallelLinear(hidden, inner, group, bias=False)
    second = parallel.RowParallelLinear(inner, hidden, group, bias=False)
    x = mt.randn(tokens, 1, hidden).requires_grad_()

    def ours() -> None:
        first.weight.grad = second.weight.grad = x.grad = None
        second(mt.gelu(first(x))).sum().backward()

    class Copy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
            return value

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            grad = grad.contiguous()
            dist.all_reduce(grad)
            return grad

    class Reduce(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
            value = value.clone()
            dist.all_reduce(value)
            return value

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad

    w1 = torch.randn(inner // 2, hidden).mul_(0.02).requires_grad_()
    w2 = torch.randn(hidden, inner // 2).mul_(0.02).requires_grad_()
    p = torch.randn(tokens, 1, hidden, requires_grad=True)

    def peers() -> None:
        w1.grad = w2.grad = p.grad = None
        Reduce.apply(F.linear(F.gelu(F.linear(Copy.apply(p), w1)), w2)).sum().backward()

    product = best({"ours": ours, "torch": peers}, 1, 4 * repeat)
    if rank == 0:
        answer.send((reduce, product))
    dist.destroy_process_group()


def between_ranks(rows: Rows, repeat: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    processes = [context.Process(target=_ranks, args=(rank, port, repeat, sender)) for rank in range(2)]
    for process in processes:
        process.start()
    reduce, product = receiver.recv()
    for process in processes:
        process.join()
    rows.add("64 KB all-reduce, 2 ranks", reduce, f"{reduce['ours'] / reduce['torch']:.3f}x", "0.3x", "0.1x")
    name = "tensor-parallel MLP (d 512, 2 ranks), forward and backward"
    rows.add(name, product, f"{product['ours'] / product['torch']:.2f}x", "0.8x", "0.5x")


def generation(rows: Rows) -> None:
    """SmolLM2-135M in bfloat16, greedy, both with a cache; time of a token after the first."""
    from transformers import AutoModelForCausalLM

    from mainspring.formats.named_models import resolve
    from mainspring.tensor.llama import LlamaModel

    path = resolve("smollm2").path
    model = LlamaModel.from_directory(path, mt.bfloat16)
    peer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    prompt = [1, 504, 3575, 282, 4649, 314]

    def ours() -> None:
        with mt.no_grad():
            list(model.generate(prompt, 24))

    def theirs() -> None:
        with torch.no_grad():
            ids = torch.tensor([prompt])
            mask = torch.ones_like(ids)
            peer.generate(ids, attention_mask=mask, max_new_tokens=24, min_new_tokens=24, do_sample=False)

    tokens = len(list(model.generate(prompt, 24)))
    times = best({"ours": ours, "torch": theirs}, 1, 3, rows.clock)
    times = {"ours": times["ours"] / tokens, "torch": times["torch"] / 24}
    rows.add(
        "SmolLM2-135M, a token, bf16 (transformers)", times, f"{times['ours'] / times['torch']:.2f}x", "", ""
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
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: the thread's own time, for a machine that others use too (not between ranks)",
    )
    parser.add_argument("--no-ranks", action="store_true", help="leave out what needs two processes")
    options = parser.parse_args()
    repeat = options.repeat
    torch.set_num_threads(1)
    mt.set_num_threads(1)
    torch.manual_seed(0)
    rows = Rows(time.thread_time if options.clock == "cpu" else time.perf_counter)
    overhead(rows, repeat)
    products(rows, repeat)
    mlp_step(rows, repeat)
    gpt_step(rows, repeat)
    importing(rows)
    try:
        generation(rows)
    except MainspringError as error:  # the model's package is not installed
        print(f"generation left out: {error}", file=sys.stderr)
    if not options.no_ranks:
        between_ranks(rows, repeat)
    Console(width=130).print(rows.table)


if __name__ == "__main__":
    main()
