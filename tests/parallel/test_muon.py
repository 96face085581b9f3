"""Muon under layouts: shards of momentum, whole matrices orthogonalised by some rank, one device's weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mainspring.formats.safetensors_file import CheckpointReader
from mainspring.model.checkpoint import load_model, save_model
from mainspring.parallel.layout import Layout
from mainspring.train.optimizer import Optimizer
from mainspring.train.recipe import OptimizerSection
from mainspring.train.verify import VerifySettings
from parallel.conftest import Reference
from parallel.pool import Pool
from parallel.test_layouts import hold

SETTINGS = VerifySettings(steps=2)


@pytest.fixture(scope="module")
def moved(
    reference: Callable[..., Reference], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The weights after two steps of the reference's gradients on one device."""

    def make(kind: str) -> Path:
        known = reference(kind, SETTINGS)
        model = load_model(known.directory, dtype="float32", numerics="fast").train()
        optimizer = Optimizer(model, OptimizerSection("muon", muon_weight_decay=0.1))
        reader = CheckpointReader(known.gradients)
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter)
            gradients = {name: p.grad for name, p in model.named_parameters()}
            for part in model.parts():
                gradient = gradients[part.parameter]
                assert gradient is not None
                part.view(gradient).copy_(torch.from_numpy(reader.entry(part.name).numpy()))
            optimizer.accumulate()
            optimizer.step(1.0, 0.0)
        target = tmp_path_factory.mktemp("moved") / kind
        save_model(model, target)
        return target

    return make


@pytest.mark.parametrize(
    ("kind", "layout", "offload"),
    [
        ("tied", "one", False),
        ("tied", "dp=2", True),
        ("tied", "dp=2,zero=3", False),
        ("biased", "tp=4", False),
        ("biased", "tp=4,sequence_parallel=false,dp=2,zero=1", False),
        ("tied", "pp=2,tp=2", False),
        ("moe", "dp=2,cp=2,ep=2", False),
        ("moe", "tp=2,dp=2,ep=2,zero=3", True),
    ],
)
def test_given_one_devices_gradients_every_layout_moves_the_weights_as_one_device(
    pool: Pool,
    reference: Callable[..., Reference],
    moved: Callable[[str], Path],
    kind: str,
    layout: str,
    offload: bool,
) -> None:
    known = reference(kind, SETTINGS)
    results = pool.run(
        "jobs:muon_error", Layout.parse(layout).world,
        str(known.directory), layout, str(known.gradients), str(moved(kind)), offload,
    )  # fmt: skip
    for error, change in results:
        assert change > 0.01  # Muon's learning rate is 0.02
        assert error <= 1e-6


def test_a_run_with_muon_equals_one_devices(pool: Pool, reference: Callable[..., Reference]) -> None:
    hold(pool, reference, "moe:tp=2,dp=2,ep=2,zero=1", VerifySettings(steps=2, optimizer="muon"))
