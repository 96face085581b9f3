"""A job of the pool: log-probabilities of sequences that the caller gives, for the engine's tests."""

from __future__ import annotations

import torch

from mainspring.formats.model_config import ModelConfig
from mainspring.model.checkpoint import load_model
from mainspring.parallel.layout import Layout
from mainspring.parallel.mesh import Mesh
from mainspring.parallel.parallelize import parallelize


def log_probs(directory: str, layout: str, sequences: list[list[int]]) -> list[list[float]]:
    """As the trainer computes them under the layout, in lockstep; without a gradient."""
    parsed, config = Layout.parse(layout), ModelConfig.from_file(directory)
    mesh = Mesh.build(parsed.axes, key_copies=parsed.key_copies(config))
    model = parallelize(load_model(directory), parsed, mesh).eval()
    with torch.no_grad():
        return [values.tolist() for values in model.log_probs(sequences)]
