"""How good a ranking and an answer are: MRR, recall, nDCG; exact match, F1, faithfulness. One value a question."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Collection, Sequence

from mainspring.rag.retrieval.terms import terms


def reciprocal_rank(ranked: Sequence[int], relevant: Collection[int], k: int = 10) -> float:
    """1 / rank of the first relevant passage among the first k, else 0; its mean is MRR@k."""
    for rank, position in enumerate(ranked[:k], 1):
        if position in relevant:
            return 1 / rank
    return 0.0


def recall(ranked: Sequence[int], relevant: Collection[int], k: int = 10) -> float:
    """The share of the relevant passages among the first k."""
    return len(set(ranked[:k]) & set(relevant)) / len(relevant) if relevant else 0.0


def ndcg(ranked: Sequence[int], relevant: Collection[int], k: int = 10) -> float:
    """Normalised discounted cumulative gain with gains of 0 and 1 (Järvelin and Kekäläinen, 2002)."""
    gain = sum(1 / math.log2(rank + 1) for rank, p in enumerate(ranked[:k], 1) if p in relevant)
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(len(relevant), k) + 1))
    return gain / ideal if ideal else 0.0


def normalise_answer(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: as SQuAD's evaluation does."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, accepted: Sequence[str], paper_compat: bool = False) -> float:
    """1 if the answer is one of the accepted ones, normalised, else 0.

    The authors' "EM" is 1 if the answer contains an accepted one as a substring: `paper_compat` does that.
    """
    given = normalise_answer(answer)
    wanted = [normalise_answer(text) for text in accepted]
    return float(any(text in given if paper_compat else text == given for text in wanted))


def token_f1(answer: str, accepted: Sequence[str]) -> float:
    """The best F1 of the normalised words against an accepted answer (Rajpurkar et al., arXiv 1606.05250)."""
    return max(
        (_f1(normalise_answer(answer).split(), normalise_answer(t).split()) for t in accepted), default=0.0
    )


def faithfulness(answer: str, passages: Sequence[str]) -> float:
    """The share of the answer's words of content (stems) that stand in a passage; 1 for an answer without any.

    Deterministic, and only an upper bound of what is supported: words may be put together wrongly.
    """
    said = set(terms(answer))
    read = {term for passage in passages for term in terms(passage)}
    return len(said & read) / len(said) if said else 1.0


def _f1(given: Sequence[str], wanted: Sequence[str]) -> float:
    if not given or not wanted:
        return float(list(given) == list(wanted))
    common = (Counter(given) & Counter(wanted)).total()
    return 2 * common / (len(given) + len(wanted))
