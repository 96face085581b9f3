"""Our training step: the `Runner` that the trainer uses, on one device or under a layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mainspring.formats.model_config import ModelConfig
from mainspring.model.decoder import Decoder
from mainspring.model.initialise import create_model
from mainspring.ops import FAST
from mainspring.parallel.experts import Balance
from mainspring.parallel.layout import Layout
from mainspring.parallel.mesh import Mesh
from mainspring.train.captured import CapturedPass
from mainspring.train.packing import MicroBatch
from mainspring.train.recipe import OptimizerSection
from mainspring.train.runner import SingleDevice
from mainspring.train.sharded import Sharded
from training.shapes import Case

Step = Callable[[Sequence[MicroBatch]], float]
"""One optimizer step over micro-batches; the loss."""

CLIP = 1.0
OPTIMIZER = OptimizerSection(lr=1e-4, weight_decay=0.1)


def dtype_for(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def random_model(config: ModelConfig, device: torch.device) -> Decoder:
    """Drawn on the device, which takes less time than a recipe's own bits."""
    name = "bfloat16" if device.type == "cuda" else "float32"
    model = create_model(config, device=device, dtype=name, numerics="fast")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02)
    return model


def on_one_device(case: Case, device: torch.device, *, captured: bool = False) -> Step:
    """captured: passes are replayed from a CUDA graph."""
    model = random_model(case.config, device)
    graphs = CapturedPass(model, case.tokens, case.length) if captured else None
    runner = SingleDevice(model, OPTIMIZER, graphs)
    return lambda batches: runner.train_step(batches, 1.0, CLIP)[0]


def under(
    config: ModelConfig, weights: Path, layout: Layout, device: torch.device, mesh: Mesh | None = None
) -> Step:
    """Every rank calls this, and the step, together; with a mesh of one rank, each for itself.

    weights: a Hugging Face directory.
    """
    mesh = mesh or Mesh.build(layout.axes, key_copies=layout.key_copies(config))
    runner = Sharded(config, layout, mesh, device, dtype_for(device), FAST, OPTIMIZER, Balance())
    runner.load_weights(weights)
    return lambda batches: runner.train_step(batches, 1.0, CLIP)[0]
