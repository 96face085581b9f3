"""The groups of rows of `benchmarks/kernels.py`."""
