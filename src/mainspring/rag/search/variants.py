"""Strategies that cut or embed in different ways: each way has an index of its own, made when it is first tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mainspring.rag.chunking.chunk import Chunk
from mainspring.rag.search.evaluator import PipelineEvaluator, Retrieved
from mainspring.rag.search.ledger import Outcome
from mainspring.rag.search.questions import TuneQuestion
from mainspring.rag.strategy import IndexStep, Strategy


class VariantEvaluator:
    """Implements `Evaluate` over several indexes of one folder: a strategy runs on the one of its `index` step."""

    def __init__(self, present: IndexStep, open_one: Callable[[IndexStep], PipelineEvaluator]) -> None:
        """`open_one` makes the index of a step, if it is not there yet, and what evaluates on it."""
        self._open_one = open_one
        self._opened: dict[IndexStep, PipelineEvaluator] = {}
        self._present = present

    def chunks(self) -> Iterator[Chunk]:
        """Every passage of the present index."""
        return self._evaluator(self._present).chunks()

    def __call__(self, strategy: Strategy, question: TuneQuestion) -> Outcome:
        return self._evaluator(strategy.index)(strategy, question)

    def retrieve(self, strategy: Strategy, question: str) -> Retrieved:
        """What the strategy brings for a question, on its index."""
        return self._evaluator(strategy.index).retrieve(strategy, question)

    def _evaluator(self, step: IndexStep) -> PipelineEvaluator:
        if step not in self._opened:
            self._opened[step] = self._open_one(step)
        return self._opened[step]
