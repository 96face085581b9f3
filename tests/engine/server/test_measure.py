"""Load on a server and what is measured of it; log-probabilities told by servers that tell less than ours."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mainspring.engine.measure.latency_plot import latency_svg
from mainspring.engine.measure.load import Distribution, LoadPlan, LoadResult, Timing, percentile
from mainspring.engine.measure.mismatch import _ids_of, _served
from mainspring.errors import ConfigError
from mainspring.formats.tokenizer import Tokenizer
from support.serving import VOCAB_SIZE, Server


def test_a_plan_s_lengths_come_all_prompts_first() -> None:
    import random

    plan = LoadPlan(num_requests=5, input_tokens=(3, 9), output_tokens=(2, 7), vocab_size=100)
    draw = random.Random(0)
    inputs = [draw.randint(3, 9) for _ in range(5)]
    outputs = [draw.randint(2, 7) for _ in range(5)]
    requests = plan.requests()
    assert [len(request.prompt) for request in requests] == inputs
    assert [request.max_tokens for request in requests] == outputs
    assert {request.arrival for request in requests} == {0.0}
    assert requests == plan.requests()
    assert requests != LoadPlan(num_requests=5, seed=1).requests()


def test_arrivals_are_a_poisson_process() -> None:
    plan = LoadPlan(num_requests=4000, request_rate=50.0, input_tokens=(1, 1), output_tokens=(1, 1))
    arrivals = [request.arrival for request in plan.requests()]
    gaps = [after - before for before, after in itertools.pairwise(arrivals)]
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.1)
    # The standard deviation of an exponential distribution is its mean.
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.1)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.integers(1, 99))
def test_percentiles_are_those_of_the_standard_library(values: list[float], percent: int) -> None:
    ordered = sorted(values)
    if len(ordered) == 1:
        assert percentile(ordered, percent) == ordered[0]
    else:
        wanted = statistics.quantiles(ordered, n=100, method="inclusive")[percent - 1]
        assert percentile(ordered, percent) == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_a_request_s_own_measures() -> None:
    timing = Timing(prompt_tokens=3, output_tokens=5, pieces=[0.5, 0.7, 1.3], end=1.4)
    assert timing.gaps == pytest.approx([0.2, 0.6])
    assert timing.per_token == pytest.approx(0.8 / 4)
    assert Timing(output_tokens=1, pieces=[0.5]).per_token is None


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"num_requests": 0}, "num_requests"),
        ({"request_rate": 0.0}, "request_rate"),
        ({"request_rate": math.nan}, "request_rate"),
        ({"input_tokens": (5, 4)}, "input_tokens"),
        ({"chat": True, "vocab_size": 10}, "vocab_size"),
    ],
)
def test_a_plan_that_cannot_be_says_why(fields: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        LoadPlan(**fields)


def bench_serve(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`mainspring bench serve` as a user runs it."""
    code = "from mainspring.cli.main import main; main()"
    command = [sys.executable, "-c", code, "bench", "serve", server.url, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_measures_a_server(server: Server, tmp_path: Path) -> None:
    before = server.metric("e2e_request_latency_seconds_count")
    path, plot = tmp_path / "result.json", tmp_path / "latency.svg"
    lengths = ("--input-tokens", "5-30", "--output-tokens", "4-12", "--vocab-size", str(VOCAB_SIZE - 2))
    done = bench_serve(
        server,
        "--num-requests",
        "20",
        "--request-rate",
        "100",
        *lengths,
        "--json",
        str(path),
        "--plot",
        str(plot),
    )
    assert done.returncode == 0, done.stderr
    assert "time to first token" in done.stdout
    result = json.loads(path.read_text())
    plan = LoadPlan(num_requests=20, input_tokens=(5, 30), output_tokens=(4, 12), vocab_size=VOCAB_SIZE - 2)
    assert (result["completed"], result["failed"]) == (20, 0)
    assert result["prompt_tokens"] == sum(len(request.prompt) for request in plan.requests())
    assert result["output_tokens"] == sum(request.max_tokens for request in plan.requests())
    assert len(result["ttft"]["values"]) == len(result["e2e"]["values"]) == 20
    assert result["output_tokens_per_second"] == pytest.approx(result["output_tokens"] / result["seconds"])
    for name in ("ttft", "itl", "tpot", "e2e"):
        measured = result[name]
        assert 0 <= measured["percentiles"]["p50"] <= measured["percentiles"]["p99"] <= measured["max"]
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")
    assert server.metric("e2e_request_latency_seconds_count") == before + 20


def test_the_command_reports_what_fails(server: Server) -> None:
    # The prompts are longer than the context.
    done = bench_serve(server, "--num-requests", "3", "--input-tokens", "9000", "--vocab-size", "100")
    assert done.returncode == 1
    assert "3 failed" in done.stdout
    assert "context" in done.stdout


def test_the_plot_shows_each_distribution() -> None:
    some = Distribution.of([0.1, 0.2, 0.4])
    result = LoadResult(
        url="", model="<m>", plan={}, seconds=1.0, completed=3, failed=0, errors={}, prompt_tokens=1, output_tokens=3,
        requests_per_second=3.0, output_tokens_per_second=3.0, total_tokens_per_second=4.0, peak_concurrency=1,
        ttft=some, itl=None, tpot=None, e2e=some,
    )  # fmt: skip
    drawn = ElementTree.fromstring(latency_svg(result))
    texts = [element.text or "" for element in drawn.iter() if element.tag.endswith("text")]
    assert any("<m>" in text for text in texts)
    assert {"time to first token", "whole request"} <= set(texts)
    assert "inter-token latency" not in texts


def test_token_ids_are_found_even_where_a_server_gives_texts(tiny_model: Path) -> None:
    tokenizer = Tokenizer.from_directory(tiny_model)
    ids = tokenizer.encode("abc")
    assert _ids_of(["token_id:5", "token_id:7"], "", tokenizer) == [5, 7]
    assert _ids_of(["a", "b", "c"], "abc", tokenizer) == ids
    assert _ids_of(["ab", "c"], "abc", tokenizer) is None
    choice = {"text": "abc", "logprobs": {"tokens": ["a", "b", "c"], "token_logprobs": [-1, -2, -3]}}
    served = _served([1], choice, tokenizer)
    assert served is not None
    assert (served.token_ids, served.logprobs) == (ids, [-1.0, -2.0, -3.0])
    assert _served([1], {**choice, "token_ids": [9]}, tokenizer) is None


def test_the_diff_command_finds_no_gap_with_our_own_server(
    server: Server, tiny_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "diff.json"
    code = "from mainspring.cli.main import main; main()"
    arguments = [
        str(tiny_model),
        "--url",
        server.url,
        "--max-tokens",
        "12",
        "--fail-above",
        "0",
        "--json",
        str(path),
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, "diff", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No token diverges" in done.stdout
    result = json.loads(path.read_text())
    assert result["tokens"] == result["exact"] == 96
