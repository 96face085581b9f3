"""SQuAD-format files as a retrieval task: paragraphs are the corpus, each question has one gold paragraph.

Version 1.1 (arXiv 1606.05250), as BIG-bench's source package holds it (evaluation only: CC BY-SA 4.0).
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from mainspring.errors import DocumentError


@dataclass(frozen=True)
class Question:
    """A question, the position of its gold passage, and the accepted answers."""

    text: str
    gold: int
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """Passages and questions about them."""

    passages: tuple[str, ...]
    questions: tuple[Question, ...]

    def sample(self, count: int, seed: int, skip: int = 0) -> tuple[Question, ...]:
        """`count` questions of a shuffle by `seed`, after the first `skip` of it: disjoint samples of one seed."""
        order = list(range(len(self.questions)))
        random.Random(seed).shuffle(order)
        return tuple(self.questions[i] for i in order[skip : skip + count])


def load_squad(path: Path) -> Task:
    """The task of a SQuAD 1.1 file. Raises DocumentError if it is none."""
    passages: list[str] = []
    questions: list[Question] = []
    try:
        for article in json.loads(path.read_bytes())["data"]:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    answers = tuple(dict.fromkeys(str(a["text"]) for a in qa["answers"]))
                    questions.append(Question(str(qa["question"]).strip(), len(passages), answers))
                passages.append(str(paragraph["context"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DocumentError(f"{path} is not a SQuAD 1.1 file: {error!r}") from error
    return Task(tuple(passages), tuple(questions))
