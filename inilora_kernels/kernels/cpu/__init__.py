"""Fused numba kernels for the CPU."""
