"""The optimizer of a run: float32 master weights, gradient accumulation and clipping, AdamW, and Muon if asked for.

State is named after Hugging Face's tensors (`Decoder.parts`), so it does not depend on how weights are fused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from mainspring.errors import CheckpointError
from mainspring.model.naming import Part
from mainspring.ops.adamw import make_adamw
from mainspring.ops.adamw_parameter import AdamWParameter
from mainspring.ops.euclidean_norms import euclidean_norms
from mainspring.ops.muon import Muon, MuonSettings, classic
from mainspring.train.recipe import OptimizerSection

_EMBEDDINGS = ("embedding", "output_embedding", "score.weight")  # and the head of a value model


class Trainable(Protocol):
    """What an optimizer asks of what it moves: a `Decoder`, or the adapters of one."""

    @property
    def dtype(self) -> torch.dtype: ...

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]: ...

    def parts(self) -> list[Part]:
        """Which rows of which parameter carry which name."""
        ...


class Optimizer:
    """Moves a model's weights by the gradients that `accumulate` has collected since the last `step`.

    A float32 model's weights are updated in place. A bfloat16 model keeps float32 masters here, of which its
    weights are rounded copies; gradients are then summed in float32, however many micro-batches there are (those of
    a single one stay as they are: the sum is exact).
    With `muon`, the matrices inside the layers belong to Muon, part by part (q, k and v, gate and up, each
    expert on its own); embeddings, the router, norms and biases to AdamW (Loshchilov and Hutter, arXiv 1711.05101).
    """

    def __init__(self, model: Trainable, settings: OptimizerSection) -> None:
        self._settings = settings
        self._parts = model.parts()
        self._weights = {name: weight.detach() for name, weight in model.named_parameters()}
        self._parameters = dict(model.named_parameters())
        self._has_masters = model.dtype != torch.float32
        self._masters = {
            name: weight.to(torch.float32, copy=True) if self._has_masters else weight
            for name, weight in self._weights.items()
        }
        self._gradients: dict[str, Tensor] = {}
        use_muon = settings.name == "muon"
        muon_names = {
            name for name in self._masters if use_muon and is_inner_matrix(name, self._masters[name].ndim)
        }
        self._muon_parts = [part for part in self._parts if part.parameter in muon_names]
        self._muon = Muon(
            [part.view(self._masters[part.parameter]) for part in self._muon_parts],
            MuonSettings(
                momentum=settings.muon_momentum,
                weight_decay=settings.muon_weight_decay,
                newton_schulz=classic(settings.muon_iterations),
            ),
            weights=[part.view(self._weights[part.parameter]) for part in self._muon_parts]
            if self._has_masters
            else None,
        )
        self._adamw_names = [name for name in self._masters if name not in muon_names]
        self._adamw_states = {name: self._adamw_parameter(name) for name in self._adamw_names}
        self._adamw = make_adamw(list(self._adamw_states.values())) if self._adamw_names else None
        self._adamw_step = torch.zeros((), dtype=torch.float32)  # steps taken

    def _adamw_parameter(self, name: str) -> AdamWParameter:
        master = self._masters[name]
        return AdamWParameter(
            master,
            torch.zeros_like(master),
            torch.zeros_like(master),
            self._settings.weight_decay if is_inner_matrix(name, master.ndim) else 0.0,
            self._weights[name] if self._has_masters else None,
        )

    def accumulate(self, *, borrowed: bool = False) -> None:
        """Takes the gradients of a backward pass over and clears them.

        borrowed: their memory will be written again before `step`; the first ones are copied then.
        """
        for name, parameter in self._parameters.items():
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                continue
            held = self._gradients.get(name)
            if held is None:
                self._gradients[name] = gradient.to(torch.float32, copy=True) if borrowed else gradient
            else:
                self._gradients[name] = held.to(torch.float32).add_(gradient)

    @torch.no_grad()
    def change_gradients(self, change: Callable[[Tensor], Tensor]) -> None:
        """Puts what `change` makes of each gradient, widened to float32, in its place: a sum over ranks, say."""
        self._gradients = {name: change(g.to(torch.float32)) for name, g in self._gradients.items()}

    @torch.no_grad()
    def step(self, lr_factor: float, clip_norm: float) -> float:
        """Clips, moves the weights, forgets the gradients. Returns the gradient's norm before clipping.

        lr_factor multiplies both learning rates. A norm that is not finite moves nothing.
        """
        gradients = self._gradients
        self._gradients = {}
        total = _total_norm(list(gradients.values()))
        pieces = _of_one_dtype([gradients.get(name) for name in self._adamw_names])
        if self._adamw is not None:
            self._adamw.prepare(pieces)
        norm = float(total)
        if not math.isfinite(norm):
            return norm
        # Multiplied where gradients are read: no pass over them of its own.
        scale = clip_norm / norm if clip_norm and norm > clip_norm else 1.0
        if self._muon_parts:
            wide = {
                name: gradients[name].to(torch.float32) * scale
                for name in dict.fromkeys(part.parameter for part in self._muon_parts)
            }
            matrices = [part.view(wide[part.parameter]) for part in self._muon_parts]
            self._muon.step(matrices, self._settings.muon_lr * lr_factor)
        if self._adamw is not None:
            self._adamw_step += 1
            s = self._settings
            self._adamw.step(
                pieces,
                step=int(self._adamw_step),
                lr=s.lr * lr_factor,
                beta1=s.beta1,
                beta2=s.beta2,
                eps=s.eps,
                grad_scale=scale,
            )
        return norm

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that resuming needs, as views: `master.`, `adamw.exp_avg.`, ... + Hugging Face's name."""
        return dict(self._state())

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Copies a state_tensors() in. Raises CheckpointError unless names and shapes are exactly this optimizer's."""
        mine = self.state_tensors()
        for problem, names in (
            ("lacks", mine.keys() - tensors.keys()),
            ("also has", tensors.keys() - mine.keys()),
        ):
            if names:
                raise CheckpointError(
                    f"the optimizer state {problem} {sorted(names)[0]!r} ({len(names)} in all); resume with the "
                    "recipe's optimizer, model and dtype that the checkpoint was written with"
                )
        for name, tensor in mine.items():
            if tensor.shape != tensors[name].shape:
                raise CheckpointError(
                    f"optimizer state {name!r} has shape {tuple(tensors[name].shape)}, "
                    f"the model needs {tuple(tensor.shape)}"
                )
            tensor.copy_(tensors[name])
        if self._has_masters:
            torch._foreach_copy_(list(self._weights.values()), list(self._masters.values()))

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        for part in self._parts:
            master = self._masters[part.parameter]
            if self._has_masters:
                yield f"master.{part.name}", part.view(master)
            if part.parameter in self._adamw_states:
                state = self._adamw_states[part.parameter]
                yield f"adamw.exp_avg.{part.name}", part.view(state.exp_avg)
                yield f"adamw.exp_avg_sq.{part.name}", part.view(state.exp_avg_sq)
        for name in self._adamw_names:
            yield f"adamw.step.{name}", self._adamw_step
        for part, buffer in zip(self._muon_parts, self._muon.buffers, strict=True):
            yield f"muon.momentum.{part.name}", buffer


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """Of all together, a scalar on their device."""
    total: Tensor = torch.linalg.vector_norm(euclidean_norms(gradients))
    return total


def _of_one_dtype(gradients: list[Tensor | None]) -> list[Tensor | None]:
    """In float32 unless all have one dtype: a weight may have had a gradient of some micro-batches alone."""
    if len({gradient.dtype for gradient in gradients if gradient is not None}) <= 1:
        return gradients
    return [None if gradient is None else gradient.to(torch.float32) for gradient in gradients]


def is_inner_matrix(name: str, dimensions: int) -> bool:
    """Matrices inside the layers, one or a stack of experts; not embeddings, the router, norms or biases."""
    return dimensions >= 2 and name not in _EMBEDDINGS and not name.endswith("router.weight")
