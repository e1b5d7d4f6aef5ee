"""Triton kernels, installed as ``impure_fast.kernels``; each file belongs to the operator of its name."""
