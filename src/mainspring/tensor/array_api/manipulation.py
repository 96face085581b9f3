"""Shapes: joining, repeating, reordering dimensions."""

from __future__ import annotations

from collections.abc import Sequence

from mainspring.tensor import _tensor as mt
from mainspring.tensor._tensor import Tensor
from mainspring.tensor.array_api.dtypes import result_type

Axis = int | tuple[int, ...] | None


def broadcast_arrays(*arrays: Tensor) -> list[Tensor]:
    return list(mt.broadcast_tensors(list(arrays)))


def broadcast_shapes(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(mt.broadcast_tensors([mt.zeros(()).expand(s) for s in shapes])[0].shape)


def broadcast_to(x: Tensor, /, shape: Sequence[int]) -> Tensor:
    return mt.broadcast_to(x, tuple(shape))


def concat(arrays: Sequence[Tensor], /, *, axis: int | None = 0) -> Tensor:
    if axis is None:
        return mt.cat([a.reshape(-1) for a in arrays], 0)
    return mt.cat(list(arrays), axis)


def expand_dims(x: Tensor, /, axis: int | tuple[int, ...]) -> Tensor:
    axes = (axis,) if isinstance(axis, int) else axis
    total = x.ndim + len(axes)
    for a in sorted(_wrap(a, total) for a in axes):
        x = mt.unsqueeze(x, a)
    return x


def _wrap(axis: int, ndim: int) -> int:
    if not -ndim <= axis < ndim:
        raise mt.IndexOutOfRangeError(f"axis {axis} is out of range for {ndim} dimensions")
    return axis % ndim


def flip(x: Tensor, /, *, axis: Axis = None) -> Tensor:
    axes = tuple(range(x.ndim)) if axis is None else (axis,) if isinstance(axis, int) else axis
    return mt.flip(x, axes)


def moveaxis(x: Tensor, source: int | tuple[int, ...], destination: int | tuple[int, ...], /) -> Tensor:
    return mt.movedim(x, source, destination)


def permute_dims(x: Tensor, /, axes: tuple[int, ...]) -> Tensor:
    return mt.permute(x, tuple(axes))


def repeat(x: Tensor, repeats: int | Tensor, /, *, axis: int | None = None) -> Tensor:
    return mt.repeat_interleave(x, repeats, axis)


def reshape(x: Tensor, /, shape: Sequence[int], *, copy: bool | None = None) -> Tensor:
    if copy is False:
        return x.view(tuple(shape))
    out = mt.reshape(x, tuple(shape))
    return mt.clone(out) if copy else out


def roll(x: Tensor, /, shift: int | tuple[int, ...], *, axis: Axis = None) -> Tensor:
    if axis is None:
        return mt.roll(x, shift)
    axes = (axis,) if isinstance(axis, int) else axis
    shifts = (shift,) * len(axes) if isinstance(shift, int) else shift
    return mt.roll(x, shifts, axes)


def squeeze(x: Tensor, /, axis: int | tuple[int, ...]) -> Tensor:
    axes = sorted({_wrap(a, x.ndim) for a in ((axis,) if isinstance(axis, int) else axis)}, reverse=True)
    for a in axes:
        if x.shape[a] != 1:
            raise mt.ShapeError(f"squeeze: dimension {a} of shape {tuple(x.shape)} is not 1")
        x = mt.squeeze(x, a)
    return x


def stack(arrays: Sequence[Tensor], /, *, axis: int = 0) -> Tensor:
    kind = result_type(*arrays)
    return mt.stack([a.to(kind) for a in arrays], axis)


def tile(x: Tensor, repetitions: tuple[int, ...], /) -> Tensor:
    return mt.tile(x, tuple(repetitions)) if repetitions else mt.clone(x)


def unstack(x: Tensor, /, *, axis: int = 0) -> tuple[Tensor, ...]:
    return mt.unbind(x, axis)
