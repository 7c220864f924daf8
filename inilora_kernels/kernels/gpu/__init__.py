"""Triton kernels for a GPU, their layout and their cost model."""
