"""Kinds of files that hold tensors, one module each: how to list a file's tensors and read one of them."""
