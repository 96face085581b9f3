"""Layers with parameters; names as in PyTorch."""

from mainspring.tensor._tensor import Parameter
from mainspring.tensor.nn.convolution import Conv1d, Conv2d
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
from mainspring.tensor.nn.transformer import KeyValueCache, MultiHeadAttention, RotaryAngles, TransformerBlock

__all__ = [
    "GELU",
    "Conv1d",
    "Conv2d",
    "CrossEntropyLoss",
    "Dropout",
    "Embedding",
    "KeyValueCache",
    "LayerNorm",
    "Linear",
    "Module",
    "ModuleList",
    "MultiHeadAttention",
    "Parameter",
    "RMSNorm",
    "ReLU",
    "RotaryAngles",
    "Sequential",
    "SiLU",
    "SwiGLU",
    "Tanh",
    "TransformerBlock",
]
