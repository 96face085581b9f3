"""GPU kernels in Triton as plain functions on tensors: canonical order; fp32, bf16 and fp16.

Only `support` may be imported where Triton is not installed; the operations import the others when they run.
"""
