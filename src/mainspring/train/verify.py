"""Holds a layout against one device: every parameter's gradient, the gradient's norm, the losses over some steps.

The one-device run writes its gradients to a safetensors file under Hugging Face's names; each rank then compares the
pieces it owns with the same elements of that file, so that nothing is gathered. Gradients of another framework,
dumped under these names (`docs/parallel.md`), are compared in the same way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mainspring import ops
from mainspring.formats.files import new_directory
from mainspring.formats.model_config import ModelConfig
from mainspring.formats.named_models import resolve
from mainspring.formats.safetensors_file import CheckpointReader, SafetensorsWriter, TensorSpec
from mainspring.model.checkpoint import load_model, save_model
from mainspring.model.decoder import Decoder
from mainspring.model.initialise import create_model
from mainspring.model.layers import DecoderLayer, MixtureOfExperts
from mainspring.ops import IGNORE_INDEX, Numerics, Policy, TokenBatch
from mainspring.ops.precision import accumulator
from mainspring.parallel.balance import take_loads
from mainspring.parallel.checkpoint import NAMES, load_weights, read_piece
from mainspring.parallel.collectives import all_reduce
from mainspring.parallel.launch import local_device
from mainspring.parallel.layout import Layout
from mainspring.parallel.mesh import Mesh
from mainspring.parallel.parallelize import parallelize
from mainspring.parallel.pipeline import Pipeline
from mainspring.parallel.placement import hf_shapes
from mainspring.parallel.units import Units
from mainspring.train.optimizer import Optimizer
from mainspring.train.packing import MicroBatch
from mainspring.train.recipe import OptimizerSection
from mainspring.train.sharded_optimizer import ShardedOptimizer

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
GRADIENT_TOLERANCE = {"float32": 1e-5, "float64": 1e-10, "bfloat16": 5e-2}
"""Largest error of a parameter's gradient, in norm over the reference's norm."""
ROUNDINGS = 2.0
"""Times one device's own error against float64 that a layout may have: the bar of every kernel of the house."""
LOSS_TOLERANCE = {"float32": 1e-4, "float64": 1e-5, "bfloat16": 5e-2}
"""Of later steps' losses: after a step the weights (float32 masters) differ by roundings."""


@dataclass(frozen=True)
class VerifySettings:
    """What both sides compute. The batch of a step is `micro_batches` packed streams of about `tokens` tokens."""

    steps: int = 3
    micro_batches: int = 4
    tokens: int = 48
    seed: int = 0
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    numerics: Numerics = "fast"
    device: Literal["cpu", "cuda"] = "cpu"
    lr: float = 1e-3
    optimizer: Literal["adamw", "muon"] = "adamw"


@dataclass(frozen=True)
class Run:
    """Losses and gradient norms of each step, and of each mixture-of-experts layer the slots given to each expert."""

    losses: list[float]
    norms: list[float]
    loads: dict[str, list[int]]


@dataclass(frozen=True)
class Roundings:
    """One device in the dtype that is verified, and the errors of its gradients against float64."""

    run: Run
    errors: dict[str, float]


@dataclass(frozen=True)
class Verdict:
    """errors: of each parameter's gradient; problems: what is out of tolerance, empty if the layout is sound."""

    errors: dict[str, float]
    problems: list[str]


def micro_batches(config: ModelConfig, settings: VerifySettings, step: int) -> list[MicroBatch]:
    """A step's batch: random documents of random lengths, some targets left out, no two streams of one length."""
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence((settings.seed, step))))
    batches = []
    for number in range(settings.micro_batches):
        total = max(2, settings.tokens - number)
        cuts = random.choice(np.arange(1, total), size=min(3, total - 1), replace=False)
        bounds = [0, *sorted(int(c) for c in cuts), total]
        tokens = random.integers(0, config.vocab_size, total + 1, dtype=np.int64)
        targets = tokens[1:].copy()
        targets[random.random(total) < 0.1] = IGNORE_INDEX
        lengths = tuple(b - a for a, b in itertools.pairwise(bounds))
        batches.append(MicroBatch(tokens[:-1], targets, lengths))
    return batches


def save_batch(config: ModelConfig, settings: VerifySettings, path: Path) -> None:
    """Writes the first step's batch as safetensors: `tokens.N`, `targets.N` (-100 is left out), `lengths.N`, I64."""
    tensors = {}
    for number, batch in enumerate(micro_batches(config, settings, 0)):
        tensors[f"tokens.{number}"], tensors[f"targets.{number}"] = batch.tokens, batch.targets
        tensors[f"lengths.{number}"] = np.asarray(batch.lengths, np.int64)
    specs = {name: TensorSpec("I64", value.shape) for name, value in tensors.items()}
    _write_file(path, specs, tensors.items())


def model_directory(model: Path) -> Path:
    """The Hugging Face directory of a path or a known name. Raises ModelNotFoundError."""
    return model if (model / "config.json").is_file() else resolve(model, "float32").path


def seed_checkpoint(model: Path, settings: VerifySettings, folder: Path) -> Path:
    """Where both sides take their weights from: the model's directory or, if it has none, random ones in `folder`."""
    found = model_directory(model)
    if any(found.glob("*.safetensors")):
        return found
    config = ModelConfig.from_file(found)
    save_model(create_model(config, dtype=torch.float32, seed=settings.seed), folder)
    return folder


def run_reference(directory: Path, settings: VerifySettings, gradients: Path) -> Run:
    """One device: the plain decoder from a checkpoint. The first step's gradients go to the file `gradients`."""
    device = local_device(settings.device)
    model = load_model(
        directory, device=device, dtype=DTYPES[settings.dtype], numerics=settings.numerics
    ).train()
    optimizer = Optimizer(model, _optimizer(settings))
    losses, norms, loads = [], [], {}
    for step in range(settings.steps):
        recorded = _record_loads(model) if step == 0 else []
        loss, sums = _reference_gradients(model, micro_batches(model.config, settings, step))
        losses.append(loss)
        norms.append(math.sqrt(sum(float(g.to(torch.float64).square().sum()) for g in sums.values())))
        if step == 0:
            write_gradients(model, sums, gradients)
            loads = {name: counts.tolist() for name, counts, _ in recorded}
            for _, _, handle in recorded:
                handle.remove()
        for name, parameter in model.named_parameters():
            parameter.grad = sums[name].to(parameter.dtype)
        optimizer.accumulate()
        optimizer.step(1.0, 1.0)
    return Run(losses, norms, loads)


def run_wide_reference(directory: Path, settings: VerifySettings, gradients: Path) -> tuple[Run, Roundings]:
    """One device in float64, whose gradients go to `gradients`, and how far one device in the settings' dtype is off.

    What deep models lose to roundings grows with their depth, and differs from weight to weight: so it is measured.
    """
    narrow = gradients.with_name(f"{settings.dtype}-{gradients.name}")
    exact = run_reference(directory, replace(settings, dtype="float64"), gradients)
    own = run_reference(directory, settings, narrow)
    expected, got = CheckpointReader(gradients), CheckpointReader(narrow)
    sums = {}
    for name in expected.names():
        a, b = (torch.from_numpy(reader.entry(name).numpy()).to(torch.float64) for reader in (got, expected))
        sums[name] = ((a - b).square().sum().item(), b.square().sum().item())
    whole = sum(size for _, size in sums.values())
    noise = whole * torch.finfo(DTYPES[settings.dtype]).eps ** 2
    errors = {name: _relative(*pair, 0.0, whole=whole, noise=noise) for name, pair in sums.items()}
    return exact, Roundings(own, errors)


def run_layout(
    directory: Path, layout: Layout, settings: VerifySettings, gradients: Path, mesh: Mesh
) -> tuple[Run, dict[str, float]]:
    """The same on the mesh's ranks, of which each calls this. Returns the run and each parameter's error."""
    config = ModelConfig.from_file(directory)
    device = local_device(settings.device)
    layout.check(config, settings.micro_batches)
    policy = Policy(settings.numerics)
    model = Decoder(config, policy=policy, device="meta", dtype=DTYPES[settings.dtype]).train()
    share = parallelize(model, layout, mesh)
    units = Units(share, device)
    load_weights(units, directory)
    pipeline = Pipeline(share, units)
    optimizer = ShardedOptimizer(units, _optimizer(settings))
    losses, norms, errors, loads = [], [], {}, {}
    for step in range(settings.steps):
        mesh.monitor.begin_step(step)
        losses.append(pipeline.run(micro_batches(config, settings, step)))
        if step == 0:
            errors = gradient_errors(units, CheckpointReader(gradients))
            loads = {f"layers.{n}": [int(c) for c in load.slots] for n, load in take_loads(share).items()}
        norms.append(optimizer.step(1.0, 1.0))
    return Run(losses, norms, loads), errors


def gradient_errors(units: Units, reference: CheckpointReader) -> dict[str, float]:
    """norm(gradient - reference) / norm(reference) of every tensor, the same on every rank; a collective call.

    A reference that is nothing beside the whole gradient's norm (below the dtype's epsilon of it) is rounding noise:
    the difference is then taken over that norm. A tensor that the file lacks counts as infinity.
    """
    names = list(hf_shapes(units.model.config))
    place = {name: i for i, name in enumerate(names)}
    sums = torch.zeros(len(names), 3, dtype=torch.float64)
    for piece in units.pieces:
        name = piece.block.name
        if name not in reference:
            sums[place[name], 2] += 1
            continue
        expected = read_piece(reference.entry(name), piece).to(torch.float64)
        got = units.gradient(piece).to("cpu", torch.float64)
        sums[place[name], 0] += piece.weight * (got - expected).square().sum()
        sums[place[name], 1] += piece.weight * expected.square().sum()
    sums = all_reduce(sums.to(units.model.device), units.mesh.group("world")).cpu()
    whole = float(sums[:, 1].sum())
    noise = whole * torch.finfo(units.model.dtype).eps ** 2
    return {name: _relative(*sums[i].tolist(), whole=whole, noise=noise) for name, i in place.items()}


def judge(
    reference: Run | None,
    run: Run,
    errors: dict[str, float],
    settings: VerifySettings,
    roundings: Roundings | None = None,
) -> Verdict:
    """Everything that is out of tolerance. Routes first: where they differ, gradients cannot agree.

    With roundings the reference is a float64 run, and a value may be as far from it as `ROUNDINGS` times one device's
    own is, if that is more than the tolerance.
    """
    problems = []
    tolerance, later = GRADIENT_TOLERANCE[settings.dtype], LOSS_TOLERANCE[settings.dtype]
    own = roundings.errors if roundings is not None else {}
    for name, load in reference.loads.items() if reference is not None else ():
        if run.loads.get(name) != load:
            problems.append(
                f"routes differ: {name} gave its experts {run.loads.get(name)} slots, one device {load}"
            )
    allowed = {name: max(tolerance, ROUNDINGS * own.get(name, 0.0)) for name in errors}
    wrong = {name: error for name, error in errors.items() if not error <= allowed[name]}
    if wrong:
        worst = max(wrong, key=lambda name: wrong[name] / allowed[name])
        problems.append(
            f"{len(wrong)} of {len(errors)} gradients are wrong (tolerance {allowed[worst]:g}); "
            f"the worst is {worst!r} with {wrong[worst]:.3g}"
        )
    for what, got, expected, narrow in _compared(reference, run, roundings):
        for step, (a, b, c) in enumerate(zip(got, expected, narrow, strict=True)):
            limit = max(tolerance if step == 0 else later, ROUNDINGS * abs(c - b) / abs(b) if b else 0.0)
            if not abs(a - b) <= limit * abs(b):
                problems.append(f"step {step}: {what} {a!r}, one device {b!r} (tolerance {limit:g})")
                break
    return Verdict(errors, problems)


def write_gradients(model: Decoder, sums: dict[str, Tensor], path: Path) -> None:
    """Writes gradients (by our parameters' names) as one safetensors file under Hugging Face's names."""
    parts = model.parts()
    specs = {
        part.name: TensorSpec(NAMES[sums[part.parameter].dtype], tuple(part.view(sums[part.parameter]).shape))
        for part in parts
    }
    values = ((p.name, p.view(sums[p.parameter]).cpu().contiguous().numpy()) for p in parts)
    _write_file(path, specs, values)


def _write_file(
    path: Path, specs: dict[str, TensorSpec], values: Iterable[tuple[str, npt.NDArray[Any]]]
) -> None:
    """One safetensors file of this name, whatever its size."""
    with new_directory(path.parent / f".{path.name}.parts") as folder:
        with SafetensorsWriter(folder, specs, max_shard_bytes=1 << 62) as writer:
            for name, value in values:
                writer.write(name, value)
            writer.finish()
        (folder / "model.safetensors").replace(path)
    (path.parent / f".{path.name}.parts").rmdir()


def _optimizer(settings: VerifySettings) -> OptimizerSection:
    return OptimizerSection(settings.optimizer, lr=settings.lr)


def _compared(
    reference: Run | None, run: Run, roundings: Roundings | None
) -> Sequence[tuple[str, list[float], list[float], list[float]]]:
    """(what, the layout's, the reference's, one device's in the verified dtype)."""
    if reference is None:
        return ()
    narrow = roundings.run if roundings is not None else reference
    return (
        ("loss", run.losses, reference.losses, narrow.losses),
        ("gradient norm", run.norms, reference.norms, narrow.norms),
    )


def _reference_gradients(model: Decoder, batches: Sequence[MicroBatch]) -> tuple[float, dict[str, Tensor]]:
    """(mean loss over the step's targets, its gradient by parameter in the accumulator's dtype)."""
    count = max(1, sum(int((b.targets != IGNORE_INDEX).sum()) for b in batches))
    wide = accumulator(model.dtype)
    sums = {name: torch.zeros_like(p, dtype=wide) for name, p in model.named_parameters()}
    total = 0.0
    for batch in batches:
        stream = TokenBatch.packed(batch.lengths, model.device)
        hidden = model(torch.from_numpy(batch.tokens).to(model.device), stream)
        targets = torch.from_numpy(batch.targets).to(model.device)
        loss = ops.cross_entropy(hidden, model.output_weight, targets, reduction="sum", policy=model.policy)
        (loss / count).backward()
        total += float(loss.detach().to(torch.float64))
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name].add_(parameter.grad)
                parameter.grad = None
    return total / count, sums


def _record_loads(model: Decoder) -> list[tuple[str, Tensor, Any]]:
    """Counts the slots that each expert is given from now on: (layer's name, counts, hook's handle)."""
    recorded = []
    for number, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        block = layer.mlp
        if not isinstance(block, MixtureOfExperts):
            continue
        counts = torch.zeros(block.num_experts, dtype=torch.int64)

        def count(
            module: nn.Module,
            args: Any,
            logits: Tensor,
            counts: Tensor = counts,
            block: MixtureOfExperts = block,
        ) -> None:
            routing = ops.route(logits.detach(), block.top_k, normalise=block.normalise, policy=block.policy)
            counts += routing.offsets.diff().cpu()

        recorded.append((f"layers.{number}", counts, block.router.register_forward_hook(count)))
    return recorded


def _relative(difference: float, reference: float, missing: float, *, whole: float, noise: float) -> float:
    """From squared norms."""
    if missing or not math.isfinite(difference):
        return math.inf
    size = reference if reference > noise else whole
    if size == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return math.sqrt(difference / size)
