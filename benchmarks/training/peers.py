"""The peer: a plain Llama in PyTorch's own operations, its blocks compiled, alone or under FSDP2 or DDP.

Everything is set as is cheapest for the peer: weights, gradients and moments in bfloat16 alone and under DDP, with no
float32 masters; under FSDP2 float32 shards, computed and summed over ranks in bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from mainspring.formats.model_config import ModelConfig
from mainspring.train.packing import MicroBatch
from training.ours import CLIP, OPTIMIZER, Step, dtype_for

Kind = Literal["alone", "ddp", "fsdp2"]


class Block(nn.Module):
    """A decoder layer as one writes it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner, d = config.hidden_size, config.intermediate_size, config.head_dim
        self.heads, self.kv_heads, self.eps = config.num_heads, config.num_kv_heads, config.rms_norm_eps
        self.q = nn.Linear(hidden, self.heads * d, bias=False)
        self.k = nn.Linear(hidden, self.kv_heads * d, bias=False)
        self.v = nn.Linear(hidden, self.kv_heads * d, bias=False)
        self.o = nn.Linear(self.heads * d, hidden, bias=False)
        self.gate = nn.Linear(hidden, inner, bias=False)
        self.up = nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)
        self.norm = nn.RMSNorm(hidden, self.eps)
        self.mlp_norm = nn.RMSNorm(hidden, self.eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [B, S, H]; cos, sin: [S, D / 2]."""
        batch, length, _ = x.shape
        h = self.norm(x)
        q = _rotate(self.q(h).view(batch, length, self.heads, -1), cos, sin).transpose(1, 2)
        k = _rotate(self.k(h).view(batch, length, self.kv_heads, -1), cos, sin).transpose(1, 2)
        v = self.v(h).view(batch, length, self.kv_heads, -1).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        x = x + self.o(out.transpose(1, 2).reshape(batch, length, -1))
        h = self.mlp_norm(x)
        y: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return y


class Head(nn.Module):
    """The last norm, the logits and the loss."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = self.output(self.norm(x)).flatten(0, 1)
        return F.cross_entropy(logits.float(), targets.flatten())


class Llama(nn.Module):
    def __init__(self, config: ModelConfig, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        inverse = config.rope_theta ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        angles = torch.arange(length)[:, None] * inverse
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """[B, S] -> the mean loss."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        loss: Tensor = self.head(x, targets)
        return loss


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [B, S, heads, D]."""
    first, second = x.float().chunk(2, -1)
    c, s = cos[None, :, None, :], sin[None, :, None, :]
    return torch.cat((first * c - second * s, second * c + first * s), -1).to(x.dtype)


def step_of(kind: Kind, config: ModelConfig, length: int, device: torch.device) -> Step:
    """A step over this rank's share of the micro-batches (every `world`-th), sequences of `length`."""
    world, rank = (1, 0) if kind == "alone" else (dist.get_world_size(), dist.get_rank())
    torch.manual_seed(0)
    with device:
        model = Llama(config, length)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    if device.type == "cuda":  # one block is compiled: the others are its like
        for block in model.blocks:
            block.compile()
        model.head.compile()
    forward: nn.Module = model
    if kind == "fsdp2":
        mesh = init_device_mesh(device.type, (world,))
        policy = MixedPrecisionPolicy(param_dtype=dtype_for(device))
        for part in (*model.blocks, model.head, model):
            fully_shard(part, mesh=mesh, mp_policy=policy)
    else:
        model.to(dtype_for(device))
        model.cos, model.sin = model.cos.float(), model.sin.float()
        if kind == "ddp":
            forward = DistributedDataParallel(
                model,
                device_ids=[device.index] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=OPTIMIZER.lr, betas=(OPTIMIZER.beta1, OPTIMIZER.beta2), fused=True
    )

    def step(batches: Sequence[MicroBatch]) -> float:
        mine = batches[rank::world]
        total = torch.zeros((), device=device)
        for number, batch in enumerate(mine):
            if kind == "ddp":
                forward.require_backward_grad_sync = number == len(mine) - 1
            shape = (len(batch.lengths), batch.lengths[0])
            tokens, targets = (
                torch.from_numpy(t).to(device).view(shape) for t in (batch.tokens, batch.targets)
            )
            loss = forward(tokens, targets) / len(mine)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)

    return step
