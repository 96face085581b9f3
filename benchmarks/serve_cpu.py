"""Serving a small model on a CPU against `transformers` and llama.cpp, in one run: `python benchmarks/serve_cpu.py`.

One process, the same threads, and the contestants take turns, so that a busy neighbour hurts all of them. Two
comparisons: the same bfloat16 weights against `transformers`, and the quantised blocks of the same GGUF file against
llama.cpp (`llama-cpp-python`, built for this processor; left out with a word if it is not installed). Four cases:

  one stream            a short prompt, then tokens one by one (greedy): tokens generated a second
  8 requests            ours: 8 requests arriving over the first second, each served as it comes; transformers:
                        its best case, a static batch of 8 that starts at once; tokens generated a second,
                        from the first arrival to the last token (llama.cpp takes one stream: its figure is that)
  prefill               a prompt of 1,024 tokens and one token: prompt tokens a second
  start of the server   `mainspring serve`, from the command to the first healthy answer, model in the cache

On a machine that others use too, `--threads 1 --clock cpu` counts the processor's time of this process alone.
The table gives medians and the range over the rounds; the same figures go to a JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mainspring.engine.admission import make_request
from mainspring.engine.llm import LLM
from mainspring.engine.sampling_params import SamplingParams
from mainspring.errors import ModelNotFoundError
from mainspring.formats.named_models import gguf_source, resolve
from mainspring.ops import Numerics
from mainspring.ops.cpu.extension import kernels, unavailable_reason

BARS = {
    ("one stream", "lockstep"): 1.5,
    ("one stream", "fast"): 1.8,
    ("8 requests", "lockstep"): 1.5,
    ("prefill", "lockstep"): 1.0,
}
QUANTISED_BARS = {
    "one stream": 0.8,
    "8 requests": 2.5,
    "prefill": 3.5,
}  # to llama.cpp's; 8 requests to its one stream
ONE_STREAM_BAR = 60.0  # tokens/s, bfloat16 in lockstep
START_BAR_SECONDS = 6.0
SHORT_PROMPT = 32
LONG_PROMPT = 1024
REQUESTS = 8
ARRIVAL_WINDOW_SECONDS = 1.0


@dataclass(frozen=True)
class Workload:
    """The same token ids for everybody. Lengths in tokens."""

    short: list[int]
    batch: list[list[int]]
    arrivals: list[float]
    long: list[int]
    stream_tokens: int
    batch_tokens: int
    clock: Callable[[], float]  # in seconds

    @staticmethod
    def make(vocab_size: int, stream_tokens: int, batch_tokens: int, clock: Callable[[], float]) -> Workload:
        rng = random.Random(0)

        def prompt(length: int) -> list[int]:
            return [rng.randrange(100, vocab_size) for _ in range(length)]

        # Equal lengths: transformers' static batch then wastes nothing on padding.
        return Workload(
            short=prompt(SHORT_PROMPT),
            batch=[prompt(SHORT_PROMPT) for _ in range(REQUESTS)],
            arrivals=sorted(rng.uniform(0.0, ARRIVAL_WINDOW_SECONDS) for _ in range(REQUESTS)),
            long=prompt(LONG_PROMPT),
            stream_tokens=stream_tokens,
            batch_tokens=batch_tokens,
            clock=clock,
        )


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


class Ours:
    """Our engine in one of its numerics, or with quantised weights. Each method gives tokens a second."""

    def __init__(
        self, model: str | Path, numerics: Numerics, work: Workload, *, quantized: bool = False
    ) -> None:
        self._llm = LLM(
            model, dtype="bfloat16", numerics=numerics, quantized=quantized, enable_prefix_caching=False
        )
        self._work = work

    def one_stream(self) -> float:
        began = self._work.clock()
        self._llm.generate(self._work.short, greedy(self._work.stream_tokens))
        return self._work.stream_tokens / (self._work.clock() - began)

    def eight_requests(self) -> float:
        engine, work = self._llm.engine, self._work
        pending = list(zip(work.arrivals, work.batch, strict=True))
        first = pending[0][0]
        began = self._work.clock()
        num_tokens = 0
        while pending or engine.has_work():
            now = self._work.clock() - began + first
            while pending and pending[0][0] <= now:
                _, prompt = pending.pop(0)
                name = str(len(pending))
                engine.add_request(make_request(name, prompt, greedy(work.batch_tokens), engine.limits, ()))
            num_tokens += sum(len(output.token_ids) for output in engine.step())
        return num_tokens / (self._work.clock() - began)

    def prefill(self) -> float:
        began = self._work.clock()
        self._llm.generate(self._work.long, greedy(1))
        return len(self._work.long) / (self._work.clock() - began)


class Transformers:
    """The peer, by its `generate`."""

    def __init__(self, model: Path, work: Workload) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
        self._work = work

    def _seconds(self, prompts: list[list[int]], num_tokens: int) -> float:
        tokens = torch.tensor(prompts)
        began = self._work.clock()
        with torch.inference_mode():
            self._model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
            )
        return self._work.clock() - began

    def one_stream(self) -> float:
        return self._work.stream_tokens / self._seconds([self._work.short], self._work.stream_tokens)

    def eight_requests(self) -> float:
        return REQUESTS * self._work.batch_tokens / self._seconds(self._work.batch, self._work.batch_tokens)

    def prefill(self) -> float:
        return len(self._work.long) / self._seconds([self._work.long], 1)


class LlamaCpp:
    """The peer for quantised weights, on the same GGUF file; greedy, token by token as its own `generate` does it."""

    def __init__(self, file: Path, work: Workload, threads: int) -> None:
        from llama_cpp import Llama

        self._llama = Llama(
            model_path=str(file),
            n_ctx=2 * LONG_PROMPT,
            n_batch=LONG_PROMPT,
            n_ubatch=512,
            n_threads=threads,
            n_threads_batch=threads,
            logits_all=False,
            verbose=False,
        )
        self._work = work

    def one_stream(self) -> float:
        self._llama.reset()
        began = self._work.clock()
        stream = self._llama.generate(self._work.short, temp=0.0, repeat_penalty=1.0, reset=True)
        for _ in range(self._work.stream_tokens):
            next(stream)
        return self._work.stream_tokens / (self._work.clock() - began)

    def eight_requests(self) -> float:
        return self.one_stream()

    def prefill(self) -> float:
        self._llama.reset()
        began = self._work.clock()
        self._llama.eval(self._work.long)
        return len(self._work.long) / (self._work.clock() - began)


def start_seconds(model: str) -> float:
    """From the command to the first healthy answer."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("mainspring")), "serve", model, "--port", str(port)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                    return time.perf_counter() - began
            except (urllib.error.URLError, TimeoutError, ConnectionError):
                time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


Contestant = Ours | Transformers | LlamaCpp


def measure(contestants: dict[str, Contestant], rounds: int) -> dict[str, dict[str, list[float]]]:
    """case -> contestant -> one figure a round; the first, unmeasured round warms everything up."""
    cases: dict[str, Callable[[Any], float]] = {
        "one stream": lambda c: c.one_stream(),
        "8 requests": lambda c: c.eight_requests(),
        "prefill": lambda c: c.prefill(),
    }
    figures: dict[str, dict[str, list[float]]] = {case: {name: [] for name in contestants} for case in cases}
    for round_number in range(rounds + 1):
        for case, run in cases.items():
            # Another goes first in every round.
            names = list(contestants)
            first = round_number % len(names)
            for name in names[first:] + names[:first]:
                figure = run(contestants[name])
                if round_number > 0:
                    figures[case][name].append(figure)
    return figures


def show(console: Console, figures: dict[str, dict[str, list[float]]], starts: list[float]) -> None:
    names = list(next(iter(figures.values())))
    table = Table(title="tokens/s: median (lowest to highest); ratio to the peer on the same weights")
    table.add_column("case")
    for name in names:
        table.add_column(name, justify="right")
    for case, by_name in figures.items():
        row = [case]
        for name, values in by_name.items():
            text = f"{median(values):.1f} ({min(values):.1f} to {max(values):.1f})"
            peer = {"lockstep": "transformers", "fast": "transformers", "quantised": "llama.cpp"}.get(name)
            if peer in by_name:
                ratio = median(values) / median(by_name[peer])
                bar = QUANTISED_BARS[case] if name == "quantised" else BARS.get((case, name))
                text += f"  {ratio:.2f}x" + ("" if bar is None else f" [bar {bar}: {_verdict(ratio >= bar)}]")
            row.append(text)
        table.add_row(*row)
    console.print(table)
    if "lockstep" in names:
        stream = median(figures["one stream"]["lockstep"])
        verdict = _verdict(stream >= ONE_STREAM_BAR)
        console.print(
            f"one stream in lockstep: {stream:.1f} tokens/s [bar {ONE_STREAM_BAR:g}: {verdict}]", markup=False
        )
    if starts:
        verdict = _verdict(max(starts) <= START_BAR_SECONDS)
        console.print(
            f"start of the server, second time: {median(starts):.2f} s "
            f"({min(starts):.2f} to {max(starts):.2f}) [bar {START_BAR_SECONDS}: {verdict}]",
            markup=False,
        )


def _verdict(reached: bool) -> str:
    return "reached" if reached else "missed"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="a directory, a GGUF file or a known name")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--stream-tokens", type=int, default=64)
    parser.add_argument("--batch-tokens", type=int, default=64)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--only", default="", help="contestants to measure, separated by commas")
    parser.add_argument("--starts", type=int, default=3, help="starts of the server; 0 leaves them out")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()

    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu adds up the threads' time: it needs --threads 1")
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    console = Console(width=150)
    torch.set_num_threads(options.threads)
    compiled = kernels()
    if compiled is None:
        console.print(f"without C++ kernels: {unavailable_reason()}", markup=False)
    else:
        compiled.set_num_threads(options.threads)
    directory = resolve(options.model).path
    vocab_size = json.loads((directory / "config.json").read_text())["vocab_size"]
    work = Workload.make(vocab_size, options.stream_tokens, options.batch_tokens, clock)
    contestants: dict[str, Contestant] = {
        "lockstep": Ours(directory, "lockstep", work),
        "fast": Ours(directory, "fast", work),
        "transformers": Transformers(directory, work),
    }
    try:
        file = gguf_source(options.model)
        contestants["quantised"] = Ours(file, "lockstep", work, quantized=True)
        contestants["llama.cpp"] = LlamaCpp(file, work, options.threads)
    except ModelNotFoundError as error:
        console.print(f"quantised weights left out: {error}", markup=False)
    except ImportError:
        console.print("llama.cpp left out: pip install llama-cpp-python", markup=False)
    if options.only:
        contestants = {name: contestants[name] for name in options.only.split(",")}
    figures = measure(contestants, options.rounds)
    starts = [start_seconds(options.model) for _ in range(options.starts)]
    show(console, figures, starts)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "processor": platform.processor() or platform.machine(),
        "isa": None if compiled is None else compiled.isa(),
        "threads": options.threads,
        "clock": options.clock,
        "torch": torch.__version__,
        "tokens_per_second": figures,
        "start_seconds": starts,
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"figures in {options.json}", markup=False)


if __name__ == "__main__":
    main()
