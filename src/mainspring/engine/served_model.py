"""What the engine runs: a whole decoder in this process, or rank 0 of one that is spread over several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TypeAlias

import torch
from torch import Tensor

from mainspring.engine.config import EngineConfig
from mainspring.engine.hooks import Adapters
from mainspring.engine.lora import LoraAdapters
from mainspring.engine.ranks.lead import LeadModel
from mainspring.engine.ranks.shard import CacheShape, copy_blocks
from mainspring.engine.sizing import free_bytes
from mainspring.engine.weights import copy_weights, weights_checksum
from mainspring.errors import ConfigError
from mainspring.model.decoder import Decoder
from mainspring.ops.batch import KVCache

ServedModel: TypeAlias = Decoder | LeadModel


def cache_shape(model: ServedModel) -> CacheShape:
    """What one process holds of the keys and values; of several processes, the one that holds most."""
    if isinstance(model, LeadModel):
        return model.cache_shape
    config = model.config
    return CacheShape(config.num_layers, config.num_kv_heads, config.head_dim)


def free_memory(model: ServedModel) -> int:
    """Bytes that this process may count on: of several, what each may."""
    if not isinstance(model, LeadModel):
        return free_bytes(model.device)
    if model.device.type == "cuda":
        return model.free_device_bytes()
    return free_bytes(model.device) // model.layout.world  # all on this host


def allocate_cache(model: ServedModel, num_blocks: int, block_size: int, dtype: torch.dtype) -> KVCache:
    """A cache of num_blocks usable blocks; of several processes, this one's part."""
    if isinstance(model, LeadModel):
        return model.allocate_cache(num_blocks, block_size, dtype)
    return cache_shape(model).allocate(num_blocks, block_size, dtype, model.device)


def release_cache(model: ServedModel) -> None:
    """The caller has dropped its cache: other processes do so, too."""
    if isinstance(model, LeadModel):
        model.free_cache()


def copy_cache_blocks(model: ServedModel, cache: KVCache, pairs: Tensor) -> None:
    """pairs: [N, 2] int64 on the device, (from, to)."""
    if isinstance(model, LeadModel):
        model.copy_blocks(cache, pairs)
    else:
        copy_blocks(cache, pairs)


def check_supported(model: ServedModel, config: EngineConfig) -> None:
    """Raises ConfigError for settings that a model over several processes does not serve with."""
    if isinstance(model, Decoder):
        return
    if config.cuda_graphs and not model.supports_graphs:
        raise ConfigError(
            f"CUDA graphs are not captured under layout {model.layout}, whose pipeline stages or spread experts are "
            "launched from the host; leave cuda_graphs out"
        )


def load_adapters(model: ServedModel, adapters: Mapping[str, str]) -> Adapters:
    """Of every process its part. Raises CheckpointError, ConfigError."""
    if isinstance(model, LeadModel):
        return model.load_adapters(adapters)
    return LoraAdapters(model, adapters)


def supports_graphs(model: ServedModel) -> bool:
    """Steps are replayed from CUDA graphs, unless the configuration says otherwise."""
    return model.device.type == "cuda" and (isinstance(model, Decoder) or model.supports_graphs)


def close_model(model: ServedModel) -> None:
    """Ends the other processes."""
    if isinstance(model, LeadModel):
        model.close()


def announcement(model: ServedModel) -> Callable[[], None]:
    """To be called before each replay of the graph that has just been captured."""
    return model.last_capture() if isinstance(model, LeadModel) else _nothing


def watched(model: ServedModel) -> AbstractContextManager[None]:
    """Waiting inside, the end of another process raises EngineDeadError."""
    return model.alive() if isinstance(model, LeadModel) else nullcontext()


def check_ranks(model: ServedModel) -> None:
    """Raises EngineDeadError if another process of the model has ended."""
    if isinstance(model, LeadModel):
        model.check()


def replace_weights(model: ServedModel, state_dict: Mapping[str, Tensor]) -> str:
    """Copies new weights in and gives the checksum of all. Raises CheckpointError; then nothing has changed."""
    if isinstance(model, LeadModel):
        model.copy_weights(state_dict)
        return model.checksum()
    copy_weights(model, state_dict)
    return weights_checksum(model)


def _nothing() -> None:
    pass
