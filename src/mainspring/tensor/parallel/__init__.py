"""Megatron's parallel modules on the collectives of `csrc/parallel`, with Megatron's exact semantics.

    world = parallel.World(rank, size, "127.0.0.1:29500")
    group = parallel.new_group(world, range(size))
    layer = parallel.ColumnParallelLinear(512, 2048, group)

Activations are [sequence, batch, hidden]; sequence parallelism splits their first dimension
(Shoeybi et al., "Megatron-LM", 2019; Korthikanti et al., "Reducing activation recomputation", 2022).
"""

from mainspring.tensor._tensor import CommunicationError, Group, Work, World, new_group
from mainspring.tensor.parallel import layers as layers
from mainspring.tensor.parallel import mappings as mappings
from mainspring.tensor.parallel.cross_entropy import vocab_parallel_cross_entropy
from mainspring.tensor.parallel.data_parallel import DataParallel
from mainspring.tensor.parallel.indices import build_blending_indices, build_sample_idx
from mainspring.tensor.parallel.launch import launch, world_from_environment
from mainspring.tensor.parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from mainspring.tensor.parallel.mappings import (
    all_to_all,
    copy_to_tensor_parallel,
    gather_from_sequence_parallel,
    gather_from_tensor_parallel,
    reduce_from_tensor_parallel,
    reduce_scatter_to_sequence_parallel,
    scatter_to_sequence_parallel,
    scatter_to_tensor_parallel,
)
from mainspring.tensor.parallel.pipeline import receive_activation, send_activation
from mainspring.tensor.parallel.random import GeneratorTracker
from mainspring.tensor.parallel.softmax import scaled_masked_softmax

__all__ = [
    "ColumnParallelLinear",
    "CommunicationError",
    "DataParallel",
    "GeneratorTracker",
    "Group",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "Work",
    "World",
    "all_to_all",
    "build_blending_indices",
    "build_sample_idx",
    "copy_to_tensor_parallel",
    "gather_from_sequence_parallel",
    "gather_from_tensor_parallel",
    "launch",
    "new_group",
    "receive_activation",
    "reduce_from_tensor_parallel",
    "reduce_scatter_to_sequence_parallel",
    "scaled_masked_softmax",
    "scatter_to_sequence_parallel",
    "scatter_to_tensor_parallel",
    "send_activation",
    "vocab_parallel_cross_entropy",
    "world_from_environment",
]
