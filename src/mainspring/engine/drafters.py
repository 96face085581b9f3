"""Builds what an engine's configuration says about guessing tokens."""

from __future__ import annotations

import torch

from mainspring.engine.draft_model import DraftModelDrafter
from mainspring.engine.hooks import Drafter
from mainspring.engine.ngram_drafter import NgramDrafter
from mainspring.engine.sampler import SeatSampler
from mainspring.engine.served_model import ServedModel, cache_shape
from mainspring.engine.speculative import SpeculativeConfig
from mainspring.errors import ConfigError
from mainspring.model.checkpoint import load_model
from mainspring.model.decoder import Decoder


def load_draft_model(config: SpeculativeConfig | None, target: ServedModel) -> Decoder | None:
    """The draft model, on the model's device, if there is to be one. Its order of sums decides no token, so it
    computes as fast as it can. Raises what `load_model` raises."""
    if config is None or config.model is None:
        return None
    return load_model(config.model, device=target.device, numerics="fast")


def blocks_beside(num_blocks: int, target: ServedModel, cache_dtype: torch.dtype, draft: Decoder) -> int:
    """How many blocks the two caches can have each, in the memory of num_blocks of the model's alone: of what one
    process holds of it, for the draft model is whole beside rank 0's part."""
    ours, theirs = (
        shape.num_layers * shape.row_bytes(dtype.itemsize)
        for shape, dtype in ((cache_shape(target), cache_dtype), (cache_shape(draft), draft.dtype))
    )
    return max(1, num_blocks * ours // (ours + theirs))


def make_drafter(
    config: SpeculativeConfig | None,
    target: ServedModel,
    draft: Decoder | None,
    sampler: SeatSampler,
    num_blocks: int,
    block_size: int,
) -> Drafter | None:
    """None without speculation. Raises ConfigError if there is no draft model, or one that does not fit."""
    if config is None:
        if draft is not None:
            raise ConfigError("a draft model was given, but no speculative configuration")
        return None
    if config.method == "ngram":
        return NgramDrafter(config.num_speculative_tokens, config.prompt_lookup_max, config.prompt_lookup_min)
    if draft is None:
        raise ConfigError("speculative method 'draft_model' needs a model; name one")
    return DraftModelDrafter(draft, target, sampler, config.num_speculative_tokens, num_blocks, block_size)
