"""The paper's ablation on the Python documentation: one step changed at a time, EM, F1, faithfulness, latency.

    apt-get download python3.11-doc && dpkg -x python3.11-doc_*.deb doc
    mkdir docs && cp -rL doc/usr/share/doc/python3.11/html/{tutorial,howto,faq} docs
    python benchmarks/rag_ablation.py --folder docs
    python benchmarks/rag_ablation.py --folder docs --wall --count 12   # on quiet cores: latency

The 88 questions were written from sentences drawn at random (rag_python_questions.jsonl: question, accepted short
answers, the sentence that holds the answer, its file). Each cell is BASE with what its name says changed. The model
answers in a few words after two examples; all measures are deterministic: exact match, whether the answer contains an
accepted one (what the authors call EM), F1 against the best accepted one, the share of its words that stand in what it
read, and whether what it read holds the sentence. Intervals are 95% bootstraps, differences paired by question.

Whatever was computed is kept under --work by content address, and a finished cell in `cells/`: a run that was stopped
goes on where it was. Times are CPU seconds of the whole process from the question to the context, without the answer.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mainspring.engine.llm import LLM
from mainspring.engine.sampling_params import SamplingParams
from mainspring.formats.files import write_json
from mainspring.rag.assembly import open_variants
from mainspring.rag.classification.classifier import QueryClassifier, train
from mainspring.rag.classification.examples import make_examples
from mainspring.rag.embedding.embedder import Embedder
from mainspring.rag.embedding.models import load_embedder
from mainspring.rag.evaluation.bootstrap import bootstrap, paired_difference
from mainspring.rag.evaluation.measures import exact_match, faithfulness, token_f1
from mainspring.rag.generation.language_model import InProcessModel, Message
from mainspring.rag.generation.prompts import neutral
from mainspring.rag.search.questions import TuneQuestion
from mainspring.rag.search.space import Choice, Value
from mainspring.rag.search.stage_cache import StageCache
from mainspring.rag.search.variants import VariantEvaluator
from mainspring.rag.strategy import ContextStep, IndexStep, RerankStep, RetrieveStep, Strategy

BASE = Strategy(
    index=IndexStep(size=100, overlap=0),
    retrieve=RetrieveStep(candidates=20),
    rerank=RerankStep(depth=10),
    context=ContextStep(passages=3),
)
FINE: dict[str, Value] = {"retrieve.alpha": 0.85, "retrieve.sentences": True}
# Module by module, as in the paper's table 3. Those of the first module also ask questions that need no document.
CELLS: dict[str, dict[str, Value]] = {
    "base": {},
    "classification: never retrieve": {},
    "classification: always retrieve, 20 more questions": {},
    "classification: by the classifier, 20 more questions": {},
    "chunking: 200 tokens": {"index.size": 200},
    "chunking: small-to-big, 60": {"index.chunking": "small-to-big", "index.size": 60},
    "chunking: sliding window, 60": {"index.chunking": "sliding-window", "index.size": 60},
    "chunking: without headers": {"index.headers": False},
    "chunking: late": {"index.late": True},
    "retrieval: BM25": {"retrieve.method": "bm25"},
    "retrieval: dense": {"retrieve.method": "dense"},
    "retrieval: hybrid, 0.3": {"retrieve.alpha": 0.3},
    "retrieval: hybrid, reciprocal ranks": {"retrieve.fusion": "reciprocal-rank"},
    "retrieval: hybrid with sentences": FINE,
    "retrieval: HyDE": {"retrieve.query": "hyde"},
    "retrieval: HyDE with the query": {"retrieve.query": "hyde-with-query"},
    "retrieval: rewritten query": {"retrieve.query": "rewrite"},
    "retrieval: decomposed query": {"retrieve.query": "decompose"},
    "reranking: none": {"rerank.method": "none"},
    "reranking: none, hybrid with sentences": {"rerank.method": "none", **FINE},
    "reranking: none, BM25": {"rerank.method": "none", "retrieve.method": "bm25"},
    "reranking: none, dense": {"rerank.method": "none", "retrieve.method": "dense"},
    "reranking: late interaction": {"rerank.method": "late-interaction"},
    "reranking: precomputed late interaction": {"rerank.method": "precomputed"},
    "repacking: forward": {"context.order": "forward"},
    "repacking: sides": {"context.order": "sides"},
    "summarising: by BM25, 0.5": {"context.summary": "extractive-bm25"},
    "summarising: by embeddings, 0.5": {"context.summary": "extractive-embedding"},
    "summarising: Recomp-style, 0.5": {"context.summary": "recomp"},
    "summarising: Selective Context, 0.5": {"context.summary": "selective-context"},
    "summarising: LongLLMLingua, 0.5": {"context.summary": "longllmlingua"},
    "summarising: abstractive": {"context.summary": "abstractive"},
}
# What needs no document, and its answer.
FREE = (
    ("What is 12 squared?", "144"),
    ("What is 7 times 8?", "56"),
    ("How much is 100 minus 37?", "63"),
    ("What is half of 90?", "45"),
    ("What is 15 + 27?", "42"),
    ("Solve x + 5 = 12 for x.", "7"),
    ("What is the square root of 81?", "9"),
    ("How many minutes are three hours?", "180"),
    ("Translate 'good morning' into French.", "bonjour"),
    ("Translate 'thank you' into Spanish.", "gracias"),
    ("How do you say 'water' in German?", "Wasser"),
    ("Anna has a red bicycle. What colour is Anna's bicycle?", "red"),
    ("Tom is older than Ben. Who is younger?", "Ben"),
    ("Correct the spelling: recieve", "receive"),
    ("Write the plural of mouse.", "mice"),
    ("Which word is the opposite of hot?", "cold"),
    ("Write the word 'house' in capital letters.", "HOUSE"),
    ("What comes after Monday?", "Tuesday"),
    ("Name the first letter of the alphabet.", "A"),
    ("Is 17 a prime number?", "yes"),
)
SYSTEM = "Answer the question from the passages in a few words, without a sentence around them."
SHOWN = (
    (
        ("The Nile flows north into the Mediterranean Sea. It is the longest river in Africa.",),
        "Into which sea does the Nile flow?",
        "the Mediterranean Sea",
    ),
    (
        (
            "A lock must be released by the thread that acquired it.",
            "Semaphores were invented by Edsger Dijkstra in 1962.",
        ),
        "Who invented semaphores?",
        "Edsger Dijkstra",
    ),
)
TOKENS = 16
BATCH = 16  # answers that are written before they are kept


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question with its accepted answers; without evidence it needs no document."""

    question: TuneQuestion
    answers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Given:
    """What the model gets: the texts, the seconds that they took, and whether they hold the evidence."""

    texts: tuple[str, ...]
    seconds: float
    held: bool


class ShortAnswers:
    """Answers in a few words by the served model, each kept by its prompt.

    Repetition is discouraged among the answer's own tokens alone: a penalty on those of the prompt would keep the model
    from saying what it read.
    """

    def __init__(self, llm: LLM, name: str, cache: StageCache) -> None:
        self._llm, self._name, self._cache = llm, name, cache
        self._params = SamplingParams(
            temperature=0, frequency_penalty=0.2, max_tokens=TOKENS, stop=["\n", "</"], bad_words=["<passage"]
        )

    @property
    def settings(self) -> str:
        """What an answer depends on beside the question and what is read."""
        return repr((self._name, self._params, SYSTEM, SHOWN))

    def __call__(self, questions: Sequence[str], contexts: Sequence[Sequence[str]]) -> list[str]:
        prompts = [_prompt(question, texts) for question, texts in zip(questions, contexts, strict=True)]
        answers: list[str] = []
        for first in range(0, len(prompts), BATCH):
            part = prompts[first : first + BATCH]
            inputs = [[self._name, repr(self._params), prompt] for prompt in part]

            def write(missing: list[int], part: Sequence[Any] = part) -> list[npt.NDArray[np.uint8]]:
                outputs = self._llm.chat([part[i] for i in missing], self._params)
                texts = [output.outputs[0].text.strip() for output in outputs]
                return [np.frombuffer(json.dumps(text).encode(), dtype=np.uint8) for text in texts]

            rows = self._cache.get_rows("short answer", inputs, write)
            answers += [json.loads(row.tobytes()) for row in rows]
        return answers


def _prompt(question: str, texts: Sequence[str]) -> list[dict[str, str]]:
    """The served prompt's frame with two examples before it; without texts no passages are spoken of."""
    turns = [Message("system", SYSTEM if texts else "Answer the question in a few words.")]
    for shown, asked, answer in (*SHOWN, (tuple(texts), question, None)):
        frame = "".join(
            f'<passage number="{n}">\n{neutral(text)}\n</passage>\n'
            for n, text in enumerate(shown if texts else (), 1)
        )
        turns.append(Message("user", f"{frame}Question: {neutral(asked)}\nShort answer:"))
        if answer is not None:
            turns.append(Message("assistant", answer))
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def load_asked(path: Path) -> list[Asked]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Asked(TuneQuestion(row["question"], tuple(row["evidence"]), row["file"]), tuple(row["answers"]))
        for row in rows
    ]


def cell_strategy(name: str) -> Strategy:
    strategy = BASE
    for key, value in CELLS[name].items():
        strategy = Choice(key, (value,)).applied(strategy, value)
    return strategy


@dataclasses.dataclass
class Ablation:
    """The indexes, what is kept, and how one cell is run."""

    evaluate: VariantEvaluator
    embedder: Embedder
    clock: Callable[[], float]
    classifier: QueryClassifier | None = None

    def given(self, name: str, asked: Sequence[Asked]) -> list[Given]:
        """What each question's answer is to be made from."""
        strategy = cell_strategy(name)
        return [self._one(name, strategy, item.question) for item in asked]

    def _one(self, name: str, strategy: Strategy, question: TuneQuestion) -> Given:
        if name.endswith("never retrieve"):
            return Given((), 0.0, False)
        deciding = 0.0
        if "by the classifier" in name:
            classifier = self._classifier()
            began = self.clock()
            needed = classifier.needs_documents(question.text, self.embedder)
            deciding = self.clock() - began
            if not needed:
                return Given((), deciding, False)
        brought = self.evaluate.retrieve(strategy, question.text)
        pairs = zip(brought.texts, brought.passages, strict=True)
        held = any(question.found_in(text, passage.chunk.file) for text, passage in pairs)
        return Given(brought.texts, deciding + brought.seconds, held)

    def _classifier(self) -> QueryClassifier:
        """Trained on queries made of the base's passages: of the questions asked here it knows none."""
        if self.classifier is None:
            examples, _ = make_examples(self.evaluate.chunks())
            self.classifier = train(examples.needing, examples.free, self.embedder)
        return self.classifier


def measured(asked: Sequence[Asked], given: Sequence[Given], answers: Sequence[str]) -> dict[str, list[Any]]:
    """Every measure, a value a question."""
    pairs = list(zip(answers, (item.answers for item in asked), strict=True))
    return {
        "answer": list(answers),
        "held": [float(g.held) for g in given],
        "em": [exact_match(answer, accepted) for answer, accepted in pairs],
        "contains": [exact_match(answer, accepted, paper_compat=True) for answer, accepted in pairs],
        "f1": [token_f1(answer, accepted) for answer, accepted in pairs],
        "faithful": [faithfulness(a, g.texts) for a, g in zip(answers, given, strict=True) if g.texts],
        "seconds": [g.seconds for g in given],
    }


def line(name: str, cell: dict[str, list[Any]], base: dict[str, list[Any]] | None) -> str:
    minus = str(paired_difference(cell["f1"], base["f1"])) if base is not None and base is not cell else ""
    faithful = f"{np.mean(cell['faithful']):.3f}" if cell["faithful"] else ""
    milliseconds = np.quantile(cell["seconds"], [0.5, 0.95]) * 1000
    return (
        f"| {name} | {len(cell['f1'])} | {np.mean(cell['held']):.3f} | {np.mean(cell['em']):.3f} | "
        f"{bootstrap(cell['contains'])} | {bootstrap(cell['f1'])} | {minus} | {faithful} | "
        f"{milliseconds[0]:.0f}, {milliseconds[1]:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument(
        "--questions", type=Path, default=Path(__file__).with_name("rag_python_questions.jsonl")
    )
    parser.add_argument("--work", type=Path, default=Path("runs/rag_ablation"))
    parser.add_argument("--count", type=int, default=1000, help="questions that are asked, from the first on")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--cells", nargs="+", default=[""], help="by the beginning of their names")
    parser.add_argument(
        "--wall", action="store_true", help="only time, by the wall clock, and answer nothing"
    )
    options = parser.parse_args()
    asked = load_asked(options.questions)[: options.count]
    more = [Asked(TuneQuestion(q, ()), (a,)) for q, a in FREE]
    clock = time.perf_counter if options.wall else time.process_time
    kind = f"{'wall' if options.wall else 'cpu'}-{hashlib.sha256(options.model.encode()).hexdigest()[:8]}"
    llm = LLM(options.model, max_num_seqs=8)
    short = ShortAnswers(llm, options.model, StageCache(options.work / "answers"))
    ablation = Ablation(
        open_variants(
            options.work / "index",
            options.folder,
            BASE,
            model=InProcessModel(llm),
            cache=options.work / f"parts-{kind}",
            clock=clock,
        ),
        load_embedder(BASE.index.embedder),
        clock,
    )
    print(
        "| step | questions | evidence read | EM | contains | F1 | minus base | faithfulness | p50, p95 ms |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    done: dict[str, dict[str, list[Any]]] = {}
    for name in CELLS:
        if name != "base" and not any(name.startswith(wanted) for wanted in options.cells):
            continue
        questions = [*asked, *more] if "more questions" in name else asked
        texts = [item.question.text for item in questions]
        address = hashlib.sha256(
            repr((name, cell_strategy(name), texts, kind, short.settings)).encode()
        ).hexdigest()[:16]
        path = options.work / "cells" / f"{address}.json"
        if path.is_file():
            done[name] = json.loads(path.read_bytes())
        else:
            given = ablation.given(name, questions)
            read = [g.texts for g in given]
            answers = [""] * len(texts) if options.wall else short(texts, read)
            done[name] = measured(questions, given, answers)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, done[name])
        against = done.get("classification: always retrieve, 20 more questions", done["base"])
        base = against if len(questions) > len(asked) else done["base"]
        print(line(name, done[name], base), flush=True)


if __name__ == "__main__":
    main()
