"""AdamW in one launch is torch.optim.AdamW, step for step."""

from __future__ import annotations

import pytest
import torch

from mainspring.errors import BackendError
from support.triton_kernels import DEVICE, INTERPRETED, needs_triton, random_tensor

pytestmark = needs_triton

SHAPES = [(3,), (1,), (70, 33), (5000,), (16, 300)]
NARROW = torch.float16 if INTERPRETED else torch.bfloat16


@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "masters"])
def test_steps_are_those_of_torch(narrow: bool) -> None:
    from mainspring.ops.triton.adamw import AdamWParameter, FusedAdamW

    masters = [random_tensor(i, *shape) for i, shape in enumerate(SHAPES)]
    decays = [0.1 if len(shape) > 1 else 0.0 for shape in SHAPES]
    weights = [m.to(NARROW) if narrow else None for m in masters]
    theirs = [m.clone().requires_grad_() for m in masters]
    groups = [{"params": [p], "weight_decay": d} for p, d in zip(theirs, decays, strict=True)]
    peer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    ours = FusedAdamW(
        [
            AdamWParameter(m, torch.zeros_like(m), torch.zeros_like(m), d, w)
            for m, d, w in zip(masters, decays, weights, strict=True)
        ]
    )
    for step in range(1, 6):
        lr = 0.01 * step
        gradients = [random_tensor(100 * step + i, *shape) for i, shape in enumerate(SHAPES)]
        if narrow:
            gradients = [g.to(NARROW) for g in gradients]
        skipped = step % 3  # a parameter without a gradient keeps its state, in torch's own step count too
        for i, (p, g) in enumerate(zip(theirs, gradients, strict=True)):
            p.grad = None if i == skipped and step > 3 else g.float() * 0.5
        for group in peer.param_groups:
            group["lr"] = lr
        peer.step()
        given = [None if i == skipped and step > 3 else g for i, g in enumerate(gradients)]
        ours.step(given, step=step, lr=lr, beta1=0.9, beta2=0.95, eps=1e-8, grad_scale=0.5)
        for i, (mine, other, weight) in enumerate(zip(masters, theirs, weights, strict=True)):
            if step > 4 and i == (step - 1) % 3:
                continue  # its own step count differs from here on: ours counts the optimizer's steps
            torch.testing.assert_close(mine, other.detach(), rtol=2e-6, atol=2e-6)
            if weight is not None:
                assert torch.equal(weight, mine.to(NARROW))


def test_no_gradient_moves_nothing_and_bad_input_is_refused() -> None:
    from mainspring.ops.triton.adamw import AdamWParameter, FusedAdamW

    x = random_tensor(0, 50)
    before = x.clone()
    optimizer = FusedAdamW([AdamWParameter(x, torch.zeros_like(x), torch.zeros_like(x), 0.1)])
    rates = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
    optimizer.step([None], step=1, **rates)
    assert torch.equal(x, before)
    with pytest.raises(BackendError, match="count from 1"):
        optimizer.step([x], step=0, **rates)
    with pytest.raises(BackendError, match="shape"):
        optimizer.step([x[:3]], step=1, **rates)
    with pytest.raises(BackendError, match="float32"):
        FusedAdamW([AdamWParameter(x.half(), torch.zeros_like(x), torch.zeros_like(x), 0.1)])
    with pytest.raises(BackendError, match="contiguous"):
        FusedAdamW(
            [
                AdamWParameter(
                    torch.zeros(9, 9, device=DEVICE).t()[:4], *(torch.zeros(4, 9, device=DEVICE),) * 2, 0.1
                )
            ]
        )
