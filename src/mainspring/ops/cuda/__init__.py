"""CUDA C++ kernels for Hopper: compiled at first use by nvcc, cached, called through C interfaces."""
