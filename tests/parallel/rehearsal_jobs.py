"""A pipeline whose kernels are loaded as CUDA does it: only when all messages of the rank have come."""

from __future__ import annotations

import threading
import time
from typing import Any
from unittest.mock import patch

import torch

from mainspring.formats.safetensors_file import CheckpointReader
from mainspring.model.checkpoint import load_model
from mainspring.parallel import pipeline
from mainspring.parallel.balance import take_loads
from mainspring.parallel.layout import Layout
from mainspring.parallel.parallelize import parallelize
from mainspring.parallel.pipeline import Pipeline
from mainspring.parallel.schedule import Action
from mainspring.parallel.units import Units
from mainspring.train.verify import DTYPES, VerifySettings, gradient_errors, micro_batches
from parallel.jobs import mesh_for

PATIENCE = 0.5  # seconds


class Arrival:
    """A message's work, which says whether it has come (gloo's own learns of it in `wait` alone)."""

    def __init__(self, work: Any) -> None:
        self._thread = threading.Thread(target=work.wait)
        self._thread.start()

    def wait(self) -> None:
        self._thread.join()

    def has_come(self, until: float) -> bool:
        self._thread.join(max(0.0, until - time.monotonic()))
        return not self._thread.is_alive()


def steps(
    directory: str, layout: str, settings: VerifySettings, gradients: str, rehearses: bool
) -> dict[str, Any]:
    """Two steps and an evaluation. waited: actions before whose loading a message did not come in time."""
    parsed = Layout.parse(layout)
    model = load_model(directory, dtype=DTYPES[settings.dtype], numerics="fast").train()
    share = parallelize(model, parsed, mesh_for(parsed, model.config))
    units = Units(share)
    runner = Pipeline(share, units, rehearses=rehearses)
    random = torch.get_rng_state()
    loaded: set[tuple[object, ...]] = set()
    waited: list[str] = []
    run = pipeline._Run._do

    def load_first(self: pipeline._Run, action: Action) -> None:
        shape = action.kind, action.stage, pipeline._shape(self.micro_batches[action.micro].lengths)
        if shape not in loaded:
            loaded.add(shape)
            flying = [pending for pending in self._arriving.values() if pending.work is not None]
            for pending in flying:
                pending.work = pending.work if isinstance(pending.work, Arrival) else Arrival(pending.work)
            until = time.monotonic() + PATIENCE
            if not all(pending.work.has_come(until) for pending in flying):
                waited.append(str(action))
        run(self, action)

    found: dict[str, Any] = {"losses": [], "gradients": [], "loads": []}
    with patch.object(pipeline._Run, "_do", load_first):
        for step in range(settings.steps):
            batch = micro_batches(model.config, settings, step)
            found["losses"].append(runner.run(batch))
            if step == 0:
                found["error"] = max(gradient_errors(units, CheckpointReader(gradients)).values())
            found["gradients"].append([units.gradient(piece).clone().numpy() for piece in units.pieces])
            found["loads"].append({n: load.slots.tolist() for n, load in take_loads(share).items()})
            units.clear()
        found["evaluated"] = runner.evaluate(micro_batches(model.config, settings, 0))
        found["logits"] = runner.next_logits(micro_batches(model.config, settings, 0)[0]).numpy()
    return found | {"waited": waited, "same_random": torch.equal(random, torch.get_rng_state())}
