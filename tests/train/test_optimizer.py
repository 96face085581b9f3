"""One optimizer for all weights: masters, accumulation, clipping, parts of fused weights, its state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mainspring.errors import CheckpointError
from mainspring.model.decoder import Decoder
from mainspring.ops import TokenBatch
from mainspring.train.optimizer import Optimizer
from mainspring.train.recipe import OptimizerSection
from train.models import tiny_model

_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}


def _batch(seed: int, model: Decoder) -> tuple[Tensor, TokenBatch, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.config.vocab_size, (24,), generator=generator)
    return tokens, TokenBatch.packed([10, 14]), tokens.roll(-1)


def _train(model: Decoder, optimizer: Optimizer, steps: int, clip_norm: float = 0.0) -> None:
    for seed in range(steps):
        model.loss(*_batch(seed, model)).backward()
        optimizer.accumulate()
        optimizer.step(1.0, clip_norm)


@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
def test_adamw_equals_torch_adamw(clip_norm: float) -> None:
    ours, theirs = tiny_model(), tiny_model()
    _train(ours, Optimizer(ours, OptimizerSection(lr=1e-2, weight_decay=0.3)), 5, clip_norm)
    parameters = dict(theirs.named_parameters())
    decayed = [p for n, p in parameters.items() if p.ndim == 2 and n != "embedding"]
    plain = [p for n, p in parameters.items() if p.ndim == 1 or n == "embedding"]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": plain, "weight_decay": 0.0}]
    oracle = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for seed in range(5):
        oracle.zero_grad()
        theirs.loss(*_batch(seed, theirs)).backward()
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip_norm)
        oracle.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulated_micro_batches_equal_one_batch(dtype: torch.dtype) -> None:
    whole, split = tiny_model(dtype), tiny_model(dtype)
    settings = OptimizerSection(lr=1e-2)
    one, two = Optimizer(whole, settings), Optimizer(split, settings)
    tokens, batch, targets = _batch(0, whole)
    whole.loss(tokens, batch, targets).backward()
    one.accumulate()
    for first, last in ((0, 10), (10, 24)):
        share = (last - first) / 24
        piece = TokenBatch.packed([last - first])
        (split.loss(tokens[first:last], piece, targets[first:last]) * share).backward()
        two.accumulate()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert one.step(0.0, 0.0) == pytest.approx(two.step(0.0, 0.0), rel=tolerance)


def test_bfloat16_weights_are_rounded_float32_masters() -> None:
    model = tiny_model(torch.bfloat16)
    optimizer = Optimizer(model, OptimizerSection(lr=1e-5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _train(model, optimizer, 30)
    masters = {
        n.removeprefix("master."): t for n, t in optimizer.state_tensors().items() if n.startswith("master.")
    }
    for name, weight in model.hf_tensors().items():
        assert masters[name].dtype == torch.float32
        assert torch.equal(masters[name].to(torch.bfloat16), weight)
    # Steps of 1e-5 round away in bfloat16 near 0.02; in the masters they add up.
    assert any(not torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("changes", [{}, _MOE, {"tie_word_embeddings": False}])
def test_muon_moves_each_part_of_a_fused_weight_by_itself(changes: dict[str, object]) -> None:
    model = tiny_model(**changes)
    optimizer = Optimizer(model, OptimizerSection(name="muon", muon_lr=1.0, lr=0.0))
    before = {name: t.detach().clone() for name, t in model.hf_tensors().items()}
    _train(model, optimizer, 1)
    muon_names = {n.removeprefix("muon.momentum.") for n in optimizer.state_tensors() if n.startswith("muon")}
    assert muon_names == {
        n
        for n, t in before.items()
        if t.ndim == 2 and "embed" not in n and "lm_head" not in n and "gate.w" not in n
    }
    moved = 0
    for name, tensor in model.hf_tensors().items():
        update = tensor.detach() - before[name]
        if name not in muon_names:
            assert float(update.abs().max()) == 0.0
        elif float(update.norm()) > 0:  # an expert that no token chose has no gradient
            rows, columns = update.shape
            largest = float(torch.linalg.svdvals(update)[0]) / max(1.0, rows / columns) ** 0.5
            assert 0.6 < largest < 1.3, name
            moved += 1
    assert moved > len(muon_names) // 2


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_continues_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    settings = OptimizerSection(name=name)
    model = tiny_model(dtype)
    optimizer = Optimizer(model, settings)
    _train(model, optimizer, 3)
    saved = {key: tensor.detach().clone() for key, tensor in optimizer.state_tensors().items()}
    other = tiny_model(dtype, seed=9)
    other.load_state_dict(model.state_dict())
    resumed = Optimizer(other, settings)
    resumed.load_state_tensors(saved)
    _train(model, optimizer, 2)
    _train(other, resumed, 2)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_state_of_another_optimizer_is_refused() -> None:
    model = tiny_model()
    adamw = Optimizer(model, OptimizerSection())
    muon = Optimizer(model, OptimizerSection(name="muon"))
    with pytest.raises(CheckpointError, match=r"lacks|also has"):
        muon.load_state_tensors(adamw.state_tensors())
    wrong = dict(adamw.state_tensors())
    wrong["adamw.exp_avg.model.norm.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match="shape"):
        adamw.load_state_tensors(wrong)


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    model = tiny_model()
    optimizer = Optimizer(model, OptimizerSection())
    before = [p.detach().clone() for p in model.parameters()]
    (model.loss(*_batch(0, model)) * float("inf")).backward()
    optimizer.accumulate()
    assert not torch.isfinite(torch.tensor(optimizer.step(1.0, 1.0)))
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_moves_weights_as_the_cpu_does(name: str, dtype: torch.dtype) -> None:
    cpu, gpu = tiny_model(dtype), tiny_model(dtype).to("cuda")
    settings = OptimizerSection(name=name)
    ours, reference = Optimizer(gpu, settings), Optimizer(cpu, settings)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for mine, other in zip(gpu.parameters(), cpu.parameters(), strict=True):
            other.grad = torch.randn(other.shape, generator=generator).to(dtype)
            mine.grad = other.grad.to("cuda")
        for optimizer in (ours, reference):
            optimizer.accumulate()
            optimizer.step(1.0, 1.0)
    theirs = reference.state_tensors()
    for key, tensor in ours.state_tensors().items():
        # Muon's directions are computed in bfloat16, here as there.
        close = (
            {"rtol": 1e-4, "atol": 1e-5} if name == "adamw" or "muon" in key else {"rtol": 0.05, "atol": 0.01}
        )
        torch.testing.assert_close(tensor.cpu(), theirs[key], **close)
    if dtype is torch.bfloat16:
        masters = {n.removeprefix("master."): t for n, t in ours.state_tensors().items() if "master." in n}
        for key, weight in gpu.hf_tensors().items():
            assert torch.equal(masters[key].to(dtype), weight)
