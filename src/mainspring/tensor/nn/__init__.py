"""Layers with parameters; names as in PyTorch."""

from mainspring.tensor._tensor import Parameter
from mainspring.tensor.nn.layers import (
    GELU,
    CrossEntropyLoss,
    Dropout,
    Embedding,
    LayerNorm,
    Linear,
    ReLU,
    RMSNorm,
    SiLU,
    SwiGLU,
    Tanh,
)
from mainspring.tensor.nn.module import Module, ModuleList, Sequential

__all__ = [
    "GELU",
    "CrossEntropyLoss",
    "Dropout",
    "Embedding",
    "LayerNorm",
    "Linear",
    "Module",
    "ModuleList",
    "Parameter",
    "RMSNorm",
    "ReLU",
    "Sequential",
    "SiLU",
    "SwiGLU",
    "Tanh",
]
