"""AdamW in one launch is torch.optim.AdamW, step for step; with stochastic rounding and 8-bit moments nearly so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops.stochastic_rounding import round_stochastically
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
    for step in range(1, 25):
        lr = 0.01 * min(step, 3)
        gradients = [random_tensor(100 * step + i, *shape) for i, shape in enumerate(SHAPES)]
        if narrow:
            gradients = [g.to(NARROW) for g in gradients]
        skipped = step % 3  # a parameter without a gradient keeps its state, in torch's own step count too
        skips = step == 24
        for i, (p, g) in enumerate(zip(theirs, gradients, strict=True)):
            p.grad = None if i == skipped and skips else g.float() * 0.5
        for group in peer.param_groups:
            group["lr"] = lr
        peer.step()
        given = [None if i == skipped and skips else g for i, g in enumerate(gradients)]
        if step % 3 == 0:
            ours.prepare(given)
        elif step % 3 == 1:  # for other gradients than those that come
            ours.prepare([g + 1 for g in gradients])
        ours.step(given, step=step, lr=lr, beta1=0.9, beta2=0.95, eps=1e-8, grad_scale=0.5)
        for mine, other, weight in zip(masters, theirs, weights, strict=True):
            torch.testing.assert_close(mine, other.detach(), rtol=1e-5, atol=5e-6)
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


RATES = {"lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}


def lone_weights(weight: Tensor, seed: int = 0, steps: int = 1) -> Tensor:
    """bf16 weights without masters after steps with gradients that are 0.3 everywhere."""
    from mainspring.ops.triton.adamw import AdamWParameter, FusedAdamW

    weight = weight.clone()
    state = [torch.zeros(weight.shape, device=DEVICE) for _ in range(2)]
    optimizer = FusedAdamW(
        [AdamWParameter(None, state[0], state[1], 0.1, weight)], stochastic_rounding=True, seed=seed
    )
    for step in range(1, steps + 1):
        optimizer.step([torch.full(weight.shape, 0.3, device=DEVICE)], step=step, **RATES)
    return weight


def test_stochastic_rounding_is_right_on_average_and_reproducible() -> None:
    weight = torch.full((5, 4000), 1.0, device=DEVICE).to(torch.bfloat16)
    moved = lone_weights(weight)
    exact = 1.0 - 0.01 * 0.1 - 0.01  # the first step of a constant gradient is lr
    low, high = 1.0 - 3 * 2**-8, 1.0 - 2 * 2**-8  # its neighbours in bfloat16
    share = float((moved.float() == high).float().mean())
    assert bool(((moved.float() == low) | (moved.float() == high)).all())
    probability = (exact - low) / (high - low)
    assert abs(share - probability) < 5 * (probability * (1 - probability) / moved.numel()) ** 0.5
    assert torch.equal(moved, lone_weights(weight))
    assert not torch.equal(moved, lone_weights(weight, seed=1))
    steps = lone_weights(weight, steps=8)
    # Moves smaller than a unit in the last place add up; and no two elements or steps share their noise.
    assert abs(float(steps.float().mean()) - (1.0 - 8 * 0.011)) < 2e-3
    assert len(steps.float().unique()) > 4
    first, second = (moved[:, ::2] == high).float(), (moved[:, 1::2] == high).float()
    assert abs(float(torch.corrcoef(torch.stack((first.flatten(), second.flatten())))[0, 1])) < 0.05


def test_stochastic_rounding_is_the_references_to_the_bit() -> None:
    from mainspring.ops.triton.adamw import AdamWParameter, FusedAdamW

    masters = [random_tensor(i, *shape) for i, shape in enumerate(SHAPES)]
    weights = [torch.zeros_like(m, dtype=torch.bfloat16) for m in masters]
    optimizer = FusedAdamW(
        [
            AdamWParameter(m, torch.zeros_like(m), torch.zeros_like(m), 0.1, w)
            for m, w in zip(masters, weights, strict=True)
        ],
        stochastic_rounding=True,
        seed=11,
    )
    for step in (1, 2):
        optimizer.step([random_tensor(step, *shape) for shape in SHAPES], step=step, **RATES)
        for number, (master, weight) in enumerate(zip(masters, weights, strict=True)):
            assert torch.equal(weight, round_stochastically(master, parameter=number, step=step, seed=11))


def test_stochastic_rounding_keeps_what_is_not_finite() -> None:
    weight = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0], device=DEVICE).to(torch.bfloat16)
    moved = lone_weights(weight)
    assert moved[:2].isinf().all()
    assert moved[2].isnan()
    assert moved[3].isfinite()


@pytest.mark.parametrize("squares", [False, True])
def test_codes_of_8_bits(squares: bool) -> None:
    from mainspring.ops.triton.moments8 import decode, encode

    moment = random_tensor(0, 3, 1000) * torch.exp(2 * random_tensor(1, 3, 1000))
    if squares:
        moment = moment.square()
    moment[0, :300] = 0.0
    again = decode(*encode(moment, squares), squares)
    assert bool((again[0, :256] == 0).all())
    blocks = torch.nn.functional.pad(moment.flatten(), (0, -moment.numel() % 256)).view(-1, 256)
    largest = blocks.abs().amax(1, keepdim=True).expand_as(blocks).flatten()[:3000].view(3, 1000)
    share = moment.abs() / largest.clamp(min=1e-30)
    error = (again - moment).abs() / moment.abs().clamp(min=1e-30)
    # Half a step of the code, relative: 3 / 127 and 4 / 255 halves at the top, more for the small.
    bound = 0.55 * (4 / 255 / share**0.25 if squares else 3 / 127 / share ** (1 / 3))
    assert bool((error <= bound.clamp(max=1.0))[share > 1e-3].all())
    if squares:
        assert bool((again[moment > 0] > 0).all())


@pytest.mark.parametrize("size", [(3, 1000), (256,), (2048,), (5,)])
def test_8_bit_moments_follow_float32(size: tuple[int, ...]) -> None:
    from mainspring.ops.triton.adamw import AdamWParameter, FusedAdamW
    from mainspring.ops.triton.moments8 import decode, empty_moment, encode

    wide, narrow = random_tensor(0, *size), random_tensor(0, *size)
    start = wide.clone()
    mean, mean_scale = empty_moment(narrow, False)
    square, square_scale = empty_moment(narrow, True)
    eight = FusedAdamW(
        [AdamWParameter(narrow, mean, square, 0.1, exp_avg_scale=mean_scale, exp_avg_sq_scale=square_scale)]
    )
    moments = [torch.zeros_like(wide), torch.zeros_like(wide)]
    full = FusedAdamW([AdamWParameter(wide, moments[0], moments[1], 0.1)])
    scales = torch.exp(random_tensor(7, *size))
    for step in range(1, 26):
        before = decode(mean, mean_scale, False)
        gradient = (random_tensor(step + 10, *size) + 0.3) * scales
        eight.step([gradient], step=step, **RATES)
        full.step([gradient], step=step, **RATES)
        codes, scale = encode(before + (gradient - before) * 0.1, False)
        assert int((codes.int() - mean.int()).abs().max()) <= 1
        torch.testing.assert_close(scale, mean_scale, rtol=1e-5, atol=1e-12)
    assert float((wide - narrow).norm() / (wide - start).norm()) < 0.05


def test_8_bit_moments_train_as_well() -> None:
    """A small network in a real run of steps: its loss with 8-bit moments is that with float32 ones."""
    from mainspring.ops.triton.adamw import AdamWParameter, FusedAdamW
    from mainspring.ops.triton.moments8 import empty_moment

    inputs, hidden = random_tensor(1, 256, 16), random_tensor(2, 16, 8)
    targets = torch.tanh(inputs @ hidden).sum(1, keepdim=True)

    def train(bits: int) -> list[float]:
        weights = [random_tensor(3, 16, 40) * 0.3, random_tensor(4, 40, 1) * 0.2]
        states = [
            (*empty_moment(w, False), *empty_moment(w, True))
            if bits == 8
            else (torch.zeros_like(w), None, torch.zeros_like(w), None)
            for w in weights
        ]
        optimizer = FusedAdamW(
            [
                AdamWParameter(w, s[0], s[2], 0.0, exp_avg_scale=s[1], exp_avg_sq_scale=s[3])
                for w, s in zip(weights, states, strict=True)
            ]
        )
        losses = []
        for step in range(1, 101):
            leaves = [w.detach().requires_grad_() for w in weights]
            loss = (torch.tanh(inputs @ leaves[0]) @ leaves[1] - targets).square().mean()
            optimizer.step(list(torch.autograd.grad(loss, leaves)), step=step, **RATES)
            losses.append(float(loss.detach()))
        return losses

    eight, full = train(8), train(32)
    assert full[-1] < 0.2 * full[0]
    assert sum(eight[-10:]) < 1.05 * sum(full[-10:])


def test_mixtures_of_weights_and_states_are_refused() -> None:
    from mainspring.ops.triton.adamw import AdamWParameter, FusedAdamW

    x = random_tensor(0, 300)
    zero, codes = torch.zeros_like(x), torch.zeros(300, dtype=torch.uint8, device=DEVICE)
    scale = torch.zeros(2, device=DEVICE)
    with pytest.raises(BackendError, match="bfloat16"):
        FusedAdamW([AdamWParameter(x, zero, zero, 0.0)], stochastic_rounding=True)
    with pytest.raises(BackendError, match="masters or none"):
        FusedAdamW([AdamWParameter(None, zero, zero, 0.0)])
    with pytest.raises(BackendError, match="scales"):
        FusedAdamW([AdamWParameter(x, codes, codes, 0.0)])
    with pytest.raises(BackendError, match="scales"):
        FusedAdamW(
            [AdamWParameter(x, codes, codes, 0.0, exp_avg_scale=scale[:1], exp_avg_sq_scale=scale[:1])]
        )
    with pytest.raises(BackendError, match="float32 or uint8"):
        FusedAdamW([AdamWParameter(x, zero, codes, 0.0)])
