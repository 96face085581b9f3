"""What an engine has done since its start, and its state now: the numbers behind `/metrics`."""

from __future__ import annotations

from collections.abc import Sequence

from mainspring.engine.block_allocator import BlockAllocator
from mainspring.engine.messages import EngineStats
from mainspring.engine.outputs import FinishReason
from mainspring.engine.scheduler import Scheduler


class Counters:
    """Kept by `EngineCore`; none of them ever falls."""

    def __init__(self, num_speculative_tokens: int) -> None:
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.steps = 0
        self.finished: dict[FinishReason, int] = {"stop": 0, "length": 0, "abort": 0}
        self._drafts = 0
        self._drafted_tokens = 0
        self._accepted_tokens = 0
        self._accepted_by_position = [0] * num_speculative_tokens

    def count_drafts(self, drafts: Sequence[int], kept: Sequence[int]) -> None:
        """drafts: the guesses of one step of a request; kept: the tokens that came of it."""
        if drafts:
            accepted = sum(draft == token for draft, token in zip(drafts, kept, strict=False))
            self._drafts += 1
            self._drafted_tokens += len(drafts)
            self._accepted_tokens += accepted
            for position in range(accepted):
                self._accepted_by_position[position] += 1

    def stats(self, scheduler: Scheduler, allocator: BlockAllocator, block_size: int) -> EngineStats:
        """All numbers at this moment."""
        prefix = scheduler.prefix_stats
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_blocks_used=allocator.num_used,
            kv_blocks_total=allocator.num_blocks,
            block_size=block_size,
            prompt_tokens_total=self.prompt_tokens,
            generation_tokens_total=self.generated_tokens,
            preemptions_total=scheduler.num_preemptions,
            steps_total=self.steps,
            finished_total=dict(self.finished),
            prefix_cache_queries_total=prefix.queries,
            prefix_cache_hits_total=prefix.hits,
            draft_tokens_total=self._drafted_tokens,
            accepted_tokens_total=self._accepted_tokens,
            drafts_total=self._drafts,
            accepted_tokens_per_position=tuple(self._accepted_by_position),
        )
