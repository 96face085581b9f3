"""Optimizers: options and state here, the step itself one call into C++ for all parameters."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

from mainspring.tensor import _tensor
from mainspring.tensor._tensor import Tensor, ValueOutOfRangeError
from mainspring.tensor.grad_mode import no_grad


def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float) -> float:
    """Scales the gradients so that their joint Euclidean norm is at most max_norm; returns the norm before."""
    return _tensor._clip_grad_norm(list(parameters), max_norm)


class Optimizer(ABC):
    """A list of parameters, a learning rate that may be changed between steps, and named lists of state tensors."""

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        self.params = list(params)
        if not self.params:
            raise ValueOutOfRangeError("an optimizer needs at least one parameter")
        _positive("lr", lr)
        self.lr = lr
        self.num_steps = 0
        self._state: dict[str, list[Tensor]] = {}

    def zero_grad(self) -> None:
        """Forgets the gradients of all parameters."""
        _tensor._zero_grad(self.params)

    @abstractmethod
    def step(self) -> None:
        """Updates every parameter that has a gradient, in place."""

    def state_dict(self) -> dict[str, Any]:
        """`num_steps`, `lr`, and the state tensors under `<name>.<index of the parameter>`."""
        tensors = {f"{name}.{i}": t for name, state in self._state.items() for i, t in enumerate(state)}
        return {"num_steps": self.num_steps, "lr": self.lr, **tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copies a state in that `state_dict` of the same kind of optimizer gave.

        Raises:
            ValueOutOfRangeError: other names than this optimizer's.
            ShapeError: a state tensor does not fit.
        """
        own = self.state_dict()
        if own.keys() != state.keys():
            raise ValueOutOfRangeError(
                f"the optimizer's state differs in {sorted(own.keys() ^ state.keys())[:4]}; "
                "load it into an optimizer of the same kind over the same parameters"
            )
        for name, tensor in own.items():
            if isinstance(tensor, Tensor):
                tensor.copy_(state[name])
        self.num_steps, self.lr = state["num_steps"], state["lr"]


def _positive(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueOutOfRangeError(f"{name} is {value}; it must be at least 0")


class SGD(Optimizer):
    """p -= lr v with v = momentum v + (1 - dampening) (grad + weight_decay p), as in PyTorch."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        super().__init__(params, lr)
        _positive("momentum", momentum)
        self.momentum, self.dampening, self.weight_decay = momentum, dampening, weight_decay
        self.nesterov = nesterov
        if momentum:
            self._state["velocity"] = [_tensor._moment_like(p) for p in self.params]

    def step(self) -> None:
        self.num_steps += 1
        _tensor._sgd_step(
            self.params,
            self._state.get("velocity", []),
            self.num_steps,
            self.lr,
            self.momentum,
            self.dampening,
            self.weight_decay,
            self.nesterov,
        )


class Adam(Optimizer):
    """Kingma and Ba, "Adam: a method for stochastic optimization", 2015, algorithm 1; weight_decay is an L2 term."""

    _decoupled = False

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr)
        for beta in betas:
            if not 0 <= beta < 1:
                raise ValueOutOfRangeError(f"a beta is {beta}; it must lie in [0, 1)")
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self._state["m"] = [_tensor._moment_like(p) for p in self.params]
        self._state["v"] = [_tensor._moment_like(p) for p in self.params]

    def step(self) -> None:
        self.num_steps += 1
        _tensor._adam_step(
            self.params,
            self._state["m"],
            self._state["v"],
            self.num_steps,
            self.lr,
            *self.betas,
            self.eps,
            self.weight_decay,
            self._decoupled,
        )


class AdamW(Adam):
    """Loshchilov and Hutter, "Decoupled weight decay regularization", 2019, algorithm 2."""

    _decoupled = True

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)


class Muon(Optimizer):
    """Momentum, made orthogonal: Jordan et al., "Muon: an optimizer for hidden layers", 2024.

    For the matrices of hidden layers; embeddings, norms and biases belong to AdamW. The update is scaled by
    0.2 sqrt(max(rows, columns)), so that its size is AdamW's (Liu et al., "Muon is scalable", 2025, eq. 4).
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        nesterov: bool = True,
        steps: int = 5,
    ) -> None:
        super().__init__(params, lr)
        for p in self.params:
            if p.ndim != 2:
                raise ValueOutOfRangeError(
                    f"Muon takes matrices, not a parameter of shape {p.shape}; give it to AdamW"
                )
        if not 0 <= momentum < 1:
            raise ValueOutOfRangeError(f"the momentum is {momentum}; it must lie in [0, 1)")
        self.momentum, self.weight_decay, self.nesterov, self.steps = momentum, weight_decay, nesterov, steps
        self._state["momentum"] = [_tensor._moment_like(p) for p in self.params]

    def step(self) -> None:
        self.num_steps += 1
        with no_grad():
            for p, buffer in zip(self.params, self._state["momentum"], strict=True):
                if p.grad is None:
                    continue
                grad = p.grad.detach().to(buffer.dtype)
                buffer.mul_(self.momentum).add_(grad)
                update = orthogonalise(grad + buffer * self.momentum if self.nesterov else buffer, self.steps)
                p.mul_(1 - self.lr * self.weight_decay)
                p.sub_(update.to(p.dtype) * (self.lr * 0.2 * math.sqrt(max(p.shape))))


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """The matrix with g's singular vectors and singular values near 1: a quintic Newton-Schulz iteration [m, n]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[0] > g.shape[1]
    x = (g.T if tall else g) / (_tensor.vector_norm(g) + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = x * a + (square * b + (square @ square) * c) @ x
    return x.T if tall else x
