"""CPU kernels in C++ as plain functions on tensors: no autograd, canonical order, fp32 and bf16."""
