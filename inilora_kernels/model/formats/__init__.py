"""Kinds of stored weights, one module each: which stored tensors make up a weight matrix, and its values."""
