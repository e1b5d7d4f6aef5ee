"""Triton kernels, installed as ``impure_fast.kernels``; there are none yet."""
