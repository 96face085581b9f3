"""What makes an answer of passages when strategies are compared: the model that will serve, or the best sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mainspring.rag.chunking.sentences import sentences
from mainspring.rag.generation.language_model import LanguageModel, complete
from mainspring.rag.generation.prompts import answer_prompt
from mainspring.rag.ranking.reranker import Reranker


class Reader(Protocol):
    """Reads passages and answers."""

    def read(self, question: str, texts: Sequence[str], sources: Sequence[str], max_tokens: int) -> str:
        """The answer from texts in this order, each with its source; empty where there is nothing to read."""
        ...


@dataclass(frozen=True)
class GenerativeReader:
    """The model with the prompt of `Pipeline.ask`. Implements `Reader`."""

    model: LanguageModel

    def read(self, question: str, texts: Sequence[str], sources: Sequence[str], max_tokens: int) -> str:
        return complete(self.model, answer_prompt(question, texts, sources), max_tokens) if texts else ""


@dataclass(frozen=True)
class ExtractiveReader:
    """The sentence that the reranker puts first: the same answer whatever the order. Implements `Reader`."""

    reranker: Reranker

    def read(self, question: str, texts: Sequence[str], sources: Sequence[str], max_tokens: int) -> str:
        found = [sentence for text in texts for sentence in sentences(text)]
        return found[int(self.reranker.scores(question, found).argmax())] if found else ""
