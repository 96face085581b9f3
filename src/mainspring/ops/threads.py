"""How many threads one operation may use on a CPU: one number for PyTorch's pool and the kernels' own."""

from __future__ import annotations

import torch

from mainspring.errors import ConfigError
from mainspring.ops.cpu.extension import kernels


def set_num_threads(count: int) -> None:
    """Sets it for this process. Results do not depend on it in lockstep. Raises ConfigError below 1."""
    if count < 1:
        raise ConfigError(f"the number of threads is {count}, but must be at least 1")
    torch.set_num_threads(count)
    module = kernels()
    if module is not None:
        module.set_num_threads(count)
