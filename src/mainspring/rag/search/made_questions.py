"""Questions made from the corpus by the model, where the user has none: each about one sentence, which is its evidence.

What a small model writes is checked: a question that the reranker does not connect with its sentence is dropped, and
so is one that repeats it (round-trip consistency, after arXiv 1906.05416).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

from mainspring.errors import DocumentError
from mainspring.rag.chunking.chunk import Chunk
from mainspring.rag.chunking.sentences import sentences
from mainspring.rag.generation.language_model import InProcessModel, LanguageModel, Message, complete_each
from mainspring.rag.generation.prompts import neutral
from mainspring.rag.ranking.reranker import Reranker
from mainspring.rag.retrieval.terms import terms
from mainspring.rag.search.questions import TuneQuestion

_QUESTION_TOKENS = 40
_WORDS = range(8, 40)  # of a sentence that is worth a question
_MOST_SHARED = 0.8  # of the sentence's terms in the question: more repeats it
_LEAST_SCORE = 0.0  # the reranker's
_TRIES = 6  # sentences that are tried for one question


def make_questions(
    chunks: Iterable[Chunk],
    model: LanguageModel,
    reranker: Reranker,
    count: int,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[TuneQuestion, ...]:
    """At most `count` questions about sentences drawn by `seed`; `progress` hears (questions made, of how many).

    Raises DocumentError if no sentence is long enough, RetrievalError if the model fails.
    """
    candidates = [(c.file, s) for c in chunks for s in sentences(c.text) if _worth_asking(s)]
    if not candidates:
        raise DocumentError("the documents have no sentence of 8 to 40 words that a question could be about")
    candidates = list(dict.fromkeys(candidates))
    random.Random(seed).shuffle(candidates)
    found: dict[str, TuneQuestion] = {}
    at_once = model.at_once if isinstance(model, InProcessModel) else 1
    for first in range(0, min(_TRIES * count, len(candidates)), at_once):
        block = candidates[first : first + at_once]
        # A question names what its sentence names: with a penalty on that SmolLM2 makes a third as many good ones.
        texts = complete_each(
            model, [_prompt(sentence) for _, sentence in block], _QUESTION_TOKENS, may_repeat=True
        )
        for (file, sentence), text in zip(block, texts, strict=True):
            question = _asked(text, sentence)
            if question is None or question in found or len(found) == count:
                continue
            if float(reranker.scores(question, [sentence])[0]) > _LEAST_SCORE:
                found[question] = TuneQuestion(question, (sentence,), file)
                progress(len(found), count)
        if len(found) == count:
            break
    return tuple(found.values())


def _worth_asking(sentence: str) -> bool:
    words = sentence.split()
    letters = sum(character.isalpha() or character.isspace() for character in sentence)
    return len(words) in _WORDS and sentence[-1] in ".!" and letters > 0.85 * len(sentence)


def _asked(text: str, sentence: str) -> str | None:
    """The question in what the model wrote about a sentence; None if there is none, or it repeats the sentence."""
    question = (
        text[: text.find("?") + 1].splitlines()[-1].strip().removeprefix("Question:").strip()
        if "?" in text
        else ""
    )
    wanted = set(terms(sentence))
    asked = set(terms(question))
    if len(asked) < 2 or len(asked & wanted) > _MOST_SHARED * len(wanted):
        return None
    return question


def _prompt(sentence: str) -> list[Message]:
    shown = (
        ("The Nile flows north into the Mediterranean Sea.", "Into which sea does the Nile flow?"),
        ("A lock must be released by the thread that acquired it.", "Which thread has to release a lock?"),
    )
    turns = [Message("system", "You write one short question that the given sentence answers.")]
    for text, question in shown:
        turns += [Message("user", f"Sentence: {text}"), Message("assistant", question)]
    return [*turns, Message("user", f"Sentence: {neutral(sentence)}")]
