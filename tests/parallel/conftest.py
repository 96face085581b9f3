"""One pool of processes and one set of references for the whole session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mainspring.model.checkpoint import save_model
from mainspring.model.initialise import create_model
from mainspring.train.verify import Run, VerifySettings, run_reference
from parallel.models import tiny
from parallel.pool import Pool


@dataclass(frozen=True)
class Reference:
    """A random model's directory, the one-device run and the file of its gradients."""

    directory: Path
    settings: VerifySettings
    run: Run
    gradients: Path


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Reference]:
    """reference(kind, settings): computed once for each."""
    made: dict[tuple[str, VerifySettings], Reference] = {}
    root = tmp_path_factory.mktemp("references")

    def get(kind: str, settings: VerifySettings) -> Reference:
        key = (kind, settings)
        if key not in made:
            folder = root / str(len(made))
            save_model(random_model(kind), folder / "model")
            gradients = folder / "gradients.safetensors"
            made[key] = Reference(
                folder / "model", settings, run_reference(folder / "model", settings, gradients), gradients
            )
        return made[key]

    return get


def random_model(kind: str) -> torch.nn.Module:
    """Norms and biases are random as well, so that none can be lost unnoticed."""
    model = create_model(tiny(kind), dtype=torch.float32, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model
