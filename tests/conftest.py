"""Settings of the whole suite."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

# Tiny tensors gain nothing from threads, and on a busy machine threads that wait for each other lose minutes.
torch.set_num_threads(1)

# By hand hypothesis looks for new counter-examples each time; in CI the same change gives the same verdict.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
