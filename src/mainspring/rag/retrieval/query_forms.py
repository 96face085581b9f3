"""What is asked for in place of the question: itself, a rewritten one, its parts, or a made-up answer (HyDE)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from mainspring.errors import ConfigError
from mainspring.rag.embedding.embedder import Embedder
from mainspring.rag.generation.language_model import LanguageModel, complete
from mainspring.rag.generation.prompts import decompose_prompt, hypothetical_prompt, rewrite_prompt

_QUERY_TOKENS = 48
_PASSAGE_TOKENS = 128
_MOST_PARTS = 3


@dataclass(frozen=True)
class Probe:
    """One search: words for the lexical index, a unit vector [D] for the dense one."""

    text: str
    vector: npt.NDArray[np.float32]


def probes(
    question: str,
    form: Literal["original", "rewrite", "decompose", "hyde", "hyde-with-query"],
    embedder: Embedder,
    model: LanguageModel | None,
) -> list[Probe]:
    """The searches that a question becomes; several for "decompose", the question itself among them.

    HyDE makes up a passage that answers the question and looks for its like; with the query, the mean of both vectors
    is taken (arXiv 2212.10496, equation 8). The lexical index always gets the user's own words then.
    Raises ConfigError if a form needs a model and there is none.
    """
    if form == "original":
        return _of_texts([question], embedder)
    if model is None:
        raise ConfigError(f"the query form {form!r} needs a language model: give one, or take 'original'")
    if form == "rewrite":
        return _of_texts(
            [_first_line(complete(model, rewrite_prompt(question), _QUERY_TOKENS)) or question], embedder
        )
    if form == "decompose":
        parts = _lines(complete(model, decompose_prompt(question), _QUERY_TOKENS * _MOST_PARTS))
        return _of_texts(list(dict.fromkeys([question, *parts[:_MOST_PARTS]])), embedder)
    passage = complete(model, hypothetical_prompt(question), _PASSAGE_TOKENS) or question
    vector = embedder.embed_passages([passage])[0]
    if form == "hyde-with-query":
        vector = vector + embedder.embed_queries([question])[0]
        vector = vector / np.linalg.norm(vector)
    return [Probe(question, vector)]


def _of_texts(texts: list[str], embedder: Embedder) -> list[Probe]:
    return [Probe(text, vector) for text, vector in zip(texts, embedder.embed_queries(texts), strict=True)]


def _lines(text: str) -> list[str]:
    """Lines without numbers, bullets and quotes."""
    found = (re.sub(r"^\s*(?:\d+[.)]|[-*•])?\s*", "", line).strip().strip('"') for line in text.splitlines())
    return [line for line in found if line]


def _first_line(text: str) -> str:
    return next(iter(_lines(text)), "")
