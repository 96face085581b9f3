"""Optimizer steps over 822M parameters (64 of 2048², 48 of 5632 x 2048) against torch's."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernel_groups.timing import BF16, Row, eager_times, randn, row
from mainspring.ops.muon import Muon
from mainspring.ops.triton.adamw import AdamWParameter, FusedAdamW


def adamw_rows() -> Iterator[Row]:
    """822M float32 parameters: 64 of 2048² and 48 of 5632 x 2048; 28 bytes of each are read or written."""
    shapes = [(2048, 2048)] * 64 + [(5632, 2048)] * 48
    count = sum(a * b for a, b in shapes)
    rates = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
    weights = [randn(*s, dtype=torch.float32, scale=0.02) for s in shapes]
    gradients = [randn(*s, dtype=torch.float32, scale=1e-3) for s in shapes]
    state = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    ours = FusedAdamW([AdamWParameter(w, a, b, 0.1) for w, a, b in zip(weights, *state, strict=True)])
    parameters = [w.clone().requires_grad_() for w in weights]
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g
    peer = torch.optim.AdamW(
        parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True, capturable=True
    )
    ours.step(gradients, step=1, **rates)  # uploads its table of addresses, which a graph cannot
    yield row(
        "adamw", "822M float32", count * 28 / 1e9, "GB", [lambda: ours.step(gradients, step=2, **rates)],
        [peer.step], "torch fused",
    )  # fmt: skip
    del parameters, peer
    narrow = [g.to(BF16) for g in gradients]
    mixed = FusedAdamW(
        [AdamWParameter(w, a, b, 0.1, w.to(BF16)) for w, a, b in zip(weights, *state, strict=True)]
    )
    mixed.step(narrow, step=1, **rates)
    yield row(
        "adamw", "822M bf16 with float32 masters", count * 28 / 1e9, "GB",
        [lambda: mixed.step(narrow, step=2, **rates)],
    )  # fmt: skip


def muon_rows() -> Iterator[Row]:
    """The same parameters; five Newton-Schulz steps counted as torch takes them, 2 · n² · (2 m + n) each."""
    shapes = [(2048, 2048)] * 64 + [(5632, 2048)] * 48
    weights = [randn(*s, dtype=torch.float32, scale=0.02) for s in shapes]
    gradients = [randn(*s, dtype=torch.float32, scale=1e-3) for s in shapes]
    parameters = [w.clone().requires_grad_() for w in weights]
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g
    peer = torch.optim.Muon(parameters, lr=1e-3, weight_decay=0.1)
    ours = Muon(weights)
    flop = sum(5 * 2 * min(s) ** 2 * (2 * max(s) + min(s)) for s in shapes) / 1e9
    mine, theirs = eager_times(lambda: ours.step(gradients, 1e-3)), eager_times(peer.step)
    yield Row("muon", "822M float32", flop, "GFLOP", *mine, *theirs, "torch.optim.Muon")
