"""Activations and their gradients between the stages of a pipeline: sent forward, gradients come back."""

from __future__ import annotations

from mainspring.tensor import _tensor as mt
from mainspring.tensor._tensor import Group, Tensor, dtype


def send_activation(x: Tensor, group: Group, to: int) -> Tensor:
    """Sends x to a stage. backward() of the result (a single 0) asks that stage for x's gradient."""
    group.send(x.detach().contiguous(), to)
    shape, kind = x.shape, x.dtype

    def backward(grad: Tensor) -> list[Tensor | None]:
        received = mt.empty(shape, dtype=kind)
        group.recv(received, to)
        return [received]

    return mt.record(mt.zeros((), dtype=kind), [x], backward)


def receive_activation(shape: tuple[int, ...], group: Group, source: int, kind: dtype = mt.float32) -> Tensor:
    """The activation of an earlier stage. Its gradient goes back there in the backward pass."""
    received = mt.empty(shape, dtype=kind)
    group.recv(received, source)
    anchor = mt.zeros(shape, dtype=kind, requires_grad=True)

    def backward(grad: Tensor) -> list[Tensor | None]:
        group.send(grad.detach().contiguous(), source)
        return [None]

    return mt.record(received, [anchor], backward)
