"""A server of a small model on this machine under load, as its clients see it: `python benchmarks/serve_load.py`.

Starts `mainspring serve`, sends what `mainspring bench serve` sends (at two rates, and all at once), and ends the
server. The load average stands beside the figures: on cores that others use they tell of those others.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_READY_SECONDS = 120.0


@dataclass(frozen=True)
class Load:
    """What a round sends; rate: requests a second, None for all at once."""

    name: str
    requests: int
    rate: float | None


LOADS = (Load("0.5 requests/s", 30, 0.5), Load("1.5 requests/s", 60, 1.5), Load("16 at once", 16, None))
LENGTHS = ("--input-tokens", "32-256", "--output-tokens", "16-64")


def measure(url: str, load: Load, result: Path) -> dict[str, Any]:
    """One round of load: what `mainspring bench serve --json` wrote, and how busy the machine was."""
    rate = () if load.rate is None else ("--request-rate", str(load.rate))
    before = os.getloadavg()[0]
    command = [
        sys.executable,
        "-m",
        "mainspring",
        "bench",
        "serve",
        url,
        "--num-requests",
        str(load.requests),
    ]
    subprocess.run([*command, *rate, *LENGTHS, "--json", str(result)], check=True, stdout=subprocess.DEVNULL)
    written: dict[str, Any] = json.loads(result.read_text())
    return {**written, "name": load.name, "load_average": [before, os.getloadavg()[0]]}


def start(model: str, threads: int, output: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A server on a free port, and its address once it is ready. Raises RuntimeError if it does not get so far."""
    command = [sys.executable, "-m", "mainspring", "serve", model, "--port", "0", "--threads", str(threads)]
    with output.open("wb") as file:
        server = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "COLUMNS": "200"}
        )
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        for line in output.read_text().splitlines():
            if line.startswith("API "):
                return server, line.split()[1].removesuffix("/v1")
        time.sleep(0.1)
    server.kill()
    server.wait()
    raise RuntimeError(f"the server did not get ready: {output.read_text()}")


def main() -> None:
    """Measures, prints a table and writes the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the server is ended all the same
    with tempfile.TemporaryDirectory() as directory:
        server, url = start(options.model, options.threads, Path(directory) / "server.txt")
        try:
            measure(url, Load("warm-up", 4, None), Path(directory) / "load.json")
            results = [measure(url, load, Path(directory) / "load.json") for load in LOADS]
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()
    table = Table(
        "load", "milliseconds", "mean", "p50", "p90", "p95", "p99", "output tokens/s", "load average",
        title=f"{options.model}, {options.threads} threads, {platform.processor() or platform.machine()}",
    )  # fmt: skip
    for result in results:
        for name, label in (("ttft", "time to first token"), ("itl", "inter-token latency")):
            measured = result[name]
            row = [measured["mean"], *(measured["percentiles"][p] for p in ("p50", "p90", "p95", "p99"))]
            busy = " to ".join(f"{value:.1f}" for value in result["load_average"])
            rate = f"{result['output_tokens_per_second']:.1f}"
            table.add_row(result["name"], label, *(f"{value * 1e3:,.0f}" for value in row), rate, busy)
    Console(width=150).print(table)
    if options.json is not None:
        summary = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": sys.argv,
            "loads": results,
        }
        options.json.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
