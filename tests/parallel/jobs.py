"""What the pool's workers run: module-level functions of plain values."""

from __future__ import annotations

from pathlib import Path

from mainspring.formats.model_config import ModelConfig
from mainspring.parallel.layout import Layout
from mainspring.parallel.mesh import Mesh
from mainspring.train.verify import Run, VerifySettings, run_layout
from parallel import faults


def mesh_for(layout: Layout, config: ModelConfig) -> Mesh:
    return Mesh.build(layout.axes, key_copies=layout.key_copies(config))


def verify(
    directory: str, layout: str, settings: VerifySettings, gradients: str
) -> tuple[Run, dict[str, float]]:
    parsed = Layout.parse(layout)
    mesh = mesh_for(parsed, ModelConfig.from_file(directory))
    return run_layout(Path(directory), parsed, settings, Path(gradients), mesh)


def verify_with_fault(
    fault: str, directory: str, layout: str, settings: VerifySettings, gradients: str
) -> tuple[Run, dict[str, float]]:
    with getattr(faults, fault)():
        return verify(directory, layout, settings, gradients)
