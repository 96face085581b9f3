"""The line of requests that wait for a seat, by rank."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from mainspring.engine.request import Request


class WaitingQueue:
    """Requests in order of rank (priority, then arrival). Adding takes O(log n), removing O(log n) in the long run:
    a removed request's entry stays in the heap until it comes to the front."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], str]] = []
        self._requests: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._requests

    def __iter__(self) -> Iterator[Request]:
        """In order of rank; O(n log n)."""
        return iter(sorted(self._requests.values(), key=lambda request: request.rank))

    def add(self, request: Request) -> None:
        """Put a request into the line; it goes before those of higher rank, wherever it was before."""
        heapq.heappush(self._heap, (request.rank, request.request_id))
        self._requests[request.request_id] = request

    def first(self) -> Request:
        """The next in line, which is not empty."""
        while not self._is_current(self._heap[0]):
            heapq.heappop(self._heap)
        return self._requests[self._heap[0][1]]

    def remove(self, request_id: str) -> Request | None:
        """Take a request out of the line; None if it is not there."""
        return self._requests.pop(request_id, None)

    def _is_current(self, entry: tuple[tuple[int, int], str]) -> bool:
        rank, request_id = entry
        request = self._requests.get(request_id)
        return request is not None and request.rank == rank
