"""Settings of the whole suite."""

from __future__ import annotations

import torch

# Two threads are what the smallest machines have; tiny tensors gain nothing from more.
torch.set_num_threads(2)
