"""Guesses by a small model of the same vocabulary, with a paged cache of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mainspring.engine.block_allocator import BlockAllocator
from mainspring.engine.request import Request
from mainspring.engine.sampler import SeatSampler, truncates
from mainspring.engine.served_model import ServedModel
from mainspring.errors import ConfigError
from mainspring.model.decoder import Decoder
from mainspring.ops.batch import KVCache, TokenBatch

_CHUNK = 2048  # tokens of one forward pass


@dataclass(slots=True)
class _Draft:
    """What the draft model knows of one request.

    Attributes:
        num_computed: how many of the request's tokens have their keys and values in its cache.
        guesses: computed after those, too, at the last call.
        blocks: of its cache, in order.
    """

    request: Request
    num_computed: int = 0
    guesses: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)


class DraftModelDrafter:
    """Implements `hooks.Drafter`.

    The draft model samples with the request's own parameters and random numbers, at the same positions as the model
    will: where the two distributions are alike, so are the tokens that the same numbers draw from them. (Coupling by
    common random numbers; no probability of the draft model enters the result.)

    A request for which the draft model's cache or context has no room is not drafted for.
    """

    def __init__(
        self,
        model: Decoder,
        target: ServedModel,
        sampler: SeatSampler,
        num_tokens: int,
        num_blocks: int,
        block_size: int,
    ) -> None:
        """num_blocks: of the draft model's cache, block_size tokens each.

        Raises:
            ConfigError: the draft model's vocabulary or device is another than the model's.
        """
        if model.config.vocab_size != target.config.vocab_size:
            raise ConfigError(
                f"the draft model has {model.config.vocab_size} tokens, the model {target.config.vocab_size}; both "
                "must have the same vocabulary"
            )
        if model.device != target.device:
            raise ConfigError(f"the draft model is on {model.device}, the model on {target.device}")
        self._model = model
        self._sampler = sampler
        self._num_tokens = num_tokens
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._allocator = BlockAllocator(num_blocks)
        self._cache: KVCache | None = self._allocate()
        self._drafts: dict[str, _Draft] = {}

    def free_cache(self) -> None:
        """See `hooks.Drafter.free_cache`."""
        self._drafts.clear()
        self._allocator = BlockAllocator(self._num_blocks)
        self._cache = None

    def _allocate(self) -> KVCache:
        config = self._model.config
        return KVCache.allocate(
            config.num_layers,
            self._num_blocks + 1,  # the null block
            self._block_size,
            config.num_kv_heads,
            config.head_dim,
            self._model.dtype,
            self._model.device,
        )

    def propose(self, requests: Sequence[Request]) -> None:
        """See `hooks.Drafter.propose`."""
        if self._cache is None:
            self._cache = self._allocate()
        self._forget_finished()
        drafts = [draft for request in requests if (draft := self._prepare(request)) is not None]
        if not drafts:
            return
        self._catch_up(drafts)
        device = self._model.device
        seats = torch.tensor([draft.request.seat for draft in drafts], device=device)
        positions = torch.tensor([len(draft.request.token_ids) for draft in drafts], device=device)
        last = [[draft.request.token_ids[-1]] for draft in drafts]
        truncate = any(truncates(draft.request) for draft in drafts)
        columns: list[Tensor] = []
        tokens = torch.tensor(last, device=device)[:, 0]
        for step in range(self._num_tokens):
            contexts = [draft.num_computed + step + 1 for draft in drafts]
            hidden = self._forward(tokens, [1] * len(drafts), contexts, drafts)
            tokens = self._sampler.draw(
                self._model.logits(hidden), seats, positions + step, truncate=truncate
            )
            columns.append(tokens)
        guesses: list[list[int]] = torch.stack(columns, dim=1).tolist()
        for draft, guess in zip(drafts, guesses, strict=True):
            draft.request.draft_token_ids = guess[: draft.request.max_drafts()]
            draft.num_computed = len(draft.request.token_ids)
            draft.guesses = guess[:-1]  # the last one was never fed back

    def _prepare(self, request: Request) -> _Draft | None:
        """The request's state, rid of guesses that were not kept, with blocks for what comes; None without room."""
        request.draft_token_ids = []
        longest = len(request.token_ids) + self._num_tokens - 1
        if request.max_drafts() < 1 or longest > self._model.config.max_position_embeddings:
            return None
        draft = self._drafts.get(request.request_id)
        if draft is None:
            draft = self._drafts[request.request_id] = _Draft(request)
        # Keys of guesses that were kept stay; the others are written over.
        following = request.token_ids[draft.num_computed : -1]
        for guess, token in zip(draft.guesses, following, strict=False):
            if guess != token:
                break
            draft.num_computed += 1
        draft.guesses = []
        # The last token is computed anew, if no step has come between two calls.
        draft.num_computed = min(draft.num_computed, len(request.token_ids) - 1)
        missing = -(-longest // self._block_size) - len(draft.blocks)
        if missing > 0:
            blocks = self._allocator.allocate(missing)
            if blocks is None:
                return None
            draft.blocks += blocks
        return draft

    def _catch_up(self, drafts: Sequence[_Draft]) -> None:
        """Compute the keys and values of all tokens but the last, in chunks."""
        while True:
            budget = _CHUNK
            tokens: list[int] = []
            lengths: list[int] = []
            chosen: list[_Draft] = []
            for draft in drafts:
                start = draft.num_computed
                chunk = draft.request.token_ids[start : min(start + budget, len(draft.request.token_ids) - 1)]
                if chunk:
                    budget -= len(chunk)
                    tokens += chunk
                    lengths.append(len(chunk))
                    chosen.append(draft)
                    draft.num_computed += len(chunk)
            if not chosen:
                return
            contexts = [draft.num_computed for draft in chosen]
            self._forward(torch.tensor(tokens, device=self._model.device), lengths, contexts, chosen)

    def _forward(
        self, tokens: Tensor, lengths: Sequence[int], contexts: Sequence[int], drafts: Sequence[_Draft]
    ) -> Tensor:
        assert self._cache is not None  # `propose` has taken it
        batch = TokenBatch.paged(
            lengths,
            contexts,
            [draft.blocks for draft in drafts],
            self._cache,
            rope_lengths=[draft.request.rope_length for draft in drafts],
        )
        hidden: Tensor = self._model(tokens, batch)
        return hidden

    def _forget_finished(self) -> None:
        for request_id, draft in list(self._drafts.items()):
            if draft.request.is_finished:
                self._allocator.release(draft.blocks)
                del self._drafts[request_id]
