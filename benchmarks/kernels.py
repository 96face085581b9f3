"""The Triton kernels against their peers on one GPU: `python benchmarks/kernels.py --json kernels.json`.

Ours and the peer's calls are captured in CUDA graphs and replayed in turn, so that neither launch costs nor a
drifting clock favour one of them; inputs rotate among sets that together exceed the L2 cache. A row gives the
median time of a call, half the distance between the quartiles as its spread, and the peer's median over ours.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mainspring.ops.triton import attention as triton_attention
from mainspring.ops.triton import linear as triton_linear
from mainspring.ops.triton.adamw import AdamWParameter, FusedAdamW
from mainspring.ops.triton.log_probs import token_log_probs
from mainspring.ops.triton.norm import add_rms_norm, rms_norm, rms_norm_backward
from mainspring.ops.triton.rope import rope
from mainspring.ops.triton.swiglu import swiglu, swiglu_backward

BF16 = torch.bfloat16
ROTATED_BYTES = 256 << 20
REPLAYS = 15
# (N, K) of the fused projections of Qwen3-0.6B and Qwen3-8B: qkv, output, gate and up, down.
SHAPES = (
    (4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072),
    (6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288),
)  # fmt: skip
ROWS = (1, 16, 64, 128, 512, 1024, 2048, 8192)
Calls = Sequence[Callable[[], object]]


@dataclass
class Row:
    """One line of the table. amount: of `unit` a call (GFLOP or GB); times in microseconds."""

    group: str
    name: str
    amount: float
    unit: str
    ours: float
    ours_spread: float
    peer: float | None = None
    peer_spread: float | None = None
    peer_name: str = ""

    @property
    def ratio(self) -> float | None:
        """Above 1: ours is faster."""
        return None if self.peer is None else self.peer / self.ours

    def text(self) -> str:
        rate = self.amount / self.ours * (1e6 if self.unit == "GB" else 1e3)
        line = f"{self.group:10} {self.name:44} {self.ours:9.1f} us ±{self.ours_spread:6.1f} {rate:8.1f} "
        line += "GB/s" if self.unit == "GB" else "TFLOP/s"
        return line + (f"  {self.ratio:5.2f}x {self.peer_name}" if self.ratio is not None else "")


def graph(calls: Calls) -> torch.cuda.CUDAGraph:
    """All calls, one after the other, in a graph that has been warmed up."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for call in calls:
            call()
    captured.replay()
    torch.cuda.synchronize()
    return captured


def times(many: Sequence[Calls], replays: int = REPLAYS) -> list[tuple[float, float]]:
    """(median, spread) in microseconds of a call, for several lists of calls whose graphs run in turn."""
    graphs = [graph(calls) for calls in many]
    measured: list[list[float]] = [[] for _ in many]
    for _ in range(replays):
        for i, captured in enumerate(graphs):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            captured.replay()
            end.record()
            end.synchronize()
            measured[i].append(start.elapsed_time(end) * 1e3 / len(many[i]))
    out = []
    for values in measured:
        low, _, high = statistics.quantiles(values, n=4)
        out.append((statistics.median(values), (high - low) / 2))
    return out


def row(
    group: str,
    name: str,
    amount: float,
    unit: str,
    ours: Calls,
    peer: Calls | None = None,
    peer_name: str = "",
) -> Row:
    if peer is None:
        return Row(group, name, amount, unit, *times([ours])[0])
    found = times([ours, peer])
    return Row(group, name, amount, unit, *found[0], *found[1], peer_name)


def randn(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype) * scale


def copy_rows() -> Iterator[Row]:
    source, target = randn(1 << 30), torch.empty(1 << 30, device="cuda", dtype=BF16)
    yield row(
        "ceiling",
        "device copy (negation), 2 GiB each way",
        4 * (1 << 30) / 1e9,
        "GB",
        [lambda: torch.neg(source, out=target)],  # a kernel: a graph's copy node takes a slower way
    )
    a, b = randn(8192, 8192), randn(8192, 8192)
    yield row("ceiling", "bf16 GEMM 8192³ (cuBLAS)", 2 * 8192**3 / 1e9, "GFLOP", [lambda: F.linear(a, b)])


def linear_rows(sweep: dict[str, dict[str, float]]) -> Iterator[Row]:
    """Ours by the table's tile; `sweep` receives the median of every tile, whose bits are compared on the way."""
    for n, k in SHAPES:
        count = max(1, min(32, ROTATED_BYTES // (n * k * 2)))
        weights = [randn(n, k, scale=0.02) for _ in range(count)]
        for m in ROWS:
            x = randn(m, k)
            used = weights[: max(1, min(count, 4 if m > 1024 else count))]
            tiles = [choice.tile for choice in triton_linear._CHOICES]
            chosen = triton_linear.choose_tile(
                m, n, k, BF16, torch.cuda.get_device_properties(0).multi_processor_count
            )
            expected = triton_linear.linear(x, used[0], tile=chosen)
            for tile in tiles:
                if not torch.equal(triton_linear.linear(x, used[0], tile=tile), expected):
                    sys.exit(f"M={m} N={n} K={k}: {tile} gives other bits than {chosen}")

            def ours(tile: triton_linear.Tile, x: Tensor = x, used: list[Tensor] = used) -> Calls:
                return [lambda w=w: triton_linear.linear(x, w, tile=tile) for w in used]

            peer = [lambda w=w, x=x: F.linear(x, w) for w in used]
            found = times([*(ours(tile) for tile in tiles), peer], replays=7 if m > 1024 else 11)
            name = f"M={m} N={n} K={k}"
            sweep[name] = {f"{t.rows}x{t.columns}": f_[0] for t, f_ in zip(tiles, found, strict=False)}
            yield Row(
                "linear", f"{name} tile {chosen.rows}x{chosen.columns}", 2e-9 * m * n * k, "GFLOP",
                *found[tiles.index(chosen)], *found[-1], "cuBLAS",
            )  # fmt: skip


def packed(lengths: list[int]) -> tuple[Tensor, Tensor]:
    ends = list(itertools.accumulate(lengths, initial=0))
    return torch.tensor(ends, dtype=torch.int32, device="cuda"), torch.tensor(
        lengths, dtype=torch.int32, device="cuda"
    )


def prefill_rows() -> Iterator[Row]:
    """B · S = 16,384, H · D = 2,048, causal; FLOPs counted at half."""
    tile = triton_attention.Tile
    others = {64: (tile(128, 128, 8, 2),), 128: (tile(128, 64, 8, 3), tile(128, 128, 8, 2))}
    for d, s in itertools.product((64, 128), (512, 2048, 8192, 16384)):
        heads, batch = 2048 // d, 16384 // s
        q, k, v = (randn(16384, heads, d) for _ in range(3))
        ends, contexts = packed([s] * batch)
        dense = [x.view(batch, s, heads, d).transpose(1, 2) for x in (q, k, v)]

        def ours(
            chunk: int = 512, tile: triton_attention.Tile | None = None, q: Tensor = q, k: Tensor = k, v: Tensor = v,
            ends: Tensor = ends, contexts: Tensor = contexts, s: int = s, d: int = d,
        ) -> Calls:  # fmt: skip
            return [
                lambda: triton_attention.attention(
                    q, k, v, ends, contexts, None, d**-0.5, max_length=s, max_context=s, split=False,
                    tile=tile, chunk=chunk,
                )
            ]  # fmt: skip

        def torchs(backend: SDPBackend, dense: list[Tensor] = dense) -> Calls:
            def call() -> Tensor:
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(dense[0], dense[1], dense[2], is_causal=True)

            return [call]

        cases = [
            ours(),
            torchs(SDPBackend.FLASH_ATTENTION),
            torchs(SDPBackend.CUDNN_ATTENTION),
            ours(1 << 30),
        ]
        found = times([*cases, *(ours(tile=t) for t in others[d])], replays=9)
        flop = 2e-9 * 16384 * s * 2048
        name = f"d{d} causal S={s}"
        yield Row("prefill", name, flop, "GFLOP", *found[0], *found[1], "flash2")
        yield Row("prefill", name, flop, "GFLOP", *found[0], *found[2], "cuDNN")
        yield Row("prefill", name, flop, "GFLOP", *found[0], *found[3], "own free order")
        for t, figures in zip(others[d], found[4:], strict=True):
            label = f"{name} (tile {t.rows}x{t.keys}, {t.warps} warps)"
            yield Row("prefill", label, flop, "GFLOP", *figures, *found[1], "flash2")


def decode_rows() -> Iterator[Row]:
    """Paged, blocks of 16 in random order, 32 query and 8 key heads of 128 (and 32, 8 of 64)."""
    tile = triton_attention.Tile
    others = {64: (tile(64, 64, 4, 3),), 128: (tile(64, 64, 4, 4), tile(64, 128, 8, 2), tile(64, 128, 4, 2))}
    for d, (seqs, context) in itertools.product((128, 64), ((64, 2048), (256, 600), (8, 8192), (1, 32768))):
        blocks_each = -(-context // 16)
        blocks = seqs * blocks_each
        k, v = randn(blocks, 16, 8, d), randn(blocks, 16, 8, d)
        tables = torch.randperm(blocks, device="cuda").to(torch.int32).view(seqs, blocks_each)
        q = randn(seqs, 32, d)
        ends, contexts = packed([1] * seqs)[0], torch.full((seqs,), context, dtype=torch.int32, device="cuda")

        def ours(
            tile: triton_attention.Tile | None = None, q: Tensor = q, k: Tensor = k, v: Tensor = v,
            ends: Tensor = ends, contexts: Tensor = contexts, tables: Tensor = tables, context: int = context,
        ) -> Calls:  # fmt: skip
            return [
                lambda: triton_attention.attention(
                    q, k, v, ends, contexts, tables, 0.1, max_length=1, max_context=context, tile=tile
                )
            ]

        amount = 2 * seqs * context * 8 * d * 2 / 1e9
        found = times([ours(), *(ours(t) for t in others[d])], replays=11)
        yield Row("decode", f"d{d} {seqs}x{context}", amount, "GB", *found[0])
        for t, figures in zip(others[d], found[1:], strict=True):
            name = f"d{d} {seqs}x{context} (keys {t.keys}, {t.warps} warps, {t.stages} stages)"
            yield Row("decode", name, amount, "GB", *figures)


def rowwise_rows() -> Iterator[Row]:
    m, h, inner = 16384, 4096, 12288
    x, residual, grad, weight = randn(m, h), randn(m, h), randn(m, h), randn(h)
    size = m * h * 2 / 1e9
    yield row(
        "rowwise", "rms_norm", 2 * size, "GB", [lambda: rms_norm(x, weight, 1e-5)],
        [lambda: F.rms_norm(x, (h,), weight, 1e-5)], "torch",
    )  # fmt: skip
    yield row("rowwise", "add_rms_norm", 4 * size, "GB", [lambda: add_rms_norm(x, residual, weight, 1e-5)])
    yield row(
        "rowwise", "rms_norm backward", 3 * size, "GB", [lambda: rms_norm_backward(x, weight, 1e-5, grad)]
    )
    yield row(
        "rowwise", "add_rms_norm backward", 4 * size, "GB",
        [lambda: rms_norm_backward(x, weight, 1e-5, grad, residual)],
    )  # fmt: skip
    gate_up, grad_inner = randn(m, 2 * inner), randn(m, inner)
    size = m * inner * 2 / 1e9
    yield row("rowwise", "swiglu", 3 * size, "GB", [lambda: swiglu(gate_up)])
    yield row("rowwise", "swiglu backward", 5 * size, "GB", [lambda: swiglu_backward(gate_up, grad_inner)])
    qkv = randn(4 * m, 48, 128)
    q, k, _ = qkv.split((32, 8, 8), 1)
    cos, sin = randn(4 * m, 64, dtype=torch.float32), randn(4 * m, 64, dtype=torch.float32)
    amount = (2 * 4 * m * 40 * 128 * 2 + 2 * 4 * m * 64 * 4) / 1e9
    yield row("rowwise", "rope in place", amount, "GB", [lambda: rope(q, k, cos, sin, in_place=True)])
    for rows, vocab in ((64, 151936), (2048, 151936)):
        logits = randn(rows, vocab, dtype=torch.float32)
        targets = torch.randint(0, vocab, (rows,), device="cuda")
        yield row(
            "rowwise", f"token_log_probs {rows}x{vocab}", rows * vocab * 4 / 1e9, "GB",
            [lambda z=logits, t=targets: token_log_probs(z, t)],
            [lambda z=logits, t=targets: torch.log_softmax(z, -1).gather(1, t[:, None])], "torch",
        )  # fmt: skip


def adamw_rows() -> Iterator[Row]:
    """822M float32 parameters: 64 of 2048² and 48 of 5632 x 2048; 28 bytes of each are read or written."""
    shapes = [(2048, 2048)] * 64 + [(5632, 2048)] * 48
    count = sum(a * b for a, b in shapes)
    rates = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
    weights = [randn(*s, dtype=torch.float32, scale=0.02) for s in shapes]
    gradients = [randn(*s, dtype=torch.float32, scale=1e-3) for s in shapes]
    state = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    ours = FusedAdamW([AdamWParameter(w, a, b, 0.1) for w, a, b in zip(weights, *state, strict=True)])
    parameters = [w.clone().requires_grad_() for w in weights]
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g
    peer = torch.optim.AdamW(
        parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True, capturable=True
    )
    ours.step(gradients, step=1, **rates)  # uploads its table of addresses, which a graph cannot
    yield row(
        "adamw", "822M float32", count * 28 / 1e9, "GB", [lambda: ours.step(gradients, step=2, **rates)],
        [peer.step], "torch fused",
    )  # fmt: skip
    del parameters, peer
    narrow = [g.to(BF16) for g in gradients]
    mixed = FusedAdamW(
        [AdamWParameter(w, a, b, 0.1, w.to(BF16)) for w, a, b in zip(weights, *state, strict=True)]
    )
    mixed.step(narrow, step=1, **rates)
    yield row(
        "adamw", "822M bf16 with float32 masters", count * 28 / 1e9, "GB",
        [lambda: mixed.step(narrow, step=2, **rates)],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the rows here too, after each group")
    parser.add_argument(
        "--groups", default="copy,linear,prefill,decode,adamw,rowwise", help="which, in order"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("the kernels run on CUDA devices, and torch sees none")
    torch.manual_seed(0)
    sweep: dict[str, dict[str, float]] = {}
    groups: dict[str, Callable[[], Iterator[Row]]] = {
        "copy": copy_rows,
        "adamw": adamw_rows,
        "rowwise": rowwise_rows,
        "decode": decode_rows,
        "prefill": prefill_rows,
        "linear": lambda: linear_rows(sweep),
    }
    rows: list[Row] = []
    print(torch.cuda.get_device_name(), torch.__version__)
    for name in arguments.groups.split(","):
        for found in groups[name]():
            rows.append(found)
            print(found.text(), flush=True)
            if arguments.json:
                data = {
                    "device": torch.cuda.get_device_name(),
                    "torch": torch.__version__,
                    "rows": [{**asdict(r), "ratio": r.ratio} for r in rows],
                    "linear_tiles": sweep,
                }
                arguments.json.write_text(json.dumps(data, indent=1))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
