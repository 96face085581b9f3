"""What a penalty on repetition costs answers that should quote: none, one on all tokens, one on the answer's own.

    python benchmarks/rag_finetune.py --folder HTML --squad $SQUAD --out tuned --squad-questions 200
    python benchmarks/rag_penalty.py tuned/squad

Asks the held-out questions that the first command wrote, with their relevant passage alone (dg) and with a random one
beside it (dgr). Prints containment and F1 with 95% bootstrap intervals, and paired differences to the first row.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mainspring.engine.llm import LLM
from mainspring.rag.evaluation.bootstrap import paired_difference
from mainspring.rag.generation.language_model import FREQUENCY_PENALTY, InProcessModel
from mainspring.rag.generation.robustness import CONTEXTS, score
from mainspring.rag.generation.tuning_data import load_rows

AT_ONCE = 8
PENALTIES = {
    "1.1 on all tokens, the prompt's too": 1.1,
    "none": 1.0,
    f"{FREQUENCY_PENALTY} for each time on the answer's own": None,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="holds held_out.dg.jsonl and held_out.dgr.jsonl")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--limit", type=int, default=200, help="questions")
    options = parser.parse_args()
    llm = LLM(options.model, max_num_seqs=AT_ONCE)
    print("| context | penalty | answer contained | minus the first | F1 | minus the first |")
    print("|---|---|---|---|---|---|")
    for kind in ("dg", "dgr"):
        rows = load_rows(options.folder / f"held_out.{kind}.jsonl")[: options.limit]
        first = None
        for name, penalty in PENALTIES.items():
            model = InProcessModel(llm, at_once=AT_ONCE, repetition_penalty=penalty)
            found = score(model.complete_each([row.messages for row in rows], 64), rows)
            first = first or found
            _, contained, f1 = found.intervals()
            gains = (
                paired_difference(found.contained, first.contained),
                paired_difference(found.f1, first.f1),
            )
            print(f"| {CONTEXTS[kind]} | {name} | {contained} | {gains[0]} | {f1} | {gains[1]} |", flush=True)


if __name__ == "__main__":
    main()
