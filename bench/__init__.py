"""Benchmarks: each file asks one question, and each answer is a ratio taken in one run."""
