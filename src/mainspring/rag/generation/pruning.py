"""Shorter passages by leaving out words that a language model would have guessed: Selective Context, LongLLMLingua."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mainspring.rag.generation.language_model import LanguageModel, TokenScorer, TokenSurprise, complete
from mainspring.rag.generation.prompts import summary_prompt

_SUMMARY_TOKENS = 96


@dataclass(frozen=True)
class SelectiveContext:
    """Keeps the words of highest self-information -log p(word | what stands before) (arXiv 2310.06201).

    The authors' units are noun phrases found by a parser; ours are words.
    """

    scorer: TokenScorer

    def summarise(self, question: str, passages: Sequence[str], ratio: float) -> list[str]:
        return [keep_words(p, word_scores(p, self.scorer.surprises(p)), ratio) if p else "" for p in passages]


@dataclass(frozen=True)
class LongLlmLingua:
    """Keeps words that the question makes likelier, and more of the passages that make the question likelier.

    After arXiv 2310.06839: a word's score is log p(word | question, before) - log p(word | before), its contrastive
    perplexity; a passage's share of the whole grows with the mean log p(question | passage). The question is not
    repeated and passages are not reordered here.
    """

    scorer: TokenScorer

    def summarise(self, question: str, passages: Sequence[str], ratio: float) -> list[str]:
        prefix = f"Question: {question}\n"
        shares = self._shares(question, passages, ratio)
        result = []
        for passage, share in zip(passages, shares, strict=True):
            if not passage:
                result.append("")
                continue
            alone = word_scores(passage, self.scorer.surprises(passage))
            asked = word_scores(passage, self.scorer.surprises(passage, prefix))
            result.append(keep_words(passage, alone - asked, share))
        return result

    def _shares(self, question: str, passages: Sequence[str], ratio: float) -> list[float]:
        """The ratio of each passage: up to 0.25 more for the best, as much less for the worst."""
        if not passages:
            return []
        means = [
            np.mean([-s.nats for s in self.scorer.surprises(question, p + "\n")] or [0.0]) for p in passages
        ]
        order = np.argsort(np.argsort(means))
        middle = (len(passages) - 1) / 2
        if middle == 0:
            return [ratio]
        return [float(np.clip(ratio * (1 + 0.25 * (rank - middle) / middle), 0.01, 1)) for rank in order]


@dataclass(frozen=True)
class Abstraction:
    """A summary in the model's own words. Raises RetrievalError if the model fails."""

    model: LanguageModel

    def summarise(self, question: str, passages: Sequence[str], ratio: float) -> list[str]:
        return [
            complete(self.model, summary_prompt(question, p), _SUMMARY_TOKENS) if p else "" for p in passages
        ]


def word_scores(text: str, surprises: Sequence[TokenSurprise]) -> npt.NDArray[np.float64]:
    """The sum of its tokens' surprise for each word (what white space separates); a token counts where it ends."""
    spans = [found.span() for found in re.finditer(r"\S+", text)]
    ends = np.array([end for _, end in spans])
    scores = np.zeros(len(spans))
    for token in surprises:
        word = min(int(np.searchsorted(ends, token.end)), len(spans) - 1)
        if word >= 0:
            scores[word] += token.nats
    return scores


def keep_words(text: str, scores: npt.NDArray[np.float64], ratio: float) -> str:
    """The ceil(ratio · N) words of highest score, in their order; lines stay lines."""
    words = list(re.finditer(r"\S+", text))
    count = int(np.ceil(ratio * len(words)))
    kept = sorted(np.argsort(-scores, kind="stable")[:count].tolist())
    pieces: list[str] = []
    for before, index in zip([-1, *kept], kept, strict=False):
        gap = text[words[before].end() : words[index].start()] if before >= 0 else ""
        pieces.append(("\n" if "\n" in gap else " ") if before >= 0 else "")
        pieces.append(words[index][0])
    return "".join(pieces)
