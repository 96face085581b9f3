"""Convolutions; weights are laid out and initialised as PyTorch's are."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mainspring.tensor import _tensor as mt
from mainspring.tensor._tensor import Generator, Tensor, dtype
from mainspring.tensor.nn.layers import _uniform
from mainspring.tensor.nn.module import Module


class _Convolution(Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, ...],
        stride: int | Sequence[int],
        padding: int | Sequence[int],
        dilation: int | Sequence[int],
        groups: int,
        bias: bool,
        kind: dtype,
        generator: Generator | None,
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        fan_in = in_channels // groups * math.prod(kernel)
        bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
        self.weight = _uniform((out_channels, in_channels // groups, *kernel), bound, kind, generator)
        self.bias = _uniform((out_channels,), bound, kind, generator) if bias else None

    def extra_repr(self) -> str:
        return (
            f"{tuple(self.weight.shape)}, stride={self.stride}, padding={self.padding}, groups={self.groups}"
        )


class Conv1d(_Convolution):
    """[N, in_channels, L] to [N, out_channels, L']; weight: [out_channels, in_channels / groups, kernel]."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        dtype: dtype = mt.float32,
        generator: Generator | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            (kernel_size,),
            stride,
            padding,
            dilation,
            groups,
            bias,
            dtype,
            generator,
        )

    def forward(self, x: Tensor) -> Tensor:
        return mt.conv1d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Conv2d(_Convolution):
    """[N, in_channels, H, W] to [N, out_channels, H', W']; weight: [out_channels, in_channels / groups, kh, kw]."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        dtype: dtype = mt.float32,
        generator: Generator | None = None,
    ) -> None:
        kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        super().__init__(
            in_channels, out_channels, kernel, stride, padding, dilation, groups, bias, dtype, generator
        )

    def forward(self, x: Tensor) -> Tensor:
        return mt.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
