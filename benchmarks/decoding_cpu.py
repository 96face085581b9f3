"""What decoding features cost and gain on a CPU, with a real small model: `python benchmarks/decoding_cpu.py`.

One stream of SmolLM2 in bfloat16; the contestants take turns, and each pair gives the same text (it is checked):

  n-gram speculation    texts that repeat their prompt (copy, edit code), and one that does not: the share of drafted
                        tokens that was accepted, tokens a step, and the speed-up over the same requests without
  structured output     a JSON schema against the same request without: milliseconds a token, and of it in the mask
  sampling              greedy, a temperature, top-k with top-p, penalties: milliseconds a token

The table gives medians over the rounds; the same figures go to a JSON file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mainspring.engine.llm import LLM
from mainspring.engine.outputs import RequestOutput
from mainspring.engine.sampling_params import SamplingParams, StructuredOutputsParams
from mainspring.engine.speculative import SpeculativeConfig
from mainspring.engine.structured_output import GrammarCompiler
from mainspring.formats.named_models import resolve
from mainspring.model.checkpoint import load_model
from mainspring.ops.threads import set_num_threads

PASSAGE = (
    "The keeper of the lighthouse wrote down the weather every morning: wind from the west, waves of two metres, "
    "three ships in sight. In the evening he lit the lamp and counted the flashes until he fell asleep."
)
CODE = (
    "def area(width, height):\n    if width < 0 or height < 0:\n        raise ValueError('negative')\n"
    "    return width * height\n"
)
TEXTS = {
    "copy a passage": f"Repeat this text word for word:\n{PASSAGE}\n\nThe text again:\n{PASSAGE[:40]}",
    "edit code": f"{CODE}\n# The same function for a triangle:\n{CODE.replace('area', 'triangle_area')[:30]}",
    "tell a story": "Once upon a time there was a clockmaker who",
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 15}, "maxItems": 4},
        "kind": {"enum": ["person", "place", "thing"]},
        "address": {
            "type": "object",
            "properties": {
                "street": {"type": "string", "maxLength": 40},
                "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
            },
            "required": ["street", "zip"],
        },
    },
    "required": ["name", "age", "tags", "kind", "address"],
    "additionalProperties": False,
}


def timed(run: Callable[[], list[RequestOutput]]) -> tuple[float, RequestOutput]:
    """Seconds of the decode: from the first token to the last, the prompt left out."""
    start = time.perf_counter()
    [output] = run()
    return time.perf_counter() - start, output


def speculation(plain: LLM, drafted: LLM, rounds: int, tokens: int) -> list[dict[str, Any]]:
    rows = []
    for name, text in TEXTS.items():
        for temperature in (0.0, 0.7):
            params = SamplingParams(temperature=temperature, seed=1, max_tokens=tokens, ignore_eos=True)
            before = drafted.engine.stats()
            seconds: dict[str, list[float]] = {"plain": [], "drafted": []}
            for _ in range(rounds):
                slow, expected = timed(lambda: plain.generate(text, params))  # noqa: B023 - called at once
                fast, output = timed(lambda: drafted.generate(text, params))  # noqa: B023 - called at once
                assert output.outputs == expected.outputs
                seconds["plain"].append(slow)
                seconds["drafted"].append(fast)
            after = drafted.engine.stats()
            drafts = after.draft_tokens_total - before.draft_tokens_total
            accepted = after.accepted_tokens_total - before.accepted_tokens_total
            rows.append(
                {
                    "case": f"{name}, temperature {temperature:g}",
                    "accepted": accepted / max(1, drafts),
                    "tokens_a_step": rounds * tokens / (after.steps_total - before.steps_total),
                    "plain_tokens_per_s": tokens / median(seconds["plain"]),
                    "drafted_tokens_per_s": tokens / median(seconds["drafted"]),
                    "speed_up": median(seconds["plain"]) / median(seconds["drafted"]),
                }
            )
    return rows


def milliseconds_a_token(llm: LLM, params: SamplingParams) -> float:
    seconds, output = timed(lambda: llm.generate("A record in JSON:\n", params))
    return 1e3 * seconds / len(output.outputs[0].token_ids)


def structure(llm: LLM, rounds: int) -> dict[str, Any]:
    """The grammar's own time is taken on the tokens of a finished text, outside the engine."""
    assert llm.tokenizer is not None
    structured = SamplingParams(
        structured_outputs=StructuredOutputsParams(json=SCHEMA), seed=3, max_tokens=200
    )
    free = SamplingParams(seed=3, max_tokens=60, ignore_eos=True)
    [output] = llm.generate("A record in JSON:\n", structured)
    token_ids = output.outputs[0].token_ids
    vocab_size = llm.model.config.vocab_size
    start = time.perf_counter()
    compiler = GrammarCompiler(llm.tokenizer, vocab_size, llm.tokenizer.eos_token_ids)
    compiler.grammar(StructuredOutputsParams(regex="a"))
    first = time.perf_counter() - start
    compiles, masks, walks = [], [], []
    mask = torch.empty((1, -(-vocab_size // 32)), dtype=torch.int32)
    params = StructuredOutputsParams(json=SCHEMA)
    for number in range(rounds):
        fresh = StructuredOutputsParams(json={**SCHEMA, "title": str(number)})
        start = time.perf_counter()
        compiler.grammar(fresh)
        compiles.append(time.perf_counter() - start)
        grammar = compiler.grammar(params)
        for token_id in token_ids:
            start = time.perf_counter()
            grammar.fill_bitmask(mask, 0)
            middle = time.perf_counter()
            grammar.accept(token_id)
            masks.append(middle - start)
            walks.append(time.perf_counter() - middle)
    pairs = [(milliseconds_a_token(llm, structured), milliseconds_a_token(llm, free)) for _ in range(rounds)]
    return {
        "text_tokens": len(token_ids),
        "vocabulary_once_ms": 1e3 * first,
        "compile_ms": 1e3 * median(compiles),
        "mask_us_median": 1e6 * median(masks),
        "mask_us_mean": 1e6 * sum(masks) / len(masks),
        "accept_us_median": 1e6 * median(walks),
        "structured_ms_a_token": median(pair[0] for pair in pairs),
        "free_ms_a_token": median(pair[1] for pair in pairs),
    }


def sampling(llm: LLM, rounds: int, tokens: int) -> dict[str, float]:
    cases = {
        "greedy": SamplingParams(temperature=0),
        "temperature 0.8": SamplingParams(temperature=0.8, seed=1),
        "top_k 20, top_p 0.95": SamplingParams(temperature=0.8, top_k=20, top_p=0.95, seed=1),
        "top_p 0.95": SamplingParams(temperature=0.8, top_p=0.95, seed=1),
        "penalties": SamplingParams(temperature=0.8, presence_penalty=0.5, repetition_penalty=1.1, seed=1),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, params in cases.items():
            fields = {field: getattr(params, field) for field in params.__struct_fields__}
            longer = SamplingParams(**{**fields, "max_tokens": tokens, "ignore_eos": True})
            times[name].append(milliseconds_a_token(llm, longer))
    return {name: median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("decoding_cpu.json"))
    arguments = parser.parse_args()
    set_num_threads(arguments.threads)
    directory = resolve("smollm2", "bfloat16").path
    model = load_model(directory)
    plain = LLM(directory, num_blocks=100, enable_prefix_caching=False)
    speculative = SpeculativeConfig(num_speculative_tokens=4, prompt_lookup_max=4, prompt_lookup_min=2)
    drafted = LLM(
        model,
        tokenizer=plain.tokenizer,
        num_blocks=100,
        enable_prefix_caching=False,
        speculative_config=speculative,
    )
    result = {
        "speculation": speculation(plain, drafted, arguments.rounds, arguments.tokens),
        "structure": structure(plain, arguments.rounds),
        "sampling_ms_a_token": sampling(plain, arguments.rounds, arguments.tokens),
    }
    arguments.json.write_text(json.dumps(result, indent=1))
    console = Console()
    table = Table("n-gram speculation", "accepted", "tokens a step", "tokens/s without", "with", "speed-up")
    for row in result["speculation"]:
        numbers = [
            row["accepted"],
            row["tokens_a_step"],
            row["plain_tokens_per_s"],
            row["drafted_tokens_per_s"],
        ]
        table.add_row(row["case"], *(f"{number:.2f}" for number in numbers), f"{row['speed_up']:.2f}x")
    console.print(table)
    for title in ("structure", "sampling_ms_a_token"):
        table = Table(title, "")
        for name, value in result[title].items():
            table.add_row(name, f"{value:.2f}")
        console.print(table)


if __name__ == "__main__":
    main()
