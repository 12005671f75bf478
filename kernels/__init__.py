"""Triton kernels, one file an op, installed as ``fastgan.kernels``: always ``import fastgan.kernels``."""
