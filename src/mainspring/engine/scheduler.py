"""What to compute next: continuous batching, chunked prefill, preemption by recompute.

A step takes from every request as many of its tokens as are known and not yet in the cache: one for a
request that decodes, a chunk of the prompt for one that prefills, all under one budget. When the cache is
full, the newest request gives its blocks back and waits, first in line, to be recomputed.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from mainspring.engine.block_allocator import BlockAllocator
from mainspring.engine.request import Request


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """`num_tokens` tokens of the request, from `request.num_computed` on, go into this step."""

    request: Request
    num_tokens: int

    @property
    def samples(self) -> bool:
        """The step reaches the request's last known token, so the next one is to be sampled."""
        return self.request.num_computed + self.num_tokens == len(self.request.token_ids)


class Scheduler:
    """First come, first served. Owns the queues and the requests' block tables.

    Invariants: a request is in exactly one of `waiting` and `running`; only running ones hold blocks; every
    running request is older than every waiting one. Both queues are ordered dictionaries, so that a request
    is added, removed or put back first in O(1).
    """

    def __init__(
        self, allocator: BlockAllocator, block_size: int, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        self._allocator = allocator
        self._block_size = block_size
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self.waiting: OrderedDict[str, Request] = OrderedDict()
        self.running: OrderedDict[str, Request] = OrderedDict()
        self.num_preemptions = 0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self.running or request_id in self.waiting

    def add(self, request: Request) -> None:
        """Put a new request at the end of the line. Its id is not in use; the whole cache could hold it."""
        self.waiting[request.request_id] = request

    def remove(self, request_id: str) -> Request | None:
        """Take a finished or aborted request out and free its blocks. O(1) besides the blocks themselves."""
        request = self.running.pop(request_id, None)
        if request is None:
            return self.waiting.pop(request_id, None)
        self._release(request)
        return request

    def schedule(self) -> list[ScheduledRequest]:
        """The next step: running requests in order of arrival, then new ones. Empty only if there is no work."""
        budget = self._max_num_batched_tokens
        scheduled: list[ScheduledRequest] = []
        preempted = False
        # Preemption takes from the end of `running`, never a request that is already scheduled.
        for request in list(self.running.values()):
            if budget == 0 or request.request_id not in self.running:
                break
            preempted |= self._make_room(request)
            if request.request_id not in self.running:
                break
            num_tokens = min(budget, len(request.token_ids) - request.num_computed)
            budget -= num_tokens
            scheduled.append(ScheduledRequest(request, num_tokens))
        if not preempted:
            self._admit(scheduled, budget)
        return scheduled

    def _admit(self, scheduled: list[ScheduledRequest], budget: int) -> None:
        """Start waiting requests, in order, while there are seats, budget, and blocks for all known tokens.

        Blocks for the whole prompt are taken at once: a prompt is never stranded half computed.
        """
        while budget > 0 and self.waiting and len(self.running) < self._max_num_seqs:
            request = next(iter(self.waiting.values()))
            blocks = self._allocator.allocate(self._blocks_for(len(request.token_ids)))
            if blocks is None:
                return
            del self.waiting[request.request_id]
            self.running[request.request_id] = request
            request.block_table = blocks
            num_tokens = min(budget, len(request.token_ids))
            budget -= num_tokens
            scheduled.append(ScheduledRequest(request, num_tokens))

    def _make_room(self, request: Request) -> bool:
        """Give a running request blocks for all its known tokens; return whether any request was preempted.

        The newest request goes first. The oldest always gets its blocks in the end: admission has checked
        that the whole cache holds it.
        """
        missing = self._blocks_for(len(request.token_ids)) - len(request.block_table)
        if missing <= 0:
            return False
        preempted = False
        blocks = self._allocator.allocate(missing)
        while blocks is None:
            newest = next(reversed(self.running.values()))
            self._preempt(newest)
            preempted = True
            if newest is request:
                return True
            blocks = self._allocator.allocate(missing)
        request.block_table.extend(blocks)
        return preempted

    def _preempt(self, request: Request) -> None:
        """Back to the head of the line. The tokens stay; their keys and values will be computed again."""
        del self.running[request.request_id]
        self._release(request)
        self.waiting[request.request_id] = request
        self.waiting.move_to_end(request.request_id, last=False)
        self.num_preemptions += 1

    def _release(self, request: Request) -> None:
        self._allocator.release(request.block_table)
        request.block_table = []
        request.num_computed = 0

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)
