"""The C++ tensor framework: tensors, autograd, layers, optimizers; names as in PyTorch, which it does not need.

    import mainspring.tensor as mt

    x = mt.randn(4, 3, requires_grad=True)
    (x * x).sum().backward()
    x.grad

Operations are functions of this module and methods of Tensor; `mt.OPS` lists them with their signatures.
"""

import mainspring.tensor._extension  # noqa: F401 - says what to do where it is missing

# isort: split
from mainspring.tensor import nn as nn
from mainspring.tensor import optim as optim
from mainspring.tensor import schedule as schedule
from mainspring.tensor._tensor import *  # noqa: F403 - its names are ours
from mainspring.tensor._tensor import default_generator
from mainspring.tensor.checkpointing import checkpoint as checkpoint
from mainspring.tensor.grad_mode import enable_grad as enable_grad
from mainspring.tensor.grad_mode import no_grad as no_grad
from mainspring.tensor.grad_mode import set_grad_enabled as set_grad_enabled


def manual_seed(seed: int) -> None:
    """Starts the default stream of random numbers anew."""
    default_generator.manual_seed(seed)


def __getattr__(name: str) -> object:
    # Files need NumPy and the readers of formats; a program without them should not pay for the import.
    if name in ("load_file", "save_file"):
        from mainspring.tensor import checkpoint_file

        return getattr(checkpoint_file, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
