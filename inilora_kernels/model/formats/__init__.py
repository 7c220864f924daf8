"""Kinds of stored weights, one module each: which stored tensors make up a matrix, and how to compute its values."""
