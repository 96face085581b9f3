"""Settings of the whole suite."""

from __future__ import annotations

import torch

# Tiny tensors gain nothing from threads, and on a busy machine threads that wait for each other lose minutes.
torch.set_num_threads(1)
