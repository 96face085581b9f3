"""Jobs of the pool: log-probabilities of given sequences with gradients, and whole weights one after the other."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from mainspring import ops
from mainspring.formats.model_config import ModelConfig
from mainspring.formats.safetensors_file import CheckpointReader
from mainspring.model.checkpoint import load_model
from mainspring.ops import Numerics, TokenBatch
from mainspring.parallel.layout import Layout
from mainspring.parallel.mesh import Mesh
from mainspring.parallel.parallelize import parallelize
from mainspring.parallel.streaming import stream_weights, weights_checksum
from mainspring.parallel.units import Units
from mainspring.rl.samples import Sample
from mainspring.rl.sft import SftSettings, sft
from mainspring.train.rank_optimizer import RankOptimizer
from mainspring.train.recipe import OptimizerSection
from mainspring.train.verify import gradient_errors

TEMPERATURE = 0.7


def sequences(config: ModelConfig) -> list[list[int]]:
    """Eight of unlike lengths, one of a single token."""
    generator = torch.Generator().manual_seed(9)
    lengths = (12, 1, 20, 7, 2, 31, 5, 9)
    return [torch.randint(0, config.vocab_size, (n,), generator=generator).tolist() for n in lengths]


def loss_of(log_probs: list[Tensor], numbers: list[int], total: int) -> Tensor:
    """A share of a step's loss: each token's weight depends on its place."""
    terms = [
        (p * torch.linspace(-1, 2, len(p), dtype=p.dtype) * (1 + i)).sum()
        for i, p in zip(numbers, log_probs, strict=True)
    ]
    return torch.stack(terms).sum() / total


def units_of(directory: str, layout: str, dtype: torch.dtype, numerics: Numerics = "fast") -> Units:
    parsed, config = Layout.parse(layout), ModelConfig.from_file(directory)
    mesh = Mesh.build(parsed.axes, key_copies=parsed.key_copies(config))
    model = load_model(directory, dtype=dtype, numerics=numerics).train()
    return Units(parallelize(model, parsed, mesh))


def scored(directory: str, layout: str, gradients: str) -> tuple[dict[int, Any], float]:
    """(log-probabilities of the rank's sequences by number, largest gradient error); float64."""
    units = units_of(directory, layout, torch.float64)
    model = units.model
    given = sequences(model.config)
    group = model.mesh.group("dp")
    mine = list(range(len(given)))[group.rank :: group.size]
    units.begin_step()
    total = sum(len(s) - 1 for s in given)
    found: dict[int, Any] = {}
    for half in (mine[: len(mine) // 2], mine[len(mine) // 2 :]):  # two micro-batches
        log_probs = model.log_probs([given[i] for i in half], temperature=TEMPERATURE)
        loss_of(log_probs, half, total).backward()
        found |= {i: p.detach().numpy() for i, p in zip(half, log_probs, strict=True)}
    units.finish_step()
    return found, max(gradient_errors(units, CheckpointReader(gradients)).values())


def bits(directory: str, layout: str) -> tuple[bool, Any]:
    """In lockstep and float32: whether they are an engine's to the bit, and they."""
    model = units_of(directory, layout, torch.float32, "lockstep").model.eval()
    given = sequences(model.config)
    log_probs = torch.cat(model.log_probs(given, temperature=TEMPERATURE)).detach()
    expected = []
    with torch.no_grad():
        for sequence in given:  # as an engine: alone, through the logits
            tokens = torch.tensor(sequence)
            logits = model.logits(model(tokens, TokenBatch.packed([len(sequence)]))[:-1]).contiguous()
            expected.append(ops.token_log_probs(logits, tokens[1:], TEMPERATURE, policy=model.policy))
    return torch.equal(log_probs, torch.cat(expected)), log_probs.numpy()


def entropies(directory: str, layout: str) -> dict[str, Any]:
    """Log-probabilities, entropies and the gradient of a mixture of both by hidden states, float64."""
    model = units_of(directory, layout, torch.float64).model
    generator = torch.Generator().manual_seed(5)
    size = (23, model.config.hidden_size)
    hidden = torch.randn(size, dtype=torch.float64, generator=generator).requires_grad_()
    targets = torch.randint(0, model.config.vocab_size, (23,), generator=generator)
    log_p, entropy = model.token_log_probs_and_entropy(hidden, targets, TEMPERATURE)
    weights = torch.linspace(0.5, 2, 23, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((log_p * weights).sum() + (entropy * weights.flip(0)).sum(), hidden)
    return {
        "log_p": log_p.detach().numpy(),
        "entropy": entropy.detach().numpy(),
        "gradient": gradient.numpy(),
        "same": torch.equal(log_p, model.token_log_probs(hidden, targets, TEMPERATURE)),
    }


def streamed(directory: str, layout: str) -> tuple[str, dict[str, str], int]:
    """(checksum, hash of each whole tensor, most bytes of a tensor)."""
    units = units_of(directory, layout, torch.bfloat16)
    found: dict[str, str] = {}
    most = 0
    for name, tensor in stream_weights(units):
        data = tensor.view(torch.uint8).numpy().tobytes()
        found[name] = f"{tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}"
        most = max(most, len(data))
    return weights_checksum(units), found, most


def samples_of(config: ModelConfig) -> list[Sample]:
    """The sequences of more than one token; all but their first third is written."""
    given = [s for s in sequences(config) if len(s) > 1]
    return [Sample(tuple(s), tuple(i > len(s) // 3 for i in range(len(s)))) for s in given]


def tuned_by_sft(directory: str, layout: str) -> tuple[list[float], list[float]]:
    """(losses, gradient norms) of two steps of supervised fine-tuning: the loop of one device, on every rank."""
    units = units_of(directory, layout, torch.float32, "lockstep")
    settings = SftSettings(prompts_per_step=6, tokens_per_microbatch=40, max_steps=2)
    loop = sft(
        units.model,
        RankOptimizer(units, OptimizerSection(lr=0.01)),
        samples_of(units.model.config),
        settings,
    )
    metrics = list(loop)
    return [m.loss for m in metrics], [m.grad_norm for m in metrics]


def fine_tuned(directory: str, layout: str, steps: int) -> tuple[list[float], dict[str, Any]]:
    """(the gradient's norm of each step, the weights in the end), float32, two micro-batches a rank and step."""
    units = units_of(directory, layout, torch.float32)
    model = units.model
    given = sequences(model.config)
    optimizer = RankOptimizer(units, OptimizerSection(lr=0.01))
    group = model.mesh.group("dp")
    mine = list(range(len(given)))[group.rank :: group.size]
    norms = []
    for _ in range(steps):
        for half in (mine[: len(mine) // 2], mine[len(mine) // 2 :]):
            loss_of(model.log_probs([given[i] for i in half]), half, 80).backward()
            optimizer.accumulate()
        norms.append(optimizer.step(1.0, 1.0))
    return norms, {name: tensor.numpy() for name, tensor in stream_weights(units)}
