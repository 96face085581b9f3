"""What to compute next: continuous batching, chunked prefill, prefix sharing, preemption by recompute.

A step takes from every request as many of its tokens as are there and not yet in the cache: one for a request that
decodes (with its drafts), a chunk of the prompt for one that prefills, all under one budget, in which decodes have
precedence. When the cache is full, the last in rank gives its blocks back and waits, to be recomputed.

Steps are launched ahead of their results. So a request counts a token that is in flight like one that is known, and
nothing here looks at tokens, but for the hashes of blocks that are full of known ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

from mainspring.engine.block_allocator import BlockAllocator
from mainspring.engine.block_hash import extend_hashes
from mainspring.engine.config import SchedulingPolicy
from mainspring.engine.request import NO_SEAT, Request
from mainspring.engine.waiting_queue import WaitingQueue

_NEVER = 1 << 62


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """Tokens start .. start + num_tokens - 1 of the request go into this step.

    The last num_drafts of them are guesses. samples: the step reaches the request's last token that is there, so what
    follows it (and each draft) is to be sampled.
    """

    request: Request
    start: int
    num_tokens: int
    num_drafts: int = 0
    samples: bool = False


@dataclass(slots=True)
class PrefixStats:
    """Prompt tokens that admitted requests looked up among the cached prefixes, and how many were found there."""

    queries: int = 0
    hits: int = 0


class Scheduler:
    """Owns the queues, the seats and the requests' block tables.

    Invariants: a request is in exactly one of `waiting` and `running`; running ones have a seat and all blocks for
    their tokens, waiting ones none; `running` is in order of rank. Rank is priority, then arrival ("priority"), or
    arrival alone ("fcfs").
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        *,
        policy: SchedulingPolicy = "fcfs",
        prefix_caching: bool = True,
    ) -> None:
        self._allocator = allocator
        self._block_size = block_size
        self._max_num_batched_tokens = max_num_batched_tokens
        self._policy = policy
        self._prefix_caching = prefix_caching
        self._arrivals = count()
        self._free_seats = list(range(max_num_seqs - 1, -1, -1))
        self.waiting = WaitingQueue()
        self.running: dict[str, Request] = {}
        # Contents of blocks to be copied (from, to) before the next step; whoever launches it empties the list.
        self.block_copies: list[tuple[int, int]] = []
        self.num_preemptions = 0
        self.prefix_stats = PrefixStats()

    def __contains__(self, request_id: str) -> bool:
        return request_id in self.running or request_id in self.waiting

    def add(self, request: Request) -> None:
        """Put a new request into the line. Its id is not in use; the whole cache could hold it."""
        request.arrival = next(self._arrivals)
        if self._policy == "fcfs":
            request.priority = 0
        self.waiting.add(request)

    def remove(self, request_id: str) -> Request | None:
        """Take a finished or aborted request out and free its blocks. O(1) besides the blocks themselves.

        A step in flight may still write to the blocks; whatever a new owner writes comes later in the same stream.
        """
        request = self.running.pop(request_id, None)
        if request is None:
            return self.waiting.remove(request_id)
        self._release(request)
        return request

    def schedule(self) -> list[ScheduledRequest]:
        """The next step: running requests in order of rank, then new ones. Empty if nothing can be computed now."""
        budget = self._max_num_batched_tokens
        scheduled: list[ScheduledRequest] = []
        preempted = False
        ready = [request for request in self.running.values() if _is_ready(request)]
        # A token of each decode is set aside, so that a long prompt before them does not stop them.
        reserved = sum(request.num_tokens - request.num_computed == 1 for request in ready)
        # Preemption takes from the end of `running`, never a request that is already scheduled.
        for request in ready:
            if request.request_id not in self.running:
                break
            preempted |= self._make_room(request)
            if request.request_id not in self.running:
                break
            missing = request.num_tokens - request.num_computed
            reserved -= missing == 1
            num_tokens = min(missing, budget - reserved)
            if num_tokens < 1:
                continue
            num_drafts = 0
            if missing == 1 and request.draft_token_ids:
                num_drafts = self._fitting_drafts(request, budget - reserved - 1)
            budget -= num_tokens + num_drafts
            scheduled.append(_scheduled(request, num_tokens, num_drafts))
        if not preempted:
            self._admit(scheduled, budget)
        return scheduled

    def publish(self, request: Request) -> None:
        """Name the request's blocks that are full, computed and of known tokens, so that others can share them."""
        size = self._block_size
        done = request.num_published
        if request.num_computed < (done + 1) * size or not self._prefix_caching or request.seat == NO_SEAT:
            return
        full = min(request.num_computed, len(request.token_ids)) // size
        if done < full:
            extend_hashes(request.block_hashes, request.cache_root, request.token_ids, size, full)
            for number in range(done, full):
                self._allocator.publish(request.block_table[number], request.block_hashes[number])
            request.num_published = full

    def forget_prefixes(self) -> None:
        """No block can be shared from now on that was computed before: the weights have changed."""
        self._allocator.forget_all()
        for request in self.running.values():
            request.num_published = _NEVER  # its blocks to come follow upon old ones

    def preempt_all(self) -> None:
        """Send every running request back to the line (before the cache is given up)."""
        for request in list(self.running.values()):
            self._preempt(request)

    def _admit(self, scheduled: list[ScheduledRequest], budget: int) -> None:
        """Start waiting requests, in order, while there are seats, budget, and blocks for all known tokens.

        Blocks for the whole prompt are taken at once: a prompt is never stranded half computed.
        """
        held: list[Request] = []
        last = next(reversed(self.running.values()), None)
        while budget > 0 and self.waiting and self._free_seats:
            request = self.waiting.first()
            if request.num_in_flight:
                break  # preempted a moment ago: its last token is not known yet
            leader = self._leader(request)
            if leader is not None and leader.num_computed < leader.num_prompt:
                held.append(request)
                self.waiting.remove(request.request_id)
                continue
            if not (self._fork(request, leader) if leader is not None else self._take_blocks(request)):
                break
            self.waiting.remove(request.request_id)
            self.running[request.request_id] = request
            request.seat = self._free_seats.pop()
            num_tokens = min(budget, request.num_tokens - request.num_computed)
            budget -= num_tokens
            scheduled.append(_scheduled(request, num_tokens, 0))
            if last is not None and request.rank < last.rank:
                in_order = sorted(self.running.values(), key=lambda request: request.rank)
                self.running = {request.request_id: request for request in in_order}
            last = next(reversed(self.running.values()))
        for request in held:
            self.waiting.add(request)

    def _take_blocks(self, request: Request) -> bool:
        """Blocks for all known tokens, those of the longest cached prefix among them. False if there are too few."""
        cached: list[int] = []
        looks_up = self._prefix_caching and not request.needs_all_hidden_states
        if looks_up:
            # The last token is always computed: its hidden state gives the next one.
            most = (len(request.token_ids) - 1) // self._block_size
            extend_hashes(request.block_hashes, request.cache_root, request.token_ids, self._block_size, most)
            cached = self._allocator.find_cached(request.block_hashes[:most])
        missing = self._blocks_for(len(request.token_ids)) - len(cached)
        revived = sum(self._allocator.is_free(block) for block in cached)
        if missing + revived > self._allocator.num_free:
            return False
        self._allocator.take_cached(cached)
        request.block_table = cached + (self._allocator.allocate(missing) or [])
        self._start(request, len(cached) * self._block_size, len(cached), looks_up)
        return True

    def _fork(self, request: Request, leader: Request) -> bool:
        """Share the full blocks of the leader's prompt, and copy the one in which the two sequences part."""
        shared = (request.num_prompt - 1) // self._block_size
        own = self._allocator.allocate(self._blocks_for(len(request.token_ids)) - shared)
        if own is None:
            return False
        self._allocator.share(leader.block_table[:shared])
        request.block_table = leader.block_table[:shared] + own
        self.block_copies.append((leader.block_table[shared], own[0]))
        self._start(request, request.num_prompt - 1, 0, False)
        return True

    def _start(self, request: Request, num_computed: int, num_published: int, looked_up: bool) -> None:
        request.num_computed = num_computed
        request.num_published = num_published
        if request.num_cached < 0:
            request.num_cached = min(num_computed, request.num_prompt)
            if looked_up:
                self.prefix_stats.queries += request.num_prompt
                self.prefix_stats.hits += request.num_cached

    def _leader(self, request: Request) -> Request | None:
        """The live request whose prompt this one shares, unless this one has tokens of its own already."""
        if request.fork_of is None or request.num_generated or request.needs_all_hidden_states:
            return None
        return self.running.get(request.fork_of)

    def _fitting_drafts(self, request: Request, budget: int) -> int:
        """How many drafts the budget and the blocks hold. Nobody is preempted for a guess."""
        if request.grammar is not None:
            return 0  # it would have to know what the drafts lead to
        wanted = min(len(request.draft_token_ids), budget, request.max_drafts())
        if wanted < 1:
            return 0
        missing = self._blocks_for(request.num_tokens + wanted) - len(request.block_table)
        if missing > 0:
            blocks = self._allocator.allocate(missing)
            request.block_table.extend(blocks or [])
        return min(wanted, len(request.block_table) * self._block_size - request.num_tokens)

    def _make_room(self, request: Request) -> bool:
        """Give a running request blocks for all its tokens; return whether any request was preempted.

        The last in rank goes first. The first always gets its blocks in the end: admission has checked that the whole
        cache holds it.
        """
        missing = self._blocks_for(request.num_tokens) - len(request.block_table)
        if missing <= 0:
            return False
        preempted = False
        blocks = self._allocator.allocate(missing)
        while blocks is None:
            last = next(reversed(self.running.values()))
            self._preempt(last)
            preempted = True
            if last is request:
                return True
            blocks = self._allocator.allocate(missing)
        request.block_table.extend(blocks)
        return preempted

    def _preempt(self, request: Request) -> None:
        """Back to the line, at its old rank. The tokens stay; their keys and values will be computed again."""
        del self.running[request.request_id]
        self._release(request)
        self.waiting.add(request)
        self.num_preemptions += 1

    def _release(self, request: Request) -> None:
        self._allocator.release(request.block_table)
        self._free_seats.append(request.seat)
        request.leave_seat()

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)


def _is_ready(request: Request) -> bool:
    return not request.is_exhausted and not (request.num_in_flight and request.waits_for_tokens)


def _scheduled(request: Request, num_tokens: int, num_drafts: int) -> ScheduledRequest:
    samples = request.pooling is None and request.num_computed + num_tokens == request.num_tokens
    return ScheduledRequest(request, request.num_computed, num_tokens + num_drafts, num_drafts, samples)
