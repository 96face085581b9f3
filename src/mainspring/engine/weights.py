"""New weights into a running model, and a checksum by which two processes see that they have the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from mainspring.errors import CheckpointError
from mainspring.model.checksum import digest_of_sums, sum_of_bits
from mainspring.model.decoder import Decoder


@torch.no_grad()
def copy_weights(model: Decoder, state_dict: Mapping[str, Tensor]) -> None:
    """Copy tensors, by their Hugging Face names, into the model's own: no parameter moves in memory.

    Any part of the model may be given; a tied output embedding may come a second time under its own name.

    Raises:
        CheckpointError: a name that the model does not have, or another shape; then nothing has been changed.
    """
    views = model.hf_tensors()
    given = dict(state_dict)
    if model.config.tie_word_embeddings:
        given.pop("lm_head.weight", None)
    for name, tensor in given.items():
        if name not in views:
            raise CheckpointError(f"the model has no tensor {name!r}")
        if tensor.shape != views[name].shape:
            raise CheckpointError(
                f"tensor {name!r} has shape {list(tensor.shape)}, the model needs {list(views[name].shape)}"
            )
    for name, tensor in given.items():
        views[name].copy_(tensor, non_blocking=True)


@torch.no_grad()
def broadcast_weights(model: Decoder, source: int, group: dist.ProcessGroup | None = None) -> None:
    """All processes of the group take the weights of process `source` (its global rank), in place.

    Every process calls it with a model of the same structure.

    Raises:
        CheckpointError: the structures differ; then no weight has been sent.
    """
    parameters = sorted(model.named_parameters())
    structure = repr([(name, tuple(p.shape), str(p.dtype)) for name, p in parameters])
    digest = hashlib.blake2b(structure.encode(), digest_size=7).digest()
    # The largest of d and of -d over all processes: they cancel out if all have the same d.
    extremes = torch.tensor([1, -1], device=model.device) * int.from_bytes(digest)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    if int(extremes.sum()) != 0:
        raise CheckpointError(
            "the processes' models differ in the names, shapes or dtypes of their parameters"
        )
    for _, parameter in parameters:
        dist.broadcast(parameter.data, src=source, group=group)


@torch.no_grad()
def weights_checksum(model: Decoder) -> str:
    """128 bits of the names, shapes, dtypes and bits of all tensors, in hexadecimal digits; the same on every device.

    Each tensor is summed up in 64-bit integers, each element times an odd factor of its own, so that the sum has no
    order and moving, swapping or changing an element changes it.
    """
    return digest_of_sums(
        (name, tuple(tensor.shape), tensor.dtype, int(sum_of_bits(tensor)))
        for name, tensor in model.hf_tensors().items()
    )
